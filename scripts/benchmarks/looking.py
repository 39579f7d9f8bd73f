"""Looking into a terabyte: the time of the command, the first map and a zoom, and the bytes that they read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cold import make_cold
from benchmarks.huge import huge_store
from benchmarks.measure import Plan, Row, compare, in_turn, seconds
from mmcache.read.store import open_store
from mmcache.view import norms

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["looks"]


def _process(*arguments: str) -> float:
    """Time a separate process, in milliseconds."""
    return seconds(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)) * 1e3  # noqa: S603


def _read_bytes() -> int:
    """The bytes that this process has made the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def looks(plan: Plan) -> Iterator[Row]:
    """Look into a store of 10,000 sparse shards with statistics (`--quick`: 500)."""
    shards = 500 if plan.quick else 10_000
    path = huge_store(plan.folder / "huge", shards)
    files = [file for file in path.rglob("*") if file.is_file()]
    said = f"{shards:,} shards, {sum(file.stat().st_size for file in files) / 1e12:.2f} TB"

    def told() -> float:
        make_cold(path.rglob("zarr.json"), names=True)
        return _process("-m", "mmcache", "info", str(path))

    found = in_turn({"ours": told, "bare": partial(_process, "-c", "import zarr")}, plan.repeats)
    yield compare(
        "info", f"mmcache info, {said}", "python -c 'import zarr'", "ms", found["ours"], found["bare"], kind="self",
        limit=1000,
    )  # fmt: skip
    taken, read = [], []
    statistics = sum(file.stat().st_blocks * 512 for file in (path / "x").iterdir()) / 2**20
    for _ in range(plan.repeats):
        make_cold(files, names=True)
        before = _read_bytes()
        taken.append(seconds(lambda: norms(open_store(path, partial=True), "x")) * 1e3)
        read.append((_read_bytes() - before) / 2**20)
    store = open_store(path)
    whole = [seconds(lambda: norms(store, "x")) * 1e3 for _ in range(plan.repeats)]
    yield compare("map", f"norm map, cold, {said}", "the same, warm", "ms", taken, whole, kind="self", limit=2000)
    yield compare(
        "map, bytes read", "read for the norm map, cold", "all that is in the files", "MiB",
        [max(one, 0.01) for one in read], [statistics] * len(read), kind="self", limit=64,
    )  # fmt: skip
    dice = np.random.default_rng(0)
    zooms: list[float] = []
    for _ in range(max(plan.repeats, 20)):
        width = int(store.n_tokens / 10 ** dice.uniform(0.3, 5.5))
        start = int(dice.integers(0, store.n_tokens - width))
        norms(store, "x", start=start, stop=start + width)
        zooms.append(seconds(partial(norms, store, "x", start=start, stop=start + width)) * 1e3)
    yield compare(
        "zoom", "a zoom step, warm, the slowest of all", "the whole map, warm", "ms", [max(zooms)] * len(whole), whole,
        kind="self", limit=300,
    )  # fmt: skip
    shutil.rmtree(path)
