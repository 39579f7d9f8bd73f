"""The order of an epoch: which kept token comes at which place. A function of its place, so that nothing is kept.

`"global"` is a permutation of all tokens. `"block"` is for disks that hate random reads: blocks of consecutive tokens
come in random order, and each few of them are a pool, within which every token has a random place. Reading a pool is
reading its blocks, in long pieces, once an epoch; while it lasts it is in memory. For several machines the blocks are
dealt out (`lanes`), and each has pools of its own. None is the order of the text.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.training.lanes import Lanes
from mmcache.training.permutation import Permutation, mixed

__all__ = ["BlockOrder", "Blocks", "Order", "block_geometry", "order_of"]

# A piece that is read from disk in one go: about where disks reach their full rate.
_PIECE_BYTES = 8 << 20
# With fewer blocks in it, a pool would mix too few places of the text.
_LEAST_BLOCKS = 8
# Keys apart from each other.
_TOKENS, _BLOCKS, _POOL = 1, 2, 3


class Blocks(NamedTuple):
    """The geometry of a block shuffle: tokens a block, a power of two, and blocks a pool."""

    tokens: int
    pool: int


def block_geometry(piece_bytes: int, token_bytes: int, buffer_bytes: int) -> Blocks:
    """Choose blocks and pools, from what is asked and nothing of the machine, since the order depends on them.

    Args:
        piece_bytes: what one more token adds to a contiguous piece on disk, in the widest site.
        token_bytes: what one token takes in memory while its pool lasts, all sites and layers together.
        buffer_bytes: what a pool may take.

    Raises:
        ArgumentError: not even one token fits.
    """
    tokens = buffer_bytes // token_bytes
    if tokens < 1:
        raise ArgumentError(f"buffer_bytes is {buffer_bytes}: expected at least the {token_bytes} bytes of one token")
    block = 1 << max(0, min(_PIECE_BYTES // piece_bytes, tokens // _LEAST_BLOCKS).bit_length() - 1)
    return Blocks(block, tokens // block)


class Order(Protocol):
    """The order of one epoch."""

    @property
    def quality(self) -> float:
        """How far apart two neighbours in the text end up on average, 1.0 being that of a uniform shuffle."""

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Give the kept indices that come at the places from `start` to before `stop`: `[stop - start]` int64."""


class _TextOrder:
    """As in the text."""

    def __init__(self, tokens: int) -> None:
        # Neighbours stay 1 apart; in a uniform shuffle they are (tokens + 1) / 3 apart on average.
        self.quality = min(1.0, 3 / (tokens + 1))

    def indices(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.int64)


class _GlobalOrder:
    """Any token anywhere."""

    quality = 1.0

    def __init__(self, tokens: int, seed: int, epoch: int) -> None:
        self._permutation = Permutation(tokens, mixed(seed, epoch, _TOKENS))

    def indices(self, start: int, stop: int) -> np.ndarray:
        return self._permutation.forward(np.arange(start, stop))


