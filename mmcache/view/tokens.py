"""Tokens as text, by the store's own tokenizer; views of a sequence, and of one token at every layer."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, CorruptError, OutOfRangeError
from mmcache.format.token_flags import named_flags
from mmcache.models.tokenizer import growth, panics_as_errors
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, choice, count, instance, optional, public
from mmcache.view.base import Sampler, View, written
from mmcache.view.dimensions import named, resolve_direction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmcache.read.store import Store
    from mmcache.view.dimensions import Direction

__all__ = ["Detokenizer", "a_words", "sequence", "surroundings", "token"]

# A token's text is cut after this many bytes: only a file made to exhaust memory has longer ones.
_LONGEST = 1 << 10
# A token that a decoder's replacements could make longer than this is not decoded.
_LARGEST_JSON = 1 << 20


def _byte_level() -> dict[str, int]:
    """The letters that byte-level tokenizers use for bytes (GPT-2's `bytes_to_unicode`), with their bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


class Detokenizer:
    """The text of each token of a store, as the bytes that it adds.

    Args:
        store: its tokenizer is read when this is made.

    Raises:
        CorruptError, StoreNotFoundError: the store's tokenizer is damaged or missing.
    """

    @public(store=a_store)
    def __init__(self, store: Store) -> None:
        text = store.tokenizer_json()
        self._tokenizer: Any = None
        self._where = store.where
        self._pieces: dict[int, bytes] = {}
        if text is None:
            return
        try:
            import tokenizers  # noqa: PLC0415 -- an extra
        except ImportError:
            return
        try:
            with panics_as_errors():
                self._tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
            self._letters = _byte_level() if _is_byte_level(decoder) else None
            self._growth = growth(decoder)
        except Exception as error:  # the library raises no narrower type
            raise CorruptError(f"{store.where}: the tokenizer that it keeps cannot be read ({error})") from error
        self._added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer; if not, texts are ids."""
        return self._tokenizer is not None

    @property
    def size(self) -> int:
        """How many ids have a text; 0 without a tokenizer."""
        return int(self._tokenizer.get_vocab_size()) if self.known else 0

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to the text; its id in angle brackets if unknown."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._bytes_of(token)[:_LONGEST]
        return found

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token) if self.known and token >= 0 else None
        if name is None:
            return f"⟨{token}⟩".encode()
        if name in self._added:
            return str(name).encode()
        if self._letters is not None and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if len(name) * self._growth > _LARGEST_JSON:
            return str(name).encode()
        # The text that the token adds after another one: some decoders strip the space of the first.
        try:
            with panics_as_errors():
                once, twice = self._tokenizer.decode_batch([[token], [token, token]], skip_special_tokens=False)
        except Exception as error:  # as above
            raise CorruptError(
                f"{self._where}: the tokenizer that it keeps fails on token {token} ({error})"
            ) from error
        return str(twice[len(once) :]).encode()

    def texts(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token; the replacement character for a part of a character."""
        return [self.bytes_of(int(token)).decode(errors="replace") for token in tokens]

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all ids, concatenated, and the start of each: `[bytes]` uint8, `[size + 1]` int64."""
        pieces = [self.bytes_of(token) for token in range(self.size)]
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        return np.frombuffer(b"".join(pieces), np.uint8), starts


def _is_byte_level(decoder: Any) -> bool:
    """Whether a tokenizer's decoder is byte-level, or one of several that it applies is."""
    if not isinstance(decoder, dict):
        return False
    inner = decoder.get("decoders", [])
    return decoder.get("type") == "ByteLevel" or any(_is_byte_level(one) for one in inner)


a_words = instance(Detokenizer, "mmcache.view.Detokenizer(store)")


def surroundings(store: Store, position: int, context: int, words: Detokenizer, width: int = 1) -> dict[str, str]:
    """The text of some tokens, and of those around them in the same sequence.

    Raises:
        ArgumentError: `context` below 0.
    """
    if context < 0:
        raise ArgumentError(f"context is {context}: expected 0 or more")
    span = store.sequences[store.sequences.find(position)]
    first, last = max(span.start, position - context), min(span.stop, position + width + context)
    texts = [words.bytes_of(int(token)) for token in store.read_tokens(first, last)]
    at = position - first
    parts = {"before": texts[:at], "text": texts[at : at + width], "after": texts[at + width :]}
    return {name: b"".join(part).decode(errors="replace") for name, part in parts.items()}


# How many tokens of a sequence are shown at a time.
_MOST = 1024
_LARGEST = 10


@public(
    store=a_store,
    site=a_name,
    layer=an_index,
    number=an_index,
    by=choice("norm", "value", "difference"),
    start=an_index,
    words=optional(a_words),
)
def sequence(
    store: Store,
    site: str,
    layer: int,
    number: int,
    *,
    by: str = "norm",
    direction: Direction | None = None,
    start: int = 0,
    words: Detokenizer | None = None,
) -> View:
    """The text of a sequence, and a number for each of its tokens.

    Args:
        store: the store.
        site: one of its sites.
        layer: the model's number.
        number: of the sequence, from 0; negative counts from the end.
        by: `"norm"`; `"value"`, of the dimension `direction`, or the dot product with that vector; or `"difference"`,
            the norm of the difference between this layer's row and that of the layer before it in the store.
        direction: a dimension's number, or a vector `[d_model]`.
        start: the first token to show; 1,024 are shown at most.
        words: the store's detokenizer, if it was read already.

    `data`: `sequence`, `document`, `length`, `start`; for each token shown `positions`, `tokens`, `texts`, `flags` and
    `values` `[n]`; and `flag_bits`, the names and bits of the store's flags.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ArgumentError: another `by`; `"difference"` in the first layer; `"value"` without a direction.
        ShapeError: the direction does not fit.
    """
    layers = [layer]
    if by == "difference":
        at = store.layers.index(layer) if layer in store.layers else -1
        if at == 0:
            raise ArgumentError(f"layer {layer} is the first that is stored: there is none before it to differ from")
        layers = [store.layers[at - 1], layer] if at > 0 else layers
    look = Sampler(store, site, layers)
    direction = resolve_direction(look, direction)
    span = store.sequences[number]
    length = span.stop - span.start
    if not 0 <= start < length:
        raise OutOfRangeError(f"token {start} not in sequence {number}, which has {length}")
    positions = np.arange(span.start + start, min(span.start + start + _MOST, span.stop))
    number %= store.n_sequences
    data: dict[str, Any] = {
        "site": site, "layer": layer, "sequence": number, "document": span.document, "length": length, "start": start,
        "by": by, "positions": positions, **_texts(look, positions, words),
        "values": _values(look, positions, by, direction),
    }  # fmt: skip
    return View(
        "sequence",
        f"Sequence {number:,} by {by} of {site}, layer {layer}",
        written(sequence, site, layer, number, by=by, direction=named(direction), start=start),
        data,
        None if len(positions) == length else f"tokens {start:,} to {start + len(positions):,} of {length:,}",
        look.bytes_read,
    )


def _texts(look: Sampler, positions: np.ndarray, words: Detokenizer | None) -> dict[str, Any]:
    tokens = look.tokens(positions)
    flags = look.store.read_flags(int(positions[0]), int(positions[-1]) + 1).numpy()
    return {
        "tokens": tokens, "texts": (words or Detokenizer(look.store)).texts(tokens.tolist()), "flags": flags,
        "flag_bits": look.store.flag_bits,
    }  # fmt: skip


def _values(look: Sampler, positions: np.ndarray, by: str, direction: Direction | None) -> np.ndarray:
    if by == "norm":
        return look.scores(positions, None)[:, 0]
    if by == "value":
        if direction is None:
            raise ArgumentError("by='value' needs a direction: a dimension's number, or a vector")
        return look.scores(positions, resolve_direction(look, direction))[:, 0]
    if by == "difference":
        rows = look.rows(positions)
        # The difference of two infinities is NaN, as it should be.
        with np.errstate(invalid="ignore"):
            found: np.ndarray = np.linalg.norm(rows[:, 1] - rows[:, 0], axis=-1)
        return found
    raise ArgumentError(f"by is {by!r}: expected 'norm', 'value' or 'difference'")


@public(store=a_store, site=a_name, position=an_index, context=count(0), words=optional(a_words))
def token(store: Store, site: str, position: int, *, context: int = 12, words: Detokenizer | None = None) -> View:
    """One token at every layer: its row's norm, the cosine with the layer before, and its largest dimensions.

    Args:
        store: the store.
        site: one of its sites.
        position: of the token; negative counts from the end.
        context: tokens of context before and after it.
        words: the store's detokenizer, if it was read already.

    `data`: `position`, `sequence`, `offset`, `token`, `text`, `before`, `after`, `flagged` (names), `counts` (whether
    it counts in the statistics); `layers`; `norm`, `mean`, `std` `[L]`; `cosine` `[L]`, with the layer before (NaN for
    the first); and `largest`, for each layer the 10 largest dimensions by magnitude, `dimension` and `value`.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ArgumentError: `context` below 0.
    """
    look = Sampler(store, site)
    place = store.locate(position)
    position %= store.n_tokens
    rows = look.rows(np.array([position]))[0]
    norm = np.linalg.norm(rows, axis=-1)
    # NaN where it is undefined: the cosine of zero or infinite rows, the deviation of infinite rows.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, std = rows.mean(axis=-1), rows.std(axis=-1)
        cosine = np.concatenate([[np.nan], (rows[1:] * rows[:-1]).sum(axis=-1) / (norm[1:] * norm[:-1])])
    largest = np.argsort(-np.nan_to_num(np.abs(rows), nan=np.inf), axis=-1, kind="stable")[:, :_LARGEST]
    data = {
        "site": site, "position": position, "sequence": place.sequence, "offset": place.offset,
        "flagged": named_flags(int(store.read_flags(position, position + 1)[0]), store.flag_bits),
        "counts": bool(store.counted(position, position + 1)[0]),
        "token": place.token_id, **surroundings(store, position, context, words or Detokenizer(store)),
        "layers": look.layers, "norm": norm, "mean": mean, "std": std, "cosine": cosine,
        "largest": [
            [{"dimension": int(at), "value": float(row[at])} for at in line]
            for row, line in zip(rows, largest, strict=True)
        ],
    }  # fmt: skip
    title = f"Token at {position:,} of {site}, every layer"
    return View("token", title, written(token, site, position, context=context), data, None, look.bytes_read)
