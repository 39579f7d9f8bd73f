"""The text of a store, each token with a number; and one token through the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, OutOfRangeError
from mmcache.format.token_flags import named_flags
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, choice, count, optional, public
from mmcache.view.base import View, written
from mmcache.view.direction import named, resolve_direction
from mmcache.view.look import Look
from mmcache.view.words import Words, a_words, surroundings

if TYPE_CHECKING:
    from mmcache.read.store import Store
    from mmcache.view.direction import Direction

__all__ = ["sequence", "token"]

# Tokens of a sequence that are shown at once.
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
    words: Words | None = None,
) -> View:
    """Show the text of a sequence, and a number for each of its tokens.

    Args:
        store: the store.
        site: one of its sites.
        layer: the model's number.
        number: of the sequence, from 0; negative from the end.
        by: `"norm"`; `"value"`, of the dimension or the dot product with the vector that `direction` gives; or
            `"difference"`, the norm of what this layer's row differs by from that of the layer before it in the store.
        direction: a dimension's number, or a vector `[d_model]`.
        start: from which of its tokens on; 1,024 are shown at most.
        words: the store's tokens as text, if it was read already.

    `data`: `sequence`, `document`, `length`, `start`; of each token shown `positions`, `tokens`, `texts`, `flags` and
    `values` `[n]`; and `flag_bits`, the bits of the flags that the store names.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as reading does.
        ArgumentError: another `by`; `"difference"` in the first layer; `"value"` without a direction.
        ShapeError: the direction does not fit.
    """
    layers = [layer]
    if by == "difference":
        at = store.layers.index(layer) if layer in store.layers else -1
        if at == 0:
            raise ArgumentError(f"layer {layer} is the first that is stored: there is none before it to differ from")
        layers = [store.layers[at - 1], layer] if at > 0 else layers
    look = Look(store, site, layers)
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


def _texts(look: Look, positions: np.ndarray, words: Words | None) -> dict[str, Any]:
    tokens = look.tokens(positions)
    flags = look.store.read_flags(int(positions[0]), int(positions[-1]) + 1).numpy()
    return {
        "tokens": tokens, "texts": (words or Words(look.store)).texts(tokens.tolist()), "flags": flags,
        "flag_bits": look.store.flag_bits,
    }  # fmt: skip


def _values(look: Look, positions: np.ndarray, by: str, direction: Direction | None) -> np.ndarray:
    if by == "norm":
        return look.scores(positions, None)[:, 0]
    if by == "value":
        if direction is None:
            raise ArgumentError("by='value' needs a direction: a dimension's number, or a vector")
        return look.scores(positions, resolve_direction(look, direction))[:, 0]
    if by == "difference":
        rows = look.rows(positions)
        # Of infinities there is none, which is what NaN says.
        with np.errstate(invalid="ignore"):
            found: np.ndarray = np.linalg.norm(rows[:, 1] - rows[:, 0], axis=-1)
        return found
    raise ArgumentError(f"by is {by!r}: expected 'norm', 'value' or 'difference'")


@public(store=a_store, site=a_name, position=an_index, context=count(0), words=optional(a_words))
def token(store: Store, site: str, position: int, *, context: int = 12, words: Words | None = None) -> View:
    """Show one token at every layer: how long its row is, how far it turns, and its largest dimensions.

    Args:
        store: the store.
        site: one of its sites.
        position: of the token; negative from the end.
        context: tokens before and behind it whose text is shown.
        words: the store's tokens as text, if it was read already.

    `data`: `position`, `sequence`, `offset`, `token`, `text`, `before`, `after`, `flagged` (names), `counts` (in the
    statistics); `layers`; `norm`, `mean`, `std` `[L]`; `cosine` `[L]`, with the layer before (NaN for the first); and
    `largest`, for each layer its 10 largest dimensions by magnitude, `dimension` and `value`.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as reading does.
        ArgumentError: `context` below 0.
    """
    look = Look(store, site)
    place = store.locate(position)
    position %= store.n_tokens
    rows = look.rows(np.array([position]))[0]
    norm = np.linalg.norm(rows, axis=-1)
    # Rows of zeros or infinities have no cosine, those of infinities no deviation: NaN says so.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, std = rows.mean(axis=-1), rows.std(axis=-1)
        cosine = np.concatenate([[np.nan], (rows[1:] * rows[:-1]).sum(axis=-1) / (norm[1:] * norm[:-1])])
    largest = np.argsort(-np.nan_to_num(np.abs(rows), nan=np.inf), axis=-1, kind="stable")[:, :_LARGEST]
    data = {
        "site": site, "position": position, "sequence": place.sequence, "offset": place.offset,
        "flagged": named_flags(int(store.read_flags(position, position + 1)[0]), store.flag_bits),
        "counts": bool(store.counted(position, position + 1)[0]),
        "token": place.token_id, **surroundings(store, position, context, words or Words(store)),
        "layers": look.layers, "norm": norm, "mean": mean, "std": std, "cosine": cosine,
        "largest": [
            [{"dimension": int(at), "value": float(row[at])} for at in line]
            for row, line in zip(rows, largest, strict=True)
        ],
    }  # fmt: skip
    title = f"Token at {position:,} of {site}, every layer"
    return View("token", title, written(token, site, position, context=context), data, None, look.bytes_read)
