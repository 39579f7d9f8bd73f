"""`drop=` and `split=`: the tokens of a store that training uses, as runs of positions (`KeptTokens`, `Split`)."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import crc32c
import numpy as np
import torch

from mmcache.errors import ArgumentError, DtypeError, ShapeError
from mmcache.format.token_flags import counted, known_flags
from mmcache.system.arguments import a_list, choice, count, outside, shown
from mmcache.system.threads import pieces
from mmcache.training.permutation import hashed, mixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmcache.read.store import Store

__all__ = ["Drop", "KeptTokens", "Split", "as_split", "members"]

_PARTS = ("train", "validation")
_UNITS = ("sequence", "document", "shard")
# Distinct from the keys of shuffling, whatever the seed.
_PURPOSE = 0x5B117


@dataclass(frozen=True)
class Split:
    """One part of a store, for training or validation.

    Neighbouring tokens of a text are alike, so a unit is never divided. Of every `1 / fraction` consecutive units, one
    is for validation, picked by a hash of `seed` and their number; for a fraction above one half, the training part is
    picked in this way. When a store grows, every unit stays in its part.

    Attributes:
        part: `"train"` or `"validation"`; the two are disjoint, and together all tokens.
        fraction: the fraction of units for validation, above 0 and below 1.
        by: the unit: `"sequence"`, `"document"`, or `"shard"`: the sequences that start in one block of
            `shard_tokens`, so that the shards of the two parts hardly overlap.
        seed: from 0 to 2**64 - 1; another seed is another split.

    Raises:
        ArgumentError: an attribute is invalid.
    """

    part: Literal["train", "validation"]
    fraction: float = 0.1
    by: Literal["sequence", "document", "shard"] = "sequence"
    seed: int = 0

    def __post_init__(self) -> None:
        choice(*_PARTS)("the part of a split", self.part)
        choice(*_UNITS)("the unit of a split", self.by)
        fraction: Any = self.fraction
        # NaN compares false.
        if isinstance(fraction, bool) or not (isinstance(fraction, int | float | np.number) and 0 < fraction < 1):
            raise ArgumentError(f"the fraction of a split is {shown(fraction)}: expected a number between 0 and 1")
        object.__setattr__(self, "seed", count(0, 2**64 - 1)("the seed of a split", self.seed))


def as_split(given: Split | str | None) -> Split | None:
    """The split meant by an argument: a string is short for a `Split` with the defaults.

    Raises:
        ArgumentError: not None, a split, or the name of a part.
    """
    if given is None or isinstance(given, Split):
        return given
    if not isinstance(given, str) or given not in _PARTS:
        raise ArgumentError(f"split is {shown(given)}: expected None, 'train', 'validation' or a mmcache.Split")
    return Split("train" if given == "train" else "validation")


def members(split: Split, store: Store) -> np.ndarray:
    """Which sequences are in the split's part: `[n_sequences]` bool, the caller's own. ArgumentError if none is."""
    spans = np.asarray(store.sequences)
    if split.by == "sequence":
        numbers, units = np.arange(len(spans)), len(spans)
    elif split.by == "shard":
        numbers, units = _numbered(spans[:, 0] // max(1, store.shard_tokens or 1))
    else:
        numbers, units = _numbered(spans[:, 2])
    if split.fraction <= 0.5:
        validation = _picked(units, split.fraction, split.seed)
    else:
        validation = ~_picked(units, 1 - split.fraction, split.seed)
    chosen = validation if split.part == "validation" else ~validation
    if not chosen.any():
        raise ArgumentError(
            f"the {split.part} part of {store.where} is empty: of {units} {split.by}s, a fraction of {split.fraction} "
            f"with seed {split.seed} leaves none to it. Split by smaller units, or take another fraction"
        )
    found: np.ndarray = chosen[numbers]
    return found


def _numbered(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers of values by first appearance, `[n]` int64, and their count; values appended later change no number."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[which], len(first)


def _picked(units: int, fraction: float, seed: int) -> np.ndarray:
    """Pick one unit of each window of about `1 / fraction`: `[units]` bool. Window j begins at floor(j / fraction)."""
    windows = math.floor(units * fraction) + 2
    edges = np.minimum(np.floor(np.arange(windows + 1) / fraction), 2.0**62).astype(np.int64)
    widths = np.maximum(np.diff(edges), 1).astype(np.uint64)
    picks = edges[:-1] + (hashed(np.arange(windows), mixed(seed, _PURPOSE)) % widths).astype(np.int64)
    chosen = np.zeros(units, np.bool_)
    chosen[picks[picks < units]] = True
    return chosen


Drop: TypeAlias = "str | int | np.ndarray | torch.Tensor | Sequence[str | int | np.ndarray | torch.Tensor] | None"

# Names that `drop` accepts. If a store does not flag first tokens, its sequences determine them.
_FIRST = "first"
_NAMES = tuple(known_flags(first=True))
# Tokens that are filtered at a time: one shard of flags.
_PIECE = 1 << 20


class KeptTokens:
    """The kept tokens, numbered in the order of the text: a kept index is 0 to `len - 1`.

    Takes 16 to 24 bytes per run of consecutive positions, such as a sequence without its first token. Immutable.

    Args:
        starts, stops: int64 `[runs]` each: the runs, at least one, ascending, not adjacent and not empty.
    """

    def __init__(self, starts: np.ndarray, stops: np.ndarray) -> None:
        ends = np.cumsum(stops - starts)
        # A kept index plus the offset of its run is its position.
        self._offsets = stops - ends
        # Padded to a power of two with ends greater than any index.
        self._padded = np.full(1 << (len(ends) - 1).bit_length(), np.iinfo(np.int64).max)
        self._padded[: len(ends)] = ends

    @property
    def _ends(self) -> np.ndarray:
        """The kept index after each run's last."""
        return self._padded[: len(self._offsets)]

    @classmethod
    def from_store(cls, store: Store, drop: Drop, split: Split | str | None) -> KeptTokens:
        """The tokens of a store that are left. Reads flags, a million at a time, and sequences only if they are needed.

        Args:
            store: the store.
            drop: what to leave out: `"bos"`, `"special"`, `"first"` (the first token of each sequence), bits of the
                flags (1 to 255), or `[n_tokens]` bool, true for each token to leave out; or several of these. In a
                store without flags, such as a cache, names and bits leave nothing out; this warns once.
            split: the part, or None for all tokens.

        Raises:
            ArgumentError: `drop` or `split` is invalid, or leaves nothing.
            DtypeError, ShapeError: an array to drop is not bool, or not `[n_tokens]`.
        """
        wanted = _parsed(drop, store)
        if (wanted.bits or wanted.first) and not store.has_tokens:
            _warn_once()
            wanted = _Left(0, wanted.arrays, first=False)
        part = as_split(split)
        among = None if part is None else members(part, store)
        if not any(wanted) and among is None:
            runs = [np.array([[0, store.n_tokens]], np.int64)] if store.n_tokens else []
        else:
            runs = list(_runs(store, wanted, among))
        if not runs:
            short = store.n_tokens and store.n_tokens == store.n_sequences
            why = "; every sequence is one token long, the first one" if short else ""
            raise ArgumentError(
                f"no token of {store.where} is left (n_tokens={store.n_tokens}, drop={_said(drop)}, split={split!r})"
                f"{why}: drop less"
            )
        both = np.concatenate(runs)
        # A run that continues in the next piece is one run.
        apart = both[1:, 0] != both[:-1, 1]
        return cls(both[np.append(True, apart), 0], both[np.append(apart, True), 1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digest(self) -> int:
        """A crc32c of the runs, by which a resume notices that other tokens are kept."""
        return int(crc32c.crc32c(self._offsets.data, crc32c.crc32c(self._ends.data)))

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the store, `[k]` int64, of kept indices, `[k]` int64 from 0 to len - 1."""
        out = np.empty(len(indices), np.int64)
        for piece in pieces(len(indices), len(indices)):
            some = indices[piece]
            np.add(some, self._offsets[self._runs_of(some)], out[piece])
        return out

    def _runs_of(self, indices: np.ndarray) -> np.ndarray:
        """The run of each kept index, as `np.searchsorted`, but keeps the GIL (see system/threads.py)."""
        runs = np.zeros(len(indices), np.int64)
        step = len(self._padded) // 2
        while step:
            # At least `step` more runs end before it: skip them.
            behind = self._padded[runs + (step - 1)] <= indices
            runs += behind * step
            step //= 2
        return runs

    def stretches(self, start: int, stop: int, gap: int) -> list[tuple[int, int]]:
        """Position ranges that hold the kept indices from `start` to before `stop`, as ascending (start, stop).

        Runs with at most `gap` dropped tokens between them are one range. `start < stop`.
        """
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        offsets = self._offsets[first : last + 1]
        begins = np.append(start, self._ends[first:last]) + offsets
        ends = np.append(self._ends[first:last], stop) + offsets
        apart = begins[1:] - ends[:-1] > gap
        return list(zip(begins[np.append(True, apart)].tolist(), ends[np.append(apart, True)].tolist(), strict=True))


class _Left(NamedTuple):
    """What drops a token: bits of its flags, arrays, and being first in a sequence where no flag says so."""

    bits: int
    arrays: list[np.ndarray]
    first: bool


def _parsed(drop: Drop, store: Store) -> _Left:
    alone = isinstance(drop, (str, int, np.integer, np.ndarray, torch.Tensor))
    items = [drop] if alone else [] if drop is None else a_list("drop", drop)
    known, n_tokens = store.flag_bits, store.n_tokens
    bits, arrays, first = 0, [], False
    for item in items:
        if isinstance(item, (np.ndarray, torch.Tensor)):
            array = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else item
            if array.dtype != np.bool_:
                raise DtypeError(f"an array in drop is {array.dtype}: expected bool, true for each token to leave out")
            if array.shape != (n_tokens,):
                raise ShapeError(
                    f"an array in drop has shape {array.shape}: expected ({n_tokens},), one for each token"
                )
            arrays.append(array)
        elif isinstance(item, str) and item in _NAMES:
            bits |= known.get(item, 0)
            first |= item == _FIRST and item not in known
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool) and 1 <= item <= 255:
            bits |= int(item)
        else:
            raise ArgumentError(
                f"drop has {shown(item)}: expected {', '.join(map(repr, _NAMES))}, bits of the flags (1 to 255) or a "
                f"bool for each token"
            )
    return _Left(bits, arrays, first)


def _said(drop: Drop) -> str:
    """One line for errors about what was to be dropped."""
    if isinstance(drop, (np.ndarray, torch.Tensor)):
        return f"an array of {len(drop)}"
    if isinstance(drop, (list, tuple)):
        return f"({', '.join(_said(item) for item in drop)})"
    return shown(drop)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "a store without flags, such as a cache, has no BOS, special or first tokens marked: drop= leaves nothing out",
        stacklevel=outside(),
    )


def _runs(store: Store, left: _Left, among: np.ndarray | None) -> Iterator[np.ndarray]:
    """The runs that are left, `[runs, 2]` int64, piece by piece; a run ends where its piece ends."""
    # `store.flags` would hold a byte for each token of the store.
    folder = store.array("flags") if left.bits else None
    starts = np.asarray(store.sequences)[:, 0].copy() if left.first or among is not None else np.empty(0, np.int64)
    for start in range(0, store.n_tokens, _PIECE):
        stop = min(start + _PIECE, store.n_tokens)
        keep = np.ones(stop - start, np.bool_)
        if folder is not None:
            keep &= counted(folder.read(start, stop).numpy(), left.bits)
        for array in left.arrays:
            keep &= ~array[start:stop]
        if left.first:
            first, last = np.searchsorted(starts, [start, stop]).tolist()
            keep[starts[first:last] - start] = False
        if among is not None:
            first, last = np.searchsorted(starts, [start, stop - 1], side="right").tolist()
            edges = np.concatenate([[start], starts[first:last], [stop]])
            keep &= np.repeat(among[first - 1 : last], np.diff(edges))
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)) + start
        if len(edges):
            yield edges.reshape(-1, 2)
