"""The training feed, cold and warm, compared with the device, memcpy, and peers' loaders at the same job."""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

import mmcache
from benchmarks.cold import files_of, make_cold, make_durable, make_warm
from benchmarks.limits import memcpy, random_reads, reader_name
from benchmarks.loaders import LOADERS, batches_of
from benchmarks.machine import has, version_of
from benchmarks.measure import Plan, Row, Skip, compare, in_turn
from benchmarks.samples import CLT_LAYERS, CLT_WIDTH, clt_store, data_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmcache.read.store import Store

__all__ = ["delivered", "feeds", "loaders"]

_BATCH = 1024
# The bytes that one site holds for a token: the record that is read from the device.
_RECORD = CLT_LAYERS * CLT_WIDTH * 2


def _batches(plan: Plan, store: Store) -> int:
    return max(1, min(16 if plan.quick else 96, store.n_tokens // _BATCH))


def delivered(plan: Plan, store: Store, seed: int, *, cold: bool) -> float:
    """Iterate over a fresh dataset, from the start of the epoch to the last batch: GB/s."""
    files = [path for site in store.sites for path in data_files(store, site)]
    if cold:
        store.close()
        make_cold(files)
    return _rate(plan, mmcache.ActivationDataset(store, batch_size=_BATCH, shuffle="global", seed=seed))


def _rate(plan: Plan, data: mmcache.ActivationDataset) -> float:
    """Iterate over a dataset's next epoch, from its start to the last batch: GB/s."""
    store, threads = data.store, threading.active_count()
    data.set_epoch(data.epoch + 1)
    began, size = time.perf_counter(), 0
    batches = iter(data)
    for _ in range(_batches(plan, store)):
        batch = next(batches)
        size += sum(batch[site].nbytes for site in store.sites)
    taken = time.perf_counter() - began
    del batches, batch
    # Wait for prefetches that are still reading: they must not warm up what is measured next.
    while threading.active_count() > threads:
        time.sleep(0.001)
    return size / taken / 1e9


def feeds(plan: Plan) -> Iterator[Row]:
    """A global shuffle of a CLT's data, in batches of 1,024 tokens."""
    store = clt_store(plan)
    files = [path for site in store.sites for path in data_files(store, site)]
    count = _batches(plan, store) * _BATCH * 2
    seeds = iter(range(10_000))

    def device() -> float:
        store.close()
        make_cold(files)
        return max(random_reads(files, _RECORD, count, jobs=jobs) for jobs in (1, 2)) / 1e9

    sides = {"ours": lambda: delivered(plan, store, next(seeds), cold=True), "device": device}
    found = in_turn(sides, plan.repeats)
    what = f"ActivationDataset, global shuffle, batch {_BATCH}, 12 x 768, two sites"
    beside = f"{reader_name()}, randread {_RECORD} B, queue depth 32, the better of 1 and 2 jobs"
    yield compare("cold feed", f"{what}, cold", beside, "GB/s", found["ours"], found["device"], goal=0.9)
    make_warm(files)
    piece = _BATCH * _RECORD * 2
    # The memory of its batches has been touched after the first epoch, as that of memcpy has.
    data = mmcache.ActivationDataset(store, batch_size=_BATCH, shuffle="global")
    _rate(plan, data)
    found = in_turn(
        {
            "ours": lambda: _rate(plan, data),
            "fresh": lambda: delivered(plan, store, next(seeds), cold=False),
            "memcpy": lambda: memcpy(count * _RECORD, piece) / 1e9,
        },
        plan.repeats,
    )
    beside = "memcpy into a touched batch, one thread"
    yield compare("warm feed", f"{what}, warm", beside, "GB/s", found["ours"], found["memcpy"], goal=0.55)
    what = f"{what}, warm, a new dataset each time"
    yield compare("warm feed, new dataset", what, beside, "GB/s", found["fresh"], found["memcpy"], goal=0.55)
    store.close()


def loaders(plan: Plan) -> Iterator[Row | Skip]:
    """Peers' loaders of the same tokens, all layers of both sites, in a global shuffle."""
    store = clt_store(plan, min(plan.size, plan.peer_size))
    seeds = iter(range(10_000))
    for peer in LOADERS:
        if not has(peer.package):
            yield Skip(f"loader, {peer.name}", f"{peer.package} is not installed")
            continue
        folder = plan.folder / f"loader-{peer.package}"
        folder.mkdir()
        peer.write(folder, _mapped(store, plan.folder))
        make_durable(folder)
        for cold in (True, False):
            word = "cold" if cold else "warm"

            def theirs(peer=peer, folder=folder, cold=cold) -> float:  # type: ignore[no-untyped-def] # noqa: ANN001
                (make_cold if cold else make_warm)(files_of(folder))
                return batches_of(peer, folder, store.n_tokens, _BATCH, 0.5 if plan.quick else 5.0)

            ours = partial(_tokens_a_second, plan, store, seeds, cold=cold)
            found = in_turn({"ours": ours, "theirs": theirs}, 1 if plan.quick else min(plan.repeats, 3))
            yield compare(
                f"loader, {peer.name}, {word}",
                f"ActivationDataset, global shuffle, batch {_BATCH}, {word}",
                f"{peer.name} ({version_of(peer.package)}): {peer.how}",
                "tokens/s",
                found["ours"],
                found["theirs"],
                kind="peer",
                goal=1,
            )
        for path in files_of(folder):
            path.unlink()
    store.close()


def _mapped(store: Store, folder: Path) -> dict[str, torch.Tensor]:
    """Every site's rows `[n_tokens, n_layers, d_model]` as mapped files that are already unlinked."""
    found = {}
    for site in store.sites:
        path = folder / f"{site}.rows"
        with path.open("wb") as file:
            for start in range(0, store.n_tokens, _BATCH):
                rows = store[site].gather(range(start, min(start + _BATCH, store.n_tokens)))
                rows.view(torch.int16).numpy().tofile(file)
        shape = (store.n_tokens, store.n_layers, store[site].d_model)
        rows = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=store[site].dtype)
        found[site] = rows.view(shape)
        path.unlink()
    return found


def _tokens_a_second(plan: Plan, store: Store, seeds: Iterator[int], *, cold: bool) -> float:
    if not cold:
        make_warm([path for site in store.sites for path in data_files(store, site)])
    return delivered(plan, store, next(seeds), cold=cold) * 1e9 / (2 * _RECORD)
