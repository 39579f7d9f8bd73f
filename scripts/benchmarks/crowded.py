"""Speed while another Python thread is busy and never releases the GIL by itself."""

from __future__ import annotations

import statistics
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from benchmarks.cold import make_warm
from benchmarks.feeding import delivered
from benchmarks.measure import Plan, Row, compare, seconds
from benchmarks.reading import rows_in_memory, warm_share
from benchmarks.samples import ROW_WIDTH, clt_store, data_files, rows_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["crowded"]

_GATHERED = 4096


@contextmanager
def busy() -> Iterator[None]:
    """Run a thread of pure Python for as long as the `with` statement lasts."""
    stopped = False

    def spin() -> None:
        while not stopped:
            pass

    thread = threading.Thread(target=spin, name="busy")
    thread.start()
    try:
        yield
    finally:
        stopped = True
        thread.join()


def _quiet_and_busy(work: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = ([], [])
    sides: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext, busy)
    for _ in range(repeats):
        for taken, around in zip(found, sides, strict=True):
            with around():
                taken.append(work())
    return found


def crowded(plan: Plan) -> Iterator[Row]:
    """The share of their speed that a gather, a row and the feed keep."""
    store = rows_store(plan)
    view, tokens = store["x"], warm_share(store)
    make_warm(data_files(store, "x")[: tokens // (store.shard_tokens or 1)])
    memory = rows_in_memory(tokens)
    positions = torch.randint(0, tokens, (2 if plan.quick else 8, _GATHERED))
    out = torch.zeros(_GATHERED, ROW_WIDTH, dtype=torch.bfloat16)
    into = out[:, None]
    count = 100 if plan.quick else 1000
    order = torch.randint(0, tokens, (count,)).tolist()

    def gather() -> float:
        return 1 / seconds(lambda: [view.gather(some, out=into) for some in positions])

    def select() -> float:
        return 1 / seconds(lambda: [torch.index_select(memory, 0, some, out=out) for some in positions])

    def row() -> float:
        return statistics.median(seconds(lambda: view.get_position(0, at)) for at in order) * 1e6  # noqa: B023

    gather(), row()  # faults the pages in
    ours, theirs = (_quiet_and_busy(work, plan.repeats) for work in (gather, select))
    kept = [[crowd / alone for alone, crowd in zip(*found, strict=True)] for found in (ours, theirs)]
    what = "gather(out=), warm: share kept beside a busy thread"
    beside = "what torch.index_select(out=) keeps"
    yield compare("busy gather", what, beside, "share", kept[0], kept[1], goal=0.8)
    quiet, crowd = _quiet_and_busy(row, plan.repeats)
    what = "get_position, warm, median beside a busy thread"
    yield compare("busy row", what, "its quiet median", "us", crowd, quiet, kind="self", goal=1 / 3)
    store.close()
    clt, seeds = clt_store(plan), iter(range(100, 10_000))
    quiet, crowd = _quiet_and_busy(lambda: delivered(plan, clt, next(seeds), cold=True), plan.repeats)
    what = "ActivationDataset, cold, beside a busy thread"
    yield compare("busy feed", what, "its quiet rate", "GB/s", crowd, quiet, kind="self", goal=0.5)
