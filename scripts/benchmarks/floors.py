"""The lowest acceptable ratio of each benchmark row, recorded from earlier runs, and the check against it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row

__all__ = ["check", "record"]


def _read(path: Path) -> dict[str, dict[str, float]]:
    floors: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return floors


def record(path: Path, mode: str, rows: Sequence[Row]) -> None:
    """Record each row's ratio, less its spread, as its floor in that mode; other rows' floors stay.

    A row that was measured only once has no spread, and gets no floor.
    """
    floors = _read(path)
    found = {row.name: float(f"{max(0.0, row.ratio - row.spread):.3g}") for row in rows if len(row.all_ours) > 1}
    floors[mode] = dict(sorted((floors.get(mode, {}) | found).items()))
    path.write_text(json.dumps(dict(sorted(floors.items())), indent=2) + "\n")


def check(path: Path, mode: str, rows: Sequence[Row]) -> list[str]:
    """The rows that are below their floor by more than their spread. A row without a floor passes."""
    floors = _read(path).get(mode, {})
    return [
        f"slower: {row.name} is {row.ratio:.3g} (spread {row.spread:.2g}), its floor {floors[row.name]:.3g}"
        for row in rows
        if row.name in floors and row.ratio + row.spread < floors[row.name]
    ]
