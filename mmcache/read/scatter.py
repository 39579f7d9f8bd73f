"""What is wanted of shards, in pieces of one size: sorted by shard, made into requests, put in place as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmcache.system.direct_io import alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Part", "begins_of", "parts_of", "scatter"]

# So much that nobody asked for is read rather than asking twice.
_GAP_BYTES = 128 << 10


class Part(NamedTuple):
    """What is wanted of one shard.

    Rows of it, int64 `[n]` ascending, and their places among all that are asked for; the slots, and their columns.
    """

    shard: tuple[int, int]
    rows: np.ndarray
    places: np.ndarray
    slots: list[int]
    columns: list[int]


def parts_of(positions: np.ndarray, slots: list[int], shard_rows: int, *, by_layer: bool) -> Iterator[Part]:
    """Sort what is wanted by shard; in the layer layout each slot has shards of its own.

    Args:
        positions: tokens, int64 `[k]`, in any order.
        slots: the layers of each that are wanted.
        shard_rows: rows a shard.
        by_layer: whether it is the layer layout.
    """
    order = np.argsort(positions, kind="stable")
    blocks, within = np.divmod(positions[order], shard_rows)
    for start, stop in alike(blocks):
        block, rows, places = int(blocks[start]), within[start:stop], order[start:stop]
        if not by_layer:
            yield Part((0, block), rows, places, slots, list(range(len(slots))))
            continue
        for column, slot in enumerate(slots):
            yield Part((slot, block), rows, places, [slot], [column])


def begins_of(offsets: np.ndarray, size: int, most: int) -> np.ndarray:
    """Say where requests of about `most` bytes begin in pieces of `size` bytes at ascending offsets `[n]`: int64."""
    far = np.diff(offsets) - size > _GAP_BYTES
    begins = np.concatenate([[True], far])
    first = offsets[np.maximum.accumulate(np.where(begins, np.arange(len(offsets)), 0))]
    # One that became too long is cut at even distances from its begin.
    begins[1:] |= np.diff((offsets - first) // max(size, most)) != 0
    return np.flatnonzero(begins)


def scatter(stream: Iterable[memoryview], at: int, into: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> None:
    """Put pieces of a stream in their places as they come.

    Args:
        stream: bytes of a shard; let go of behind the last piece.
        at: the offset of the first of them.
        into: `[m, size]` uint8.
        offsets: of the pieces, `[n]` ascending, whole numbers of `size` apart.
        places: where they go.
    """
    size, done, rest = into.shape[1], 0, b""
    units = (offsets - offsets[0]) // size
    skip, unit = int(offsets[0]) - at, 0
    for data in stream:
        skipped = min(skip, len(data))
        skip -= skipped
        body = np.frombuffer(data, np.uint8)[skipped:]
        if rest:
            # One that came in two.
            missing = size - len(rest)
            rest, body = rest + body[:missing].tobytes(), body[missing:]
            if len(rest) < size:
                continue
            done = _put(np.frombuffer(rest, np.uint8)[None], unit, units, into, places, done)
            unit += 1
        whole = len(body) // size
        done = _put(body[: whole * size].reshape(whole, size), unit, units, into, places, done)
        unit, rest = unit + whole, body[whole * size :].tobytes()
        if done == len(units):
            return


def _put(body: np.ndarray, unit: int, units: np.ndarray, into: np.ndarray, places: np.ndarray, done: int) -> int:
    """Put those of the pieces `[n, size]`, of which the first is `unit`, that are wanted; give how many are done."""
    stop = int(np.searchsorted(units, unit + len(body)))
    there, to = units[done:stop] - unit, places[done:stop]
    if stop > done:
        if _follow(there) and _follow(to):
            into[to[0] : to[-1] + 1] = body[there[0] : there[-1] + 1]
        else:
            into[to] = body[there]
    return stop


def _follow(numbers: np.ndarray) -> bool:
    """Tell whether each of some numbers is the one behind that before it."""
    return bool((np.diff(numbers) == 1).all())
