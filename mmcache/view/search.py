"""Search: where a text occurs in a store, and at which tokens a dimension or a direction is largest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, count, optional, public
from mmcache.view.base import BUDGET, Sampler, View, written
from mmcache.view.dimensions import named, resolve_direction
from mmcache.view.tokens import Detokenizer, a_words, surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcache.read.store import Store
    from mmcache.view.dimensions import Direction

__all__ = ["find", "top"]

# How many tokens are searched by default: 40 MB of ids.
_MOST_TOKENS = 10_000_000
# How many tokens are searched at a time.
_PIECE = 1 << 18


@public(
    store=a_store,
    text=optional(a_name),
    token=optional(an_index),
    start=count(0),
    most_tokens=count(0),
    most=count(0),
    context=count(0),
    words=optional(a_words),
)
def find(
    store: Store,
    text: str | None = None,
    *,
    token: int | None = None,
    start: int = 0,
    most_tokens: int = _MOST_TOKENS,
    most: int = 50,
    context: int = 12,
    words: Detokenizer | None = None,
) -> View:
    """Search the store's tokens for a text (case-sensitive) or for a token.

    A text may begin and end within tokens. Matches that overlap are counted separately. A match never crosses the end
    of a sequence. A token is found by its id.

    Args:
        store: the store.
        text: the text to search for.
        token: the id to search for, instead of a text.
        start: the first position to search.
        most_tokens: how many tokens to search.
        most: how many matches to list; all are counted.
        context: tokens of context before and after each match.
        words: the store's detokenizer, if it was read already.

    `data`: `count`, `sequences` (how many have a match), `looked` (tokens), and `matches`: `position` (of the token in
    which it begins), `tokens` (how many it touches), `sequence`, `offset`, `before`, `text`, `after`.

    Raises:
        ArgumentError: neither or both of text and token; an empty text; a text, but the store has no tokenizer; a
            number below 0.
        CorruptError: tokens or sequences are damaged.
    """
    if (text is None) == (token is None) or text == "":
        raise ArgumentError("find takes a text that is not empty, or token=, the id of one: exactly one of them")
    words = words or Detokenizer(store)
    if text is not None and not words.known:
        raise ArgumentError(f"{store.where} keeps no tokenizer, so its text is not known: search with token=, by id")
    stop = min(store.n_tokens, start + most_tokens)
    count, sequences = 0, set[int]()
    places: list[tuple[int, int]] = []
    needle = text.encode() if text is not None else token
    for first, numbers, widths in _matches(store, words, needle, start, stop):
        count += len(numbers)
        spans = np.searchsorted(np.asarray(store.sequences)[:, 0], first + numbers, side="right") - 1
        sequences.update(np.unique(spans).tolist())
        room = most - len(places)
        places += list(zip((first + numbers[:room]).tolist(), widths[:room].tolist(), strict=True))
    looked = max(0, stop - start)
    query = text if text is not None else token
    return View(
        "find",
        f"{query!r}: {count:,} times in {len(sequences):,} sequences",
        written(
            find, *([] if text is None else [text]), token=token, start=start, most_tokens=most_tokens, most=most,
            context=context,
        ),
        {
            "query": query, "count": count, "sequences": len(sequences), "looked": looked,
            "matches": [_place(store, words, position, width, context) for position, width in places],
        },
        None if looked == store.n_tokens else f"{looked:,} of {store.n_tokens:,} tokens, from position {start:,} on",
        0,
    )  # fmt: skip


def _matches(
    store: Store, words: Detokenizer, needle: Any, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each piece: its first position, the tokens in which matches begin, and how many tokens each touches."""
    ends = np.asarray(store.sequences)[:, 1]
    while start < stop:
        # A piece ends at the end of a sequence, so that no match is cut; a sequence longer than `_PIECE` is one piece.
        last = min(start + _PIECE, stop)
        end = int(ends[np.searchsorted(ends, start, side="right")])
        whole = ends[(ends > start) & (ends <= last)]
        last = int(whole[-1]) if len(whole) else min(end, stop)
        tokens = store.read_tokens(start, last).numpy()
        if isinstance(needle, int):
            numbers = np.flatnonzero(tokens == needle)
            yield start, numbers, np.ones(len(numbers), np.int64)
        else:
            yield start, *_in_text(words, tokens, needle, ends[(ends > start) & (ends <= last)] - start)
        start = last


