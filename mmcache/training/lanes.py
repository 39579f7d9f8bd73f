"""How the order of a block shuffle is dealt to several machines, so that each of them reads blocks of its own.

The line of blocks is cut into equal lanes, and an epoch takes one token of each in turn. So every step has equally many
tokens of each lane, whoever takes them, and how far an epoch has come stays one number.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Lanes"]


@dataclass(frozen=True)
class Lanes:
    """`tokens` places in a line, cut into `count` lanes whose lengths differ by one at most. Arithmetic only."""

    tokens: int
    count: int

    def begin(self, lane: int) -> int:
        """Give the place where a lane begins; that behind the last one is the end of the line."""
        each, more = divmod(self.tokens, self.count)
        return lane * each + min(lane, more)

    def lane(self, place: int) -> int:
        """Say in which lane a place is."""
        each, more = divmod(self.tokens, self.count)
        longer = more * (each + 1)
        return place // (each + 1) if place < longer else more + (place - longer) // each

    def _passed(self, lane: int, turn: int) -> int:
        """Count the tokens of a lane that come before a turn of the epoch."""
        return (turn - lane + self.count - 1) // self.count

    def pieces(self, begin: int, end: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Say which places of the line a share of a step has, as (start, stop), each in one lane, none empty.

        The turns of a step, from `begin` to before `end`, are dealt lane by lane, and the share is those from `start`
        to before `stop` of them. So ranks of which as many are on every machine keep to the lane of theirs.
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
