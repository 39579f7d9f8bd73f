"""Rows of the benchmark: two sides measured alternately, and the ratio of their speeds with its spread."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["Kind", "Plan", "Row", "Series", "Skip", "compare", "in_turn", "seconds"]

# What ours is compared with: the hardware or the bare operation, others' software, or ourselves in another case.
Kind = Literal["limit", "peer", "self"]


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is our speed over the other's: above 1 we are faster, whatever the unit.

    It is the median of the ratios of paired repeats, and `spread` their interquartile range. `goal` is the least that
    `ratio` should be; `limit`, if given, is the most that `ours` itself should be (or the least, for a rate).
    """

    name: str
    what: str
    beside: str
    kind: Kind
    unit: str
    ours: float
    theirs: float
    ratio: float
    spread: float
    goal: float | None = None
    limit: float | None = None
    all_ours: tuple[float, ...] = ()
    all_theirs: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the goals are met; None if there are none."""
        if self.goal is None and self.limit is None:
            return None
        rate = _is_rate(self.unit)
        within = self.limit is None or (self.ours >= self.limit if rate else self.ours <= self.limit)
        return within and (self.goal is None or self.ratio >= self.goal)


@dataclass(frozen=True)
class Skip:
    """A comparison that was not made, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Series:
    """How a cost grows: `values[line][i]` in `unit` at `xs[i]` of `axis`."""

    name: str
    axis: str
    unit: str
    xs: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where.

    `size` is the bytes of the stores that are read; half as much is written. `peer_size` is what peers' loaders read.
    """

    folder: Path
    size: int
    repeats: int
    quick: bool = False
    tokens: int = 12288
    peer_size: int = 1 << 30
    saelens_python: str | None = None
    kept: dict[str, object] = field(default_factory=dict)


def _is_rate(unit: str) -> bool:
    return unit.endswith("/s") or unit == "share"


def seconds(work: Callable[[], object]) -> float:
    """The seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure every side once per turn, in alternating order, so that a slow phase affects all of them."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        order = list(sides)
        for name in order[::-1] if turn % 2 else order:
            gc.collect()
            found[name].append(sides[name]())
    return found


def compare(
    name: str,
    what: str,
    beside: str,
    unit: str,
    ours: list[float],
    theirs: list[float],
    *,
    kind: Kind = "limit",
    goal: float | None = None,
    limit: float | None = None,
) -> Row:
    """A row of paired repeats. For units that end in `/s`, and shares, more is better; all others are costs."""
    rate = _is_rate(unit)
    ratios = [a / b if rate else b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Row(
        name,
        what,
        beside,
        kind,
        unit,
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        high - low,
        goal,
        limit,
        tuple(ours),
        tuple(theirs),
    )
