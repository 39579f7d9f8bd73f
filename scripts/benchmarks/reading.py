"""Rows and gathers, cold and warm, compared with raw reads of the device and copies in memory."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.cold import make_cold, make_warm, resident_bytes
from benchmarks.limits import aligned, random_reads, reader_name
from benchmarks.machine import read_ahead_kb, version_of
from benchmarks.measure import Plan, Row, compare, in_turn, seconds
from benchmarks.samples import ROW_WIDTH, data_files, rows_store
from mmcache.system.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mmcache.read.store import Store

__all__ = ["cold_gathers", "cold_rows", "rows_in_memory", "warm_gathers", "warm_rows", "warm_share"]

_ROW_BYTES = ROW_WIDTH * 2
_GATHERED = 4096
_DATA = 4096  # where a shard's data starts


@contextmanager
def _direct(files: list[Path]) -> Iterator[list[int]]:
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _shard_rows(store: Store) -> int:
    return store.shard_tokens or store.n_tokens


def _make_cold(store: Store, files: list[Path]) -> None:
    store.close()
    make_cold(files)


def cold_rows(plan: Plan) -> Iterator[Row]:
    """One row from an open store whose shards were read before, compared with one direct read."""
    store = rows_store(plan)
    view, files, per_shard = store["x"], data_files(store, "x"), _shard_rows(store)
    buffer, random = aligned(_ROW_BYTES), np.random.default_rng(0)
    count = 60 if plan.quick else 300
    ours: list[float] = []
    raw: list[float] = []
    with _direct(files) as fds:
        for _ in range(plan.repeats):
            _make_cold(store, files)
            for shard in range(len(files)):
                view.get_position(0, shard * per_shard)
            held = sum(map(resident_bytes, files))
            if held > 0.05 * store.n_tokens * _ROW_BYTES:
                raise RuntimeError(f"{held} bytes came into the page cache by meeting {len(files)} shards: not cold")
            taken: tuple[list[float], list[float]] = ([], [])
            # None of the rows just read, and none near them.
            within = random.integers(min(64, per_shard // 2), per_shard, (count, 2))
            for (shard, other), (row, elsewhere) in zip(
                random.integers(0, len(files), (count, 2)).tolist(), within.tolist(), strict=True
            ):
                position = shard * per_shard + row
                taken[0].append(seconds(lambda: view.get_position(0, position)))  # noqa: B023 -- called at once
                offset = _DATA + elsewhere * _ROW_BYTES
                taken[1].append(seconds(lambda: os.preadv(fds[other], [buffer.data], offset)))  # noqa: B023
            ours.append(statistics.median(taken[0]) * 1e6)
            raw.append(statistics.median(taken[1]) * 1e6)
    beside = "one O_DIRECT pread of 8 KiB, same process"
    yield compare("cold row", "get_position, cold, 8 KiB", beside, "us", ours, raw, goal=1 / 1.3)


def _memmap_gather(files: list[Path], per_shard: int, positions: np.ndarray, most: float) -> float:
    """Read rows as users of np.memmap do, for `most` seconds at most: rows/s."""
    maps = [np.memmap(path, np.uint16, "r", offset=_DATA, shape=(per_shard, ROW_WIDTH)) for path in files]
    out = np.empty((len(positions), ROW_WIDTH), np.uint16)
    began, done = time.perf_counter(), 0
    for done, position in enumerate(positions.tolist(), 1):
        shard, row = divmod(position, per_shard)
        out[done - 1] = maps[shard][row]
        if time.perf_counter() - began > most:
            break
    return done / (time.perf_counter() - began)


def cold_gathers(plan: Plan) -> Iterator[Row]:
    """4,096 random rows at a time, compared with fio at queue depth 32, and np.memmap."""
    store = rows_store(plan)
    view, files, per_shard = store["x"], data_files(store, "x"), _shard_rows(store)
    random = np.random.default_rng(1)
    calls = 2 if plan.quick else 8
    out = torch.zeros(_GATHERED, 1, ROW_WIDTH, dtype=torch.bfloat16)

    def ours() -> float:
        _make_cold(store, files)
        positions = random.integers(0, store.n_tokens, (calls, _GATHERED))
        return calls * _GATHERED / seconds(lambda: [view.gather(some, out=out) for some in positions])

    def device() -> float:
        # Otherwise fio would spend its time on dropping pages that the other side left in the page cache.
        _make_cold(store, files)
        return random_reads(files, _ROW_BYTES, calls * _GATHERED) / _ROW_BYTES

    def memmap() -> float:
        _make_cold(store, files)
        positions = random.integers(0, store.n_tokens, 512 if plan.quick else _GATHERED)
        return _memmap_gather(files, per_shard, positions, 2.0 if plan.quick else 10.0)

    # More turns than elsewhere: a turn takes a third of a second, and the device varies from one to the next.
    found = in_turn({"ours": ours, "device": device}, plan.repeats * 3)
    what = "gather(out=), cold, 4,096 random rows of 8 KiB"
    beside = f"{reader_name()}, randread 8 KiB, queue depth 32"
    yield compare("cold gather", what, beside, "rows/s", found["ours"], found["device"], goal=0.95)
    # Measured separately: it makes the device read megabytes per row, which slows whatever comes next.
    found = in_turn({"ours": ours, "memmap": memmap}, plan.repeats)
    beside = f"np.memmap ({version_of('numpy')}), rows one by one, read_ahead_kb {read_ahead_kb(plan.folder)}"
    yield compare("cold gather, memmap", what, beside, "rows/s", found["ours"], found["memmap"], kind="peer", goal=50)


def warm_share(store: Store) -> int:
    """How many tokens of a store fit into memory twice: in the page cache, and as a tensor."""
    per_shard = _shard_rows(store)
    fits = available_memory() * 4 // 10 // _ROW_BYTES // per_shard
    return min(store.n_tokens, max(1, fits) * per_shard)


def rows_in_memory(tokens: int) -> torch.Tensor:
    """A tensor like the rows: `[tokens, 4096]` bfloat16, touched."""
    rows = torch.empty(tokens, ROW_WIDTH, dtype=torch.bfloat16)
    piece = torch.randn(min(tokens, 4096), ROW_WIDTH).bfloat16()
    for start in range(0, tokens, len(piece)):
        rows[start : start + len(piece)] = piece[: tokens - start]
    return rows


def warm_gathers(plan: Plan) -> Iterator[Row]:
    """The same rows again, all in the page cache, compared with `index_select` on a tensor in memory."""
    store = rows_store(plan)
    view, tokens = store["x"], warm_share(store)
    # Dropped and read again in one go, whatever was read of it before, and in which pieces.
    _make_cold(store, data_files(store, "x"))
    make_warm(data_files(store, "x")[: tokens // _shard_rows(store)])
    memory = rows_in_memory(tokens)
    positions = torch.randint(0, tokens, (4 if plan.quick else 64, _GATHERED))
    out = torch.zeros(_GATHERED, ROW_WIDTH, dtype=torch.bfloat16)
    into = out[:, None]

    def rate(work: Callable[[], object]) -> float:
        return positions.numel() * _ROW_BYTES / seconds(work) / 1e9

    def gather() -> float:
        return rate(lambda: [view.gather(some, out=into) for some in positions])

    def first() -> float:
        store.close()
        return gather()

    def select() -> float:
        return rate(lambda: [torch.index_select(memory, 0, some, out=out) for some in positions])

    shards = -(-tokens // _shard_rows(store))
    beside = f"torch.index_select(out=), {tokens * _ROW_BYTES / 2**30:.1f} GiB in memory"
    what = f"gather(out=), warm, 4,096 random rows of 8 KiB in {shards} shards"
    found = in_turn({"first": first, "ours": gather, "select": select}, plan.repeats)
    # The first gather faults in pages for the others; turns alternate, so it is a turn of its own.
    gather()
    again = in_turn({"ours": gather, "select": select}, plan.repeats)
    yield compare("warm gather", what, beside, "GB/s", again["ours"], again["select"], goal=0.9)
    what += ", pages not mapped yet"
    yield compare("warm gather, first touch", what, beside, "GB/s", found["first"], found["select"])


def warm_rows(plan: Plan) -> Iterator[Row]:
    """One row in the page cache, compared with cloning a row of a mapped tensor."""
    store = rows_store(plan)
    view, path, per_shard = store["x"], data_files(store, "x")[0], _shard_rows(store)
    make_warm([path])
    # The whole file, and a view of its rows: `from_file` has no offset.
    plain = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    rows = plain[_DATA : _DATA + per_shard * _ROW_BYTES].view(torch.bfloat16).view(per_shard, ROW_WIDTH)
    order = np.random.default_rng(2).integers(0, per_shard, 500 if plan.quick else 5000).tolist()

    def each(read: Callable[[int], object]) -> float:
        def work() -> None:
            for row in order:
                read(row)

        return seconds(work) / len(order) * 1e6

    sides = {
        "ours": partial(each, lambda row: view.get_position(0, row)),
        "clone": partial(each, lambda row: rows[row].clone()),
    }
    in_turn(sides, 1)  # faults the pages in
    found = in_turn(sides, plan.repeats)
    beside = "clone of a row of a mapped tensor"
    yield compare("warm row", "get_position, warm, 8 KiB", beside, "us", found["ours"], found["clone"], goal=1 / 1.5)
