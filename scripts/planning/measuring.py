"""Measure the constants of a plan on this machine, in about a minute."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from benchmarks.huge import huge_store
from benchmarks.limits import aligned, memcpy, random_reads, raw_write
from benchmarks.measure import seconds

from mmcache.extraction.scheduling import BlockScheduler
from mmcache.read.store import open_store
from mmcache.stats.site_statistics import merge_site
from mmcache.storage.listing import count_shards
from mmcache.system.launcher import Rank
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.shard_writer import ShardWriter
from planning.figures import Figure, Figures

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcache.format.manifest import Manifest

__all__ = ["digest_rate", "measured"]

_NAMES = 100_000
_BYTES = 1 << 30
_MERGED = 64
# Bytes in a slot of the staging ring, and bytes digested in one measurement.
_STAGED, _DIGESTED = 16 << 20, 128 << 20


def measured(folder: Path, manifest: Manifest, tell: Callable[[str], None]) -> Figures:
    """Measure on a folder's disk, with the records and names of a plan; leaves no files."""
    scratch = Path(tempfile.mkdtemp(prefix="mmcache-plan-", dir=folder))
    found: Figures = {}

    def note(name: str, value: float, unit: str) -> None:
        found[name] = Figure(value, unit, "measured now")
        tell(f"{name}: {value:,.4g} {unit}")

    try:
        note("copy", memcpy(4 * _BYTES, 16 << 20), "bytes/s")
        note("digest", digest_rate(scratch, manifest), "bytes/s")
        _disk(scratch, manifest.widest_row(), note)
        _names(scratch, manifest, note)
        _merge(scratch, manifest, note)
    finally:
        shutil.rmtree(scratch)
    return found


def _disk(scratch: Path, record: int, note: Callable[[str, float, str], None]) -> None:
    note("disk write", raw_write(scratch, _BYTES) * 1e9, "bytes/s")
    path = scratch / "read"
    block = aligned(8 << 20)
    block[:] = np.random.default_rng(0).integers(0, 255, len(block), dtype=np.uint8)
    with path.open("wb", buffering=0) as file:
        for _ in range(_BYTES // len(block)):
            file.write(block.data)
        os.fsync(file.fileno())
    # Whole sectors, and enough of them to take about a second.
    size = min(max(512, record // 512 * 512), 8 << 20)
    note("disk read", random_reads([path], size, max(64, min(20_000, _BYTES // size))), "bytes/s")
    path.unlink()


def digest_rate(scratch: Path, manifest: Manifest, repeats: int = 3) -> float:
    """Digest rows of a plan as a worker does, checksums and statistics, on one thread: bytes/s."""
    spec = manifest.spec(next(iter(manifest.sites)))
    rows = max(1, min(_STAGED // spec.row_bytes, spec.shard_rows))
    numbers = torch.randn(rows * spec.row_bytes // spec.dtype.size).to(spec.dtype.torch)
    data = numbers.view(torch.uint8).numpy()
    rates = []
    for _ in range(repeats):
        done, taken = 0, 0.0
        while done < _DIGESTED:
            shard = ShardWriter(
                scratch, "digest", spec, {}, 0, rows=None, policy=PageCachePolicy(busy=True), durable=False
            )
            began = time.perf_counter()
            for _ in range(spec.shard_rows // rows):
                shard.digest(data, None, [])
                done += len(data)
                if done >= _DIGESTED:
                    break
            taken += time.perf_counter() - began
            shard.discard()
        rates.append(done / taken)
    return statistics.median(rates)


def _names(scratch: Path, manifest: Manifest, note: Callable[[str, float, str], None]) -> None:
    """Time the listing of real empty files with shards' names."""
    site = next(iter(manifest.sites))
    # Only half of the shards exist: a worker does not list a complete site.
    total = 2 * _NAMES
    one = replace(manifest, sites={site: manifest.sites[site]}, n_tokens=total, layout="token").with_geometry(1, total)
    folder = scratch / "names" / site
    folder.mkdir(parents=True)
    for block in range(_NAMES):
        os.close(os.open(folder / one.shard_key(site, block), os.O_CREAT | os.O_WRONLY))
    path = scratch / "names"
    listed = min(seconds(lambda: count_shards(path, one, site, total)) for _ in range(3))
    note("list", _NAMES / listed, "names/s")
    turns = BlockScheduler(path, one, Rank(0, 2))
    note("look", _NAMES / min(seconds(turns.look) for _ in range(3)), "names/s")


def _merge(scratch: Path, manifest: Manifest, note: Callable[[str, float, str], None]) -> None:
    """Time the merge of some shards' statistics, of the plan's shape, in sparse files."""
    site = next(iter(manifest.sites))
    width, deep = manifest.sites[site] or 1, len(manifest.layers)
    shard = min(manifest.shard_tokens or 1, 1 << 20)
    path = huge_store(
        scratch / "merge", _MERGED, layers=deep, d_model=width, shard_tokens=max(1, shard // 2048) * 2048, tokens=False
    )
    with open_store(path) as store:
        folder = store.shards("x")
        # The first merge opens and checks each shard.
        first, *later = (seconds(lambda: merge_site(folder, "token", deep, store.counted)) for _ in range(4))
    each = max(0.0, first - min(later)) / _MERGED
    note("first touch", each, "s")
    size = 3 * 8 * deep * width
    note("merge", size / max(1e-9, min(later) / _MERGED - 75e-6), "bytes/s")