class BlockOrder:
    """Blocks in random order, and a pool's tokens in random order. All of it is arithmetic: nothing is stored.

    Places are those of the line that is cut into lanes. The last block may be short: the places behind it are moved up
    by what it lacks. No pool is of two lanes; a block may be, and is in a pool of each then.
    """

    def __init__(self, tokens: int, blocks: Blocks, seed: int, epoch: int, lanes: int = 1) -> None:
        self._tokens, self._blocks = tokens, blocks
        self._seed, self._epoch = seed, epoch
        self._count = -(-tokens // blocks.tokens)
        self._order = Permutation(self._count, mixed(seed, epoch, _BLOCKS))
        self._lacking = self._count * blocks.tokens - tokens
        # Where the short block stands, and where it ends; without one, nothing is moved.
        self._short = int(self._order.inverse(np.array([self._count - 1]))[0])
        self._end = (self._short + 1) * blocks.tokens - self._lacking
        self.lanes = Lanes(tokens, lanes)
        # Pools are numbered through lane by lane, by as many as the lane with the most blocks may have.
        self._in_lane = max(self._pools_of(lane) for lane in range(lanes))

    @property
    def pool_tokens(self) -> int:
        """How many tokens a pool has."""
        return min(self._blocks.tokens * self._blocks.pool, self._tokens)

    def _begin(self, turn: int) -> int:
        """Give the place where the block begins that has this turn; behind the last turn, the end of the epoch."""
        return turn * self._blocks.tokens - (self._lacking if turn > self._short else 0)

    def _turn(self, place: int) -> int:
        """Say which turn the block of a place has."""
        return (place + (self._lacking if place >= self._end else 0)) // self._blocks.tokens

    def _turns_of(self, lane: int) -> tuple[int, int]:
        """Give the turns of a lane's blocks: from which to before which."""
        return self._turn(self.lanes.begin(lane)), self._turn(self.lanes.begin(lane + 1) - 1) + 1

    def _pools_of(self, lane: int) -> int:
        first, last = self._turns_of(lane)
        return -(-(last - first) // self._blocks.pool)

    def _turns(self, pool: int) -> tuple[int, int]:
        """Give the turns of a pool's blocks: from which to before which."""
        lane, number = divmod(pool, self._in_lane)
        first, last = self._turns_of(lane)
        first += number * self._blocks.pool
        return first, min(first + self._blocks.pool, last)

    def _edges(self, pool: int) -> tuple[int, int]:
        """Give the places of a pool: from which to before which."""
        lane = pool // self._in_lane
        first, last = self._turns(pool)
        return max(self._begin(first), self.lanes.begin(lane)), min(self._begin(last), self.lanes.begin(lane + 1))

    def pool(self, place: int) -> int:
        """Say which pool a place is in."""
        lane = self.lanes.lane(place)
        return lane * self._in_lane + (self._turn(place) - self._turns_of(lane)[0]) // self._blocks.pool

    def next_pool(self, pool: int) -> int | None:
        """Give the pool that follows in the same lane, if there is one."""
        lane, number = divmod(pool, self._in_lane)
        return pool + 1 if number + 1 < self._pools_of(lane) else None

    @property
    def quality(self) -> float:
        """The sum of lanes * (pool / tokens)² over all pools: within one, neighbours are a third of it apart.

        That is in its lane, and as many times further in the epoch as there are lanes. Those that the border of a block
        parts are as far from each other as in a uniform shuffle.
        """
        squares, usual = 0, self._blocks.tokens * self._blocks.pool
        for lane in range(self.lanes.count):
            first, count = lane * self._in_lane, self._pools_of(lane)
            special = {first, first + count - 1}
            if self.lanes.begin(lane) < self._end <= self.lanes.begin(lane + 1):
                special.add(self.pool(self._end - 1))
            sizes = [stop - start for start, stop in map(self._edges, special)]
            squares += sum(size * size for size in sizes) + (count - len(special)) * usual * usual
        parted = (self._count - 1) / max(1, self._tokens - 1)
        return parted + (1 - parted) * squares * self.lanes.count / (self._tokens * self._tokens)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Give the kept indices that come at the places from `start` to before `stop`: `[stop - start]` int64."""
        parts = []
        while start < stop:
            pool = self.pool(start)
            begin, end = self._edges(pool)
            within = Permutation(end - begin, mixed(self._seed, self._epoch, _POOL, pool))
            until = min(stop, end)
            places = begin + within.forward(np.arange(start - begin, until - begin))
            places[places >= self._end] += self._lacking
            turns, inside = np.divmod(places, self._blocks.tokens)
            parts.append(self._order.forward(turns) * self._blocks.tokens + inside)
            start = until
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def blocks(self, pool: int) -> list[tuple[int, int]]:
        """List the blocks of a pool, as kept indices (start, stop), in the order of the text."""
        numbers = self._order.forward(np.arange(*self._turns(pool)))
        starts = np.sort(numbers) * self._blocks.tokens
        return [(start, min(start + self._blocks.tokens, self._tokens)) for start in starts.tolist()]


def order_of(shuffle: str | None, tokens: int, blocks: Blocks | None, seed: int, epoch: int, lanes: int = 1) -> Order:
    """Give the order of an epoch of `tokens` tokens, at least one; `blocks` and `lanes` are those of `"block"`."""
    if blocks is not None:
        return BlockOrder(tokens, blocks, seed, epoch, lanes)
    return _TextOrder(tokens) if shuffle is None else _GlobalOrder(tokens, seed, epoch)
