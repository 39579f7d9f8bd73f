"""How many tokens a shard and an inner chunk hold. Arithmetic only.

A *row* is what a store keeps of one token: `d_model` numbers in the layer layout, `n_layers * d_model` in
the token layout. Sizes are bytes, counts are rows (tokens).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError
from mmcache.system.arguments import count
from mmcache.system.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["CHUNK_BYTES", "MOST_ROWS", "SHARD_BYTES", "inner_rows", "shard_rows"]

SHARD_BYTES = 256 << 20
CHUNK_BYTES = 4 << 20
# An explicit shard_tokens whose best inner chunk is below this is refused: readers would drown in chunks.
_USEFUL_CHUNK_BYTES = 1 << 20
# Below this many bytes an inner chunk costs more in its shard's index than it saves in padding: with 16
# bytes of index an inner chunk, 16 * 256 MiB / c + c is smallest at c = 64 KiB.
_SMALLEST_CHUNK_BYTES = 64 << 10
# No shard is ever that long; divisors of longer ones take too long to find.
MOST_ROWS = 1 << 40


# Asked for each shard that is named, always of the same few numbers.
@lru_cache(maxsize=64)
def _largest_divisor(number: int, limit: int) -> int:
    """Give the largest divisor of `number` that is at most `limit` (and at least 1)."""
    best = 1
    for small in range(1, math.isqrt(number) + 1):
        if number % small == 0:
            for divisor in (small, number // small):
                if best < divisor <= limit:
                    best = divisor
    return best


def _page_rows(row_bytes: int) -> int:
    """Give the fewest rows that fill whole pages: a power of two, at most 2,048 for elements of 2 bytes."""
    return PAGE // math.gcd(row_bytes, PAGE)


def inner_rows(shard: int, row_bytes: int, known: int | None) -> int:
    """Choose the rows of an inner chunk: the largest divisor of `shard` within 4 MiB and within `known`.

    Args:
        shard: rows a shard.
        row_bytes: bytes a row.
        known: rows known to come when the array is made, or None. A chunk never exceeds them, down to
            64 KiB, below which the index would outweigh the padding that is saved.
    """
    limit = max(1, CHUNK_BYTES // row_bytes)
    if known is not None and known < shard:
        limit = min(limit, max(known, _SMALLEST_CHUNK_BYTES // row_bytes, 1))
    return _largest_divisor(shard, limit)


def _is_good(shard: int, row_bytes: Collection[int]) -> bool:
    for row in row_bytes:
        if shard % _page_rows(row):
            return False
        chunk = inner_rows(shard, row, None)
        if chunk != shard and chunk * row < _USEFUL_CHUNK_BYTES:
            return False
    return True


def _only_shard(known: int, widest: int) -> int:
    """Choose the rows of a shard that holds all: one inner chunk where that is small, whole ones otherwise."""
    if known * widest <= CHUNK_BYTES:
        return max(known, 1)
    chunk = 1 << max(0, (CHUNK_BYTES // widest).bit_length() - 1)
    return -(-known // chunk) * chunk


def shard_rows(row_bytes: Collection[int], asked: int | None, known: int | None) -> int:
    """Choose the tokens a shard of all sites of a store, or check the number that was asked for.

    Args:
        row_bytes: bytes a row of each site.
        asked: the user's `shard_tokens`, or None for the default: the largest power of two that keeps the
            widest site's shard within 256 MiB, and fills whole pages in every site.
        known: tokens known to come, where nothing can follow them, or None. Where one shard holds them all
            it ends where they end.

    Raises:
        ArgumentError: `asked` is no count, does not fill whole pages, or has no useful divisor.
    """
    widest = max(row_bytes)
    if asked is None:
        default = 1 << max(0, (SHARD_BYTES // widest).bit_length() - 1)
        default = max(default, *(_page_rows(row) for row in row_bytes))
        if known is None or known > default:
            return default
        return _only_shard(known, widest)
    asked = count(1, MOST_ROWS)("shard_tokens", asked)
    if _is_good(asked, row_bytes):
        return asked
    if known is not None and known <= asked:
        # No other shard follows, so any number will do. Not as it stands: a prime is a chunk, and an entry
        # of the index, for each of its tokens.
        return _only_shard(known, widest)
    near = next(
        candidate
        for step in range(1, asked + 2048 * 2)
        for candidate in (asked - step, asked + step)
        if candidate > 0 and _is_good(candidate, row_bytes)
    )
    raise ArgumentError(
        f"shard_tokens is {asked}, whose rows of {' and '.join(str(row) for row in sorted(set(row_bytes)))} "
        f"bytes do not fill whole {PAGE}-byte pages with a useful inner chunk (a divisor near {CHUNK_BYTES} "
        f"bytes): the nearest good number is {near} (a power of two usually is one, 2048 always)"
    )
