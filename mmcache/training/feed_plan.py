"""What a training feed hands out in which order, and the state by which it goes on there. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from mmcache.errors import ArgumentError
from mmcache.training.lanes import Lanes
from mmcache.training.order import Blocks, Order, order_of
from mmcache.training.shares import Shares

__all__ = ["FeedPlan", "Position", "State"]

State: TypeAlias = "dict[str, int | str | None]"

_VERSION = 1
# Of more machines, some share a lane: each step looks at all of them.
_MOST_LANES = 1 << 16


class Position(NamedTuple):
    """Where a feed stands: `step` batches into a layout of the tokens of `epoch` from turn `start` on.

    The epoch goes on in as many lanes as it began with, however many machines there are by now.
    """

    epoch: int
    start: int
    step: int
    lanes: int


@dataclass(frozen=True)
class FeedPlan:
    """All that decides which token comes when.

    Attributes:
        seed: of the shuffle.
        tokens: how many take part; at least one.
        kept: the digest of which they are.
        shuffle: `"global"`, `"block"` or None.
        blocks: the geometry of `"block"`, else None.
        world_size, batch_size, drop_last: as `Shares`.
        nodes: how many machines the ranks are on.
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
        """Give the start of an epoch."""
        return Position(epoch, 0, 0, min(self.nodes, self._most_lanes))

    @property
    def _most_lanes(self) -> int:
        return min(self.tokens, _MOST_LANES) if self.blocks else 1

    def shares(self, start: int = 0) -> Shares:
        """Lay out the turns of an epoch from `start` on; the shares count from there."""
        return Shares(self.tokens - start, self.world_size, self.batch_size, self.drop_last)

    def places(self, position: Position, shares: Shares, rank: int) -> list[tuple[int, int]]:
        """Say which places of the order a rank takes at a step, as (start, stop), none empty; `shares` as laid out."""
        of_step = shares.seen(position.step), shares.seen(position.step + 1)
        turns = (position.start + turn for turn in (*of_step, *shares.share(position.step, rank)))
        return Lanes(self.tokens, position.lanes).pieces(*turns)

    def order(self, position: Position) -> Order:
        """Give the order of the epoch that a position is in."""
        return order_of(self.shuffle, self.tokens, self.blocks, self.seed, position.epoch, position.lanes)

    @property
    def _order_fields(self) -> State:
        """What another order would differ in."""
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
        """What another layout of the same order would differ in."""
        return {"world_size": self.world_size, "batch_size": self.batch_size, "drop_last": self.drop_last}

    def state(self, position: Position, workers: int = 1) -> State:
        """Write a position down. `workers`: it is one of so many workers', each of which has its own."""
        return {
            "version": _VERSION,
            **position._asdict(),
            "workers": workers,
            **self._order_fields,
            **self._layout_fields,
        }

    def position(self, state: Mapping[str, object], workers: int = 1) -> Position:
        """Read a position, in this process, which is one of `workers`; one of another layout is laid out anew.

        Then `start` is how many tokens all ranks had seen together, and what is left follows, each token once.

        Raises:
            ArgumentError: it is no state, of another order, or of one of several workers where that is not enough.
        """
        wanted = self.state(self.begin(0))
        if isinstance(state, Mapping):
            # Older ones know of one lane only.
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
        old = Shares(
            self.tokens - position.start, numbers["world_size"], numbers["batch_size"], bool(numbers["drop_last"])
        )
        return position._replace(start=position.start + old.seen(position.step), step=0)


def _count(name: str, value: object) -> int:
    least = 1 if name in ("workers", "world_size", "batch_size", "lanes") else 0
    if not isinstance(value, int) or value < least:
        raise ArgumentError(f"the state's {name} is {value!r}: expected a whole number, at least {least}")
    return int(value)
