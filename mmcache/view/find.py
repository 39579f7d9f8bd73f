"""Search: where a text or a token stands in a store, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, count, optional, public
from mmcache.view.base import View, written
from mmcache.view.words import Words, a_words, surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcache.read.store import Store

__all__ = ["find"]

# Tokens that are searched unless told otherwise: 40 MB of ids.
_MOST_TOKENS = 10_000_000
# Tokens that are looked at together.
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
    words: Words | None = None,
) -> View:
    """Search the store's tokens for a text, upper and lower case told apart, or for a token.

    A text may begin and end within tokens, and matches that overlap count each; it is not found across the end of a
    sequence. A token is found by its id.

    Args:
        store: the store.
        text: what to look for,
        token: or the id.
        start: the first position to look at.
        most_tokens: how many tokens are looked at.
        most: matches that are listed; all are counted.
        context: tokens before and behind each that are shown.
        words: the store's tokens as text, if it was read already.

    `data`: `count`, `sequences` (how many have a match), `looked` (tokens), and `matches`: `position` (of the token in
    which it begins), `tokens` (how many it touches), `sequence`, `offset`, `before`, `text`, `after`.

    Raises:
        ArgumentError: neither or both of text and token; an empty text; a text, while the store keeps no tokenizer; a
            number below 0.
        CorruptError: tokens or sequences are damaged.
    """
    if (text is None) == (token is None) or text == "":
        raise ArgumentError("find takes a text that is not empty, or token=, the id of one: exactly one of them")
    words = words or Words(store)
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
    store: Store, words: Words, needle: Any, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Give, piece by piece, its first position, the tokens in which matches begin, and how many each touches."""
    ends = np.asarray(store.sequences)[:, 1]
    while start < stop:
        # A piece ends where a sequence ends, so that no match is cut; or, of a longer one, where it must.
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


def _in_text(words: Words, tokens: np.ndarray, needle: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find a text in tokens: in which token each match begins, and how many it touches."""
    table, starts = words.table
    known = (tokens >= 0) & (tokens < words.size)
    ids = np.where(known, tokens, 0)
    lengths = np.where(known, starts[ids + 1] - starts[ids], 0)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    # Each byte's place in the table: its token's first byte, and how far behind that it is.
    whole = table[np.repeat(starts[ids] - edges[:-1], lengths) + np.arange(edges[-1])].tobytes()
    found, at = [], whole.find(needle)
    while at >= 0:
        found.append(at)
        at = whole.find(needle, at + 1)
    places = np.array(found, np.int64)
    first = np.searchsorted(edges, places, side="right") - 1
    last = np.searchsorted(edges, places + len(needle) - 1, side="right") - 1
    # Not across the end of a sequence.
    within = np.searchsorted(ends, first, side="right") == np.searchsorted(ends, last, side="right")
    return first[within], (last - first + 1)[within]


def _place(store: Store, words: Words, position: int, width: int, context: int) -> dict[str, Any]:
    place = store.locate(position)
    said = surroundings(store, position, context, words, width)
    return {"position": position, "tokens": width, "sequence": place.sequence, "offset": place.offset, **said}
