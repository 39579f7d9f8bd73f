"""Special tokens around texts: find those of a tokenizer, add a BOS, and avoid doubling those in the text."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from mmcache.errors import ArgumentError, CorpusError
from mmcache.extraction.tokenizer_calls import ids_of_letter
from mmcache.models.tokenizer import check_growth
from mmcache.system.arguments import outside

__all__ = [
    "BOS_CHOICES",
    "Bos",
    "BosWarning",
    "SpecialTokens",
    "frame_of",
    "special_ids",
    "unframed",
    "warn_of_framed",
    "warn_of_missing",
]

Bos: TypeAlias = Literal["auto", "add", "none"]
BOS_CHOICES: tuple[Bos, ...] = ("auto", "add", "none")


class BosWarning(UserWarning):
    """Contexts lack the model's BOS, or documents already have special tokens."""


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens around each context of a text.

    Attributes:
        before, after: `[n]` int32, either may be empty.
        missing: the BOS in the model's configuration if it is not put before a text; else None.
    """

    before: np.ndarray
    after: np.ndarray
    missing: int | None = None

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def _bos(tokenizer: Any, model_bos: int | None) -> int | None:
    """The BOS of a tokenizer, or that of the model's configuration if the tokenizer has none."""
    own: int | None = getattr(tokenizer, "bos_token_id", None)
    return model_bos if own is None else own


def special_ids(tokenizer: Any, bos: Bos = "auto", model_bos: int | None = None) -> tuple[int, ...]:
    """Ids to be flagged special: the tokenizer's, and with `bos="add"` the BOS that is added."""
    found = set(tokenizer.all_special_ids)
    put = _bos(tokenizer, model_bos)
    if bos == "add" and put is not None:
        found.add(put)
    return tuple(sorted(found))


def frame_of(tokenizer: Any, bos: Bos, model_bos: int | None, vocabulary: int | None) -> SpecialTokens:
    """The special tokens to put around each context of a text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: `"auto"`: those of the tokenizer. `"add"`: also a BOS, if it is not among them. `"none"`: those of the
            tokenizer except the BOS.
        model_bos: the BOS of the model's configuration; None if it has none.
        vocabulary: the model's ids are below this; None if unknown.

    Raises:
        ArgumentError: there is no BOS to add.
        CorpusError: the tokenizer changes the text between its special tokens.
    """
    before, after = _own(tokenizer)
    put = _bos(tokenizer, model_bos)
    if bos == "none":
        return SpecialTokens(before[before != put] if put is not None else before, after)
    there = any(token in before for token in (put, model_bos) if token is not None)
    if bos == "add" and not there:
        if put is None or not 0 <= put < (vocabulary or 2**31):
            found = "neither has one" if put is None else f"the model has no row for id {put}"
            raise ArgumentError(
                f"bos is 'add', and the BOS is the tokenizer's or else the model configuration's: {found}. Give a "
                f"tokenizer with a bos_token, or another bos"
            )
        before = np.concatenate([np.array([put], np.int32), before])
        there = True
    known = model_bos is not None and 0 <= model_bos < (vocabulary or 2**31)
    return SpecialTokens(before, after, model_bos if known and not there else None)


def _own(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that a tokenizer itself puts before and after a text: `[n]` int32 each."""
    check_growth(tokenizer)
    plain, full = (ids_of_letter(tokenizer, special=special) for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return np.array(full[:start], np.int32), np.array(full[start + len(plain) :], np.int32)
    raise CorpusError(f"the tokenizer makes {full} of 'a', which does not hold its {plain} without special tokens")


def unframed(ids: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A view of `ids` `[n]`, without leading tokens that are in `before` and trailing ones that are in `after`.

    A chat template writes a BOS and an EOS into the text, so they must not be added a second time.
    """
    first, last = 0, len(ids)
    while first < last and ids[first] in before:
        first += 1
    while last > first and ids[last - 1] in after:
        last -= 1
    return ids[first:last]


def warn_of_missing(frame: SpecialTokens) -> None:
    """Warn if the model has a BOS that contexts do not get."""
    if frame.missing is not None:
        warnings.warn(
            f"the model's configuration has a BOS (id {frame.missing}), and its tokenizer puts none before a text, so "
            f"contexts begin without one: bos='add' (--bos add) puts it there, bos='none' says that none is wanted",
            BosWarning,
            stacklevel=outside(),
        )


def warn_of_framed(framed: int, documents: int) -> None:
    """Warn of documents that already have special tokens."""
    if framed:
        warnings.warn(
            f"{framed:,} of {documents:,} documents begin or end with special tokens that would be put around them, as "
            f"chat templates write them: they have them once, not twice",
            BosWarning,
            stacklevel=outside(),
        )
