"""Who takes which tokens of an epoch at which step: equal numbers of batches for all ranks, every token once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["Shares"]


@dataclass(frozen=True)
class Shares:
    """How `tokens` turns of an epoch, each of which is a token's, are laid out over the ranks. Arithmetic only.

    A full step is one batch for each rank, side by side. What is left for the end, fewer tokens than a full step has,
    is shared evenly, so that no two ranks differ by more than one token. Where it would not be one token for each, the
    last full step is shared together with it, over two steps. Only where there are not as many tokens at all is a
    rank's last batch empty. With `drop_last` there are full steps only.
    """

    tokens: int
    world_size: int
    batch_size: int
    drop_last: bool

    @cached_property
    def _edges(self) -> tuple[int, list[int]]:
        """Count the plain full steps, and say where each step behind them ends."""
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
        """Count the tokens that all ranks together have seen after `step` steps; more steps than there are see all."""
        full, ends = self._edges
        if step <= full:
            return step * self.world_size * self.batch_size
        return ([full * self.world_size * self.batch_size, *ends])[min(step - full, len(ends))]

    def share(self, step: int, rank: int) -> tuple[int, int]:
        """Say which turns a rank takes at a step, of those that are dealt then: from `start` to before `stop`."""
        begin = self.seen(step)
        each, more = divmod(self.seen(step + 1) - begin, self.world_size)
        start = begin + rank * each + min(rank, more)
        return start, start + each + (rank < more)
