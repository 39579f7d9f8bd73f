"""Which token comes at which step of an epoch, on which rank, and the state to resume from. Arithmetic only.

The order of an epoch says which kept token is at which place. It is a function of the place, so nothing is stored.
`"global"` is a permutation of all tokens. `"block"` is for disks that are slow at random reads: blocks of consecutive
tokens come in random order; every few successive ones are a pool, within which each token has a random place. A pool is
read once an epoch, block by block, in long pieces, and stays in memory until it is used up. None is the order of the
text.

For several machines, the line of blocks is cut into equal lanes (`MachineOrder`), each with its own pools, so that each
machine reads blocks of its own. An epoch takes one token of each lane in turn. So every step has equally many tokens of
each lane, whichever rank takes them, and the progress of an epoch stays one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.training.permutation import Permutation, mixed

__all__ = [
    "BlockOrder",
    "Blocks",
    "EpochSchedule",
    "MachineOrder",
    "Order",
    "Position",
    "RankShares",
    "State",
    "block_geometry",
    "order_of",
]


@dataclass(frozen=True)
class MachineOrder:
    """`tokens` places in a line, cut into `count` lanes whose lengths differ by at most one."""

    tokens: int
    count: int

    def begin(self, lane: int) -> int:
        """The first place of a lane; for `lane == count`, the end of the line."""
        each, more = divmod(self.tokens, self.count)
        return lane * each + min(lane, more)

    def lane(self, place: int) -> int:
        """The lane of a place."""
        each, more = divmod(self.tokens, self.count)
        longer = more * (each + 1)
        return place // (each + 1) if place < longer else more + (place - longer) // each

    def _passed(self, lane: int, turn: int) -> int:
        """The number of a lane's tokens before a turn of the epoch."""
        return (turn - lane + self.count - 1) // self.count

    def pieces(self, begin: int, end: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The places of the line in a share of a step, as (start, stop), each in one lane, none empty.

        The turns of a step, from `begin` to before `end`, are sorted by lane; the share is those from `start` to before
        `stop`. So if all machines have equally many ranks, each rank stays in its machine's lane.
        """
        found, at = [], begin
        for lane in range(self.count):
            first, last = self._passed(lane, begin), self._passed(lane, end)
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                place = self.begin(lane) + first - at
                found.append((place + low, place + high))
            at += last - first
        return found


# Bytes of a contiguous read: about where disks reach their full rate.
_PIECE_BYTES = 8 << 20
# The least blocks of a pool: fewer would mix too few parts of the text.
_LEAST_BLOCKS = 8
# Distinct keys for the permutations.
_TOKENS, _BLOCKS, _POOL = 1, 2, 3


class Blocks(NamedTuple):
    """The geometry of a block shuffle: tokens per block (a power of two), and blocks per pool."""

    tokens: int
    pool: int


def block_geometry(piece_bytes: int, token_bytes: int, buffer_bytes: int) -> Blocks:
    """Choose the size of blocks and pools. Depends only on the arguments, not on the machine: it determines the order.

    Args:
        piece_bytes: bytes that a token adds to a contiguous piece on disk, in the widest site.
        token_bytes: bytes of a token in memory, all sites and layers together.
        buffer_bytes: the most bytes of a pool.

    Raises:
        ArgumentError: no token fits.
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
        """The average distance of two neighbours in the text, relative to a uniform shuffle (1.0)."""

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The kept indices at the places from `start` to before `stop`: `[stop - start]` int64."""


class _TextOrder:
    """The order of the text."""

    def __init__(self, tokens: int) -> None:
        # Neighbours stay 1 apart; in a uniform shuffle they are (tokens + 1) / 3 apart on average.
        self.quality = min(1.0, 3 / (tokens + 1))

    def indices(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.int64)


class _GlobalOrder:
    """A uniform shuffle of all tokens."""

    quality = 1.0

    def __init__(self, tokens: int, seed: int, epoch: int) -> None:
        self._permutation = Permutation(tokens, mixed(seed, epoch, _TOKENS))

    def indices(self, start: int, stop: int) -> np.ndarray:
        return self._permutation.forward(np.arange(start, stop))


class BlockOrder:
    """Blocks in random order, and each pool's tokens in random order. Computed, not stored.

    Places are those of the line that is cut into lanes; a block's turn is its index in the random order. The text's
    last block may be short: the places after it move up by the tokens it lacks. A pool is never in two lanes; a block
    may be, and then belongs to a pool of each.
    """

    def __init__(self, tokens: int, blocks: Blocks, seed: int, epoch: int, lanes: int = 1) -> None:
        self._tokens, self._blocks = tokens, blocks
        self._seed, self._epoch = seed, epoch
        self._count = -(-tokens // blocks.tokens)
        self._order = Permutation(self._count, mixed(seed, epoch, _BLOCKS))
        self._lacking = self._count * blocks.tokens - tokens
        # The short block's turn, and the place where it ends; without a short block, nothing moves.
        self._short = int(self._order.inverse(np.array([self._count - 1]))[0])
        self._end = (self._short + 1) * blocks.tokens - self._lacking
        self.lanes = MachineOrder(tokens, lanes)
        # Pools are numbered lane by lane, with as many numbers per lane as the longest lane needs.
        self._in_lane = max(self._pools_of(lane) for lane in range(lanes))

    @property
    def pool_tokens(self) -> int:
        """The number of tokens of a full pool."""
        return min(self._blocks.tokens * self._blocks.pool, self._tokens)

    def _begin(self, turn: int) -> int:
        """The first place of the block with this turn; after the last turn, the end of the epoch."""
        return turn * self._blocks.tokens - (self._lacking if turn > self._short else 0)

    def _turn(self, place: int) -> int:
        """The turn of a place's block."""
        return (place + (self._lacking if place >= self._end else 0)) // self._blocks.tokens

    def _turns_of(self, lane: int) -> tuple[int, int]:
        """The turns of a lane's blocks, as (start, stop)."""
        return self._turn(self.lanes.begin(lane)), self._turn(self.lanes.begin(lane + 1) - 1) + 1

    def _pools_of(self, lane: int) -> int:
        first, last = self._turns_of(lane)
        return -(-(last - first) // self._blocks.pool)

    def _turns(self, pool: int) -> tuple[int, int]:
        """The turns of a pool's blocks, as (start, stop)."""
        lane, number = divmod(pool, self._in_lane)
        first, last = self._turns_of(lane)
        first += number * self._blocks.pool
        return first, min(first + self._blocks.pool, last)

    def _edges(self, pool: int) -> tuple[int, int]:
        """The places of a pool, as (start, stop)."""
        lane = pool // self._in_lane
        first, last = self._turns(pool)
        return max(self._begin(first), self.lanes.begin(lane)), min(self._begin(last), self.lanes.begin(lane + 1))

    def pool(self, place: int) -> int:
        """The pool of a place."""
        lane = self.lanes.lane(place)
        return lane * self._in_lane + (self._turn(place) - self._turns_of(lane)[0]) // self._blocks.pool

    def next_pool(self, pool: int) -> int | None:
        """The next pool in the same lane, or None."""
        lane, number = divmod(pool, self._in_lane)
        return pool + 1 if number + 1 < self._pools_of(lane) else None

    @property
    def quality(self) -> float:
        """The sum of lanes * (pool / tokens)² over all pools, corrected for neighbours in different blocks.

        Within a pool, neighbours are on average a third of its size apart in the lane, and `lanes` times as far in the
        epoch. Neighbours in different blocks are as far apart as in a uniform shuffle.
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
        """The kept indices at the places from `start` to before `stop`: `[stop - start]` int64."""
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
        """The blocks of a pool, as kept indices (start, stop), in the order of the text."""
        numbers = self._order.forward(np.arange(*self._turns(pool)))
        starts = np.sort(numbers) * self._blocks.tokens
        return [(start, min(start + self._blocks.tokens, self._tokens)) for start in starts.tolist()]


def order_of(shuffle: str | None, tokens: int, blocks: Blocks | None, seed: int, epoch: int, lanes: int = 1) -> Order:
    """The order of an epoch of `tokens` tokens, at least one; `blocks` and `lanes` are for `"block"`."""
    if blocks is not None:
        return BlockOrder(tokens, blocks, seed, epoch, lanes)
    return _TextOrder(tokens) if shuffle is None else _GlobalOrder(tokens, seed, epoch)


@dataclass(frozen=True)
class RankShares:
    """How `tokens` turns of an epoch, one token each, are divided among the ranks.

    A full step is one batch for each rank, side by side. The rest at the end, less than a full step, is shared evenly:
    ranks differ by at most one token. If the rest has fewer tokens than ranks, it is shared together with the last full
    step, over two steps. A rank's last batch is empty only if there are fewer tokens than ranks, or if `batch_size` is
    1. With `drop_last` there are only full steps.
    """

    tokens: int
    world_size: int
    batch_size: int
    drop_last: bool

    @cached_property
    def _edges(self) -> tuple[int, list[int]]:
        """The number of plain full steps, and the turns at which the steps after them end."""
        step = self.world_size * self.batch_size
        full, rest = divmod(self.tokens, step)
        if self.drop_last or not rest:
            return full, []
        if rest < self.world_size and full and self.batch_size > 1:
            first = (full - 1) * step
            return full - 1, [first + (step + rest + 1) // 2, self.tokens]
        return full, [self.tokens]

    def __len__(self) -> int:
        full, ends = self._edges
        return full + len(ends)

    def seen(self, step: int) -> int:
        """The number of tokens that all ranks together have seen after `step` steps; after the last step, all."""
        full, ends = self._edges
        if step <= full:
            return step * self.world_size * self.batch_size
        return ([full * self.world_size * self.batch_size, *ends])[min(step - full, len(ends))]

    def share(self, step: int, rank: int) -> tuple[int, int]:
        """The turns that a rank takes at a step: from `start` to before `stop`."""
        begin = self.seen(step)
        each, more = divmod(self.seen(step + 1) - begin, self.world_size)
        start = begin + rank * each + min(rank, more)
        return start, start + each + (rank < more)


State: TypeAlias = "dict[str, int | str | None]"

_VERSION = 1
# With more machines, some share a lane: each step iterates over all lanes.
_MOST_LANES = 1 << 16


class Position(NamedTuple):
    """The position of a feed: `step` batches into the layout of the tokens of `epoch` from turn `start` on.

    An epoch keeps the number of lanes that it began with, even if the number of machines changes.
    """

    epoch: int
    start: int
    step: int
    lanes: int


@dataclass(frozen=True)
class EpochSchedule:
    """All that determines which token comes when.

    Attributes:
        seed: of the shuffle.
        tokens: the number of kept tokens; at least one.
        kept: `KeptTokens.digest`.
        shuffle: `"global"`, `"block"` or None.
        blocks: the geometry of `"block"`, else None.
        world_size, batch_size, drop_last: as `RankShares`.
        nodes: the number of machines that the ranks are on.
    """

    seed: int
    tokens: int
    kept: int
    shuffle: str | None
    blocks: Blocks | None
    world_size: int
    batch_size: int
    drop_last: bool
    nodes: int = 1

    def begin(self, epoch: int) -> Position:
        """The position at the start of an epoch."""
        return Position(epoch, 0, 0, min(self.nodes, self._most_lanes))

    @property
    def _most_lanes(self) -> int:
        return min(self.tokens, _MOST_LANES) if self.blocks else 1

    def shares(self, start: int = 0) -> RankShares:
        """The shares of an epoch's turns from `start` on; they count from there."""
        return RankShares(self.tokens - start, self.world_size, self.batch_size, self.drop_last)

    def places(self, position: Position, shares: RankShares, rank: int) -> list[tuple[int, int]]:
        """The places of the order that a rank takes at a step, as (start, stop), none empty."""
        of_step = shares.seen(position.step), shares.seen(position.step + 1)
        turns = (position.start + turn for turn in (*of_step, *shares.share(position.step, rank)))
        return MachineOrder(self.tokens, position.lanes).pieces(*turns)

    def order(self, position: Position) -> Order:
        """The order of a position's epoch."""
        return order_of(self.shuffle, self.tokens, self.blocks, self.seed, position.epoch, position.lanes)

    @property
    def _order_fields(self) -> State:
        """The fields of a state that determine the order."""
        block, pool = self.blocks or (0, 0)
        return {
            "seed": self.seed,
            "tokens": self.tokens,
            "kept": self.kept,
            "shuffle": self.shuffle,
            "block_tokens": block,
            "pool_blocks": pool,
        }

    @property
    def _layout_fields(self) -> State:
        """The fields of a state that determine the layout of an order."""
        return {"world_size": self.world_size, "batch_size": self.batch_size, "drop_last": self.drop_last}

    def state(self, position: Position, workers: int = 1) -> State:
        """The state of a position. `workers`: the number of workers, each of which has its own state."""
        return {
            "version": _VERSION,
            **position._asdict(),
            "workers": workers,
            **self._order_fields,
            **self._layout_fields,
        }

    def position(self, state: Mapping[str, object], workers: int = 1) -> Position:
        """The position of a state, for this process, which is one of `workers`.

        If the state is of another layout, `start` becomes the number of tokens that all ranks had seen together, and
        the rest is laid out anew, each token once.

        Raises:
            ArgumentError: not a state, of another order, or of one of several workers where all would be needed.
        """
        wanted = self.state(self.begin(0))
        if isinstance(state, Mapping):
            # Older states have one lane.
            state = {"lanes": 1, **state}
        missing = [name for name in wanted if name not in state] if isinstance(state, Mapping) else list(wanted)
        if missing:
            raise ArgumentError(f"the state lacks {', '.join(missing)}: expected what state_dict() or batch.state gave")
        found: dict[str, object] = {name: state[name] for name in wanted}
        if found["version"] != _VERSION:
            raise ArgumentError(f"the state has version {found['version']!r}: this mmcache reads version {_VERSION}")
        differ = [
            f"{name} is {found[name]!r}, here {value!r}"
            for name, value in self._order_fields.items()
            if found[name] != value
        ]
        if differ:
            raise ArgumentError(
                f"the state is of another order: {'; '.join(differ)}. Make the dataset as it was when the state was "
                f"taken: the same store, drop, split, shuffle, seed and, for blocks, sites, layers and buffer_bytes"
            )
        numbers = {name: _count(name, found[name]) for name in (*Position._fields, "workers", *self._layout_fields)}
        position = Position(*(numbers[name] for name in Position._fields))
        if position.start > self.tokens:
            raise ArgumentError(f"the state's start is {position.start}: expected at most the {self.tokens} tokens")
        if position.lanes > self._most_lanes:
            raise ArgumentError(f"the state's lanes is {position.lanes}: expected at most {self._most_lanes}")
        same = all(found[name] == value for name, value in self._layout_fields.items())
        if numbers["workers"] not in (1, workers) or (numbers["workers"] > 1 and not same):
            raise ArgumentError(
                f"the state is that of one of {numbers['workers']} DataLoader workers, which says nothing of the "
                f"others: for another number of workers, world_size, batch_size or drop_last, load the `state` of the "
                f"last batch, in the main process"
            )
        if same:
            return position
        old = RankShares(
            self.tokens - position.start, numbers["world_size"], numbers["batch_size"], bool(numbers["drop_last"])
        )
        return position._replace(start=position.start + old.seen(position.step), step=0)


def _count(name: str, value: object) -> int:
    least = 1 if name in ("workers", "world_size", "batch_size", "lanes") else 0
    if not isinstance(value, int) or value < least:
        raise ArgumentError(f"the state's {name} is {value!r}: expected a whole number, at least {least}")
    return int(value)