def _in_text(words: Detokenizer, tokens: np.ndarray, needle: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find a text in tokens: the token in which each match begins, and how many it touches."""
    table, starts = words.table
    known = (tokens >= 0) & (tokens < words.size)
    ids = np.where(known, tokens, 0)
    lengths = np.where(known, starts[ids + 1] - starts[ids], 0)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    # Each byte's index in the table: the start of its token there, plus its offset within the token.
    whole = table[np.repeat(starts[ids] - edges[:-1], lengths) + np.arange(edges[-1])].tobytes()
    found, at = [], whole.find(needle)
    while at >= 0:
        found.append(at)
        at = whole.find(needle, at + 1)
    places = np.array(found, np.int64)
    first = np.searchsorted(edges, places, side="right") - 1
    last = np.searchsorted(edges, places + len(needle) - 1, side="right") - 1
    # Drop matches that cross the end of a sequence.
    within = np.searchsorted(ends, first, side="right") == np.searchsorted(ends, last, side="right")
    return first[within], (last - first + 1)[within]


def _place(store: Store, words: Detokenizer, position: int, width: int, context: int) -> dict[str, Any]:
    place = store.locate(position)
    said = surroundings(store, position, context, words, width)
    return {"position": position, "tokens": width, "sequence": place.sequence, "offset": place.offset, **said}


# The quantiles that each band lies between; the first is the top.
_BANDS = (("top", 1.0, 1.0), ("99 to 100 %", 0.99, 1.0), ("90 to 99 %", 0.9, 0.99), ("50 to 90 %", 0.5, 0.9),
          ("0 to 50 %", 0.0, 0.5))  # fmt: skip


@public(
    store=a_store, site=a_name, layer=an_index, k=count(1), context=count(0), budget=count(1), words=optional(a_words)
)
def top(
    store: Store,
    site: str,
    layer: int,
    direction: Direction,
    *,
    k: int = 10,
    context: int = 12,
    budget: int = BUDGET,
    words: Detokenizer | None = None,
) -> View:
    """The tokens with the largest values of a dimension or direction, and examples from each band of quantiles.

    Only tokens that count in the statistics (not BOS, special or first) are read, as many as `budget` bytes hold. The
    examples of a band are evenly spread over its ranks.

    Args:
        store: the store.
        site: one of its sites.
        layer: the model's number.
        direction: a dimension's number, or a vector `[d_model]`, for the dot product.
        k: examples at the top, and in each band.
        context: tokens of context before and after each.
        budget: how many bytes of activations may be read.
        words: the store's detokenizer, if it was read already.

    `data`: `looked`, how many values were read; `non_finite`, how many of them are left out; `bands`, each with `name`,
    `low`, `high` (values), `tokens` (how many are in it) and `examples`: `position`, `sequence`, `offset`, `token`,
    `value`, `before`, `text`, `after`, the largest first; among equal ones, the earlier first.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ShapeError: the direction does not fit.
        ArgumentError: `k` below 1, `context` below 0.
    """
    look = Sampler(store, site, [layer], budget)
    resolved = resolve_direction(look, direction)
    sample = look.sample()
    values = look.scores(sample.positions, resolved)[:, 0]
    finite = np.isfinite(values)
    positions, values = sample.positions[finite], values[finite]
    order = np.argsort(-values, kind="stable")
    words = words or Detokenizer(store)
    bands = [_band(look, words, name, positions[ranks], values[ranks], shown, context)
             for name, ranks, shown in _bands(order, k)]  # fmt: skip
    what = f"dimension {resolved}" if isinstance(resolved, int) else "the direction"
    data = {
        "site": site, "layer": layer, "dimension": resolved if isinstance(resolved, int) else None,
        "looked": len(finite), "non_finite": int((~finite).sum()), "bands": bands,
    }  # fmt: skip
    return View(
        "top",
        f"Tokens by {what} of {site}, layer {layer}",
        written(top, site, layer, named(resolved), k=k, context=context, budget=budget),
        data,
        sample.said,
        look.bytes_read,
    )


def _bands(order: np.ndarray, k: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The bands of a ranking: name, the band's part of `order`, and which of its entries are shown."""
    found = []
    n = len(order)
    for name, low, high in _BANDS:
        # Ranks count from the largest.
        first, last = (0, min(k, n)) if low == high else (n - int(np.ceil(high * n)), n - int(np.ceil(low * n)))
        ranks = order[first:last]
        shown = (
            np.unique(np.linspace(0, len(ranks) - 1, min(k, len(ranks))).astype(int))
            if len(ranks)
            else np.empty(0, int)
        )
        found.append((name, ranks, shown))
    return found


def _band(
    look: Sampler,
    words: Detokenizer,
    name: str,
    positions: np.ndarray,
    values: np.ndarray,
    shown: np.ndarray,
    context: int,
) -> dict[str, Any]:
    examples = []
    for at in shown:
        position = int(positions[at])
        place = look.store.locate(position)
        examples.append(
            {
                "position": position,
                "sequence": place.sequence,
                "offset": place.offset,
                "token": place.token_id,
                "value": float(values[at]),
                **surroundings(look.store, position, context, words),
            }
        )
    edges = [float(values.min()), float(values.max())] if len(values) else [float("nan")] * 2
    return {"name": name, "low": edges[0], "high": edges[1], "tokens": len(values), "examples": examples}
