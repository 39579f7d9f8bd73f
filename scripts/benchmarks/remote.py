"""A store in a bucket compared with the bare client, from a real S3 server process on this machine's loopback address.

Server, network and reader share the machine, so its cores are the limit, and any work beyond the client's own costs
time.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import torch

import mmcache
from benchmarks.measure import Plan, Row, compare, in_turn, seconds
from benchmarks.samples import clt_store
from mmcache.storage.object_store import ObjectStore
from mmcache.training.dataset import ActivationDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmcache.read.store import Store

__all__ = ["from_a_bucket"]

_SIZE, _QUICK_SIZE = 1 << 30, 128 << 20
_BESIDE = "obstore, the same objects"
# How many objects the bare client gets at a time, in the second comparison.
_THREADS = 4
_ROWS = 200
_SIDES = ("bare", "together", "brought", "gathered", "pulled", "epoch")


def from_a_bucket(plan: Plan) -> Iterator[Row]:
    """Cache a store, read an epoch of it, gather its rows, pull it: each compared with the client alone."""
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))
    serve_s3 = importlib.import_module("fake_s3").serve_s3
    local = clt_store(plan, _QUICK_SIZE if plan.quick else _SIZE)
    with serve_s3() as server:
        os.environ.update(server.env())
        url = server.url("acts")
        mmcache.push(local.path, url)
        yield from _measured(plan, local, url)


class _Sides:
    """What is measured: the bare client and the library, on the same objects, each without a cache.

    Each method returns GB/s.
    """

    def __init__(self, cache: Path, local: Store, url: str) -> None:
        self._cache, self._url = cache, url
        bucket = ObjectStore(url)
        self.client = bucket._store  # noqa: SLF001 -- the very same client
        listed = [entry for some in bucket.names() for entry in some]
        self._keys = [key for key, _, _ in listed if key.startswith("mlp_") and "/c." in key]
        self.total = sum(size for key, size, _ in listed if key in self._keys)
        self._out = torch.zeros(local.n_tokens, local.n_layers, local[local.sites[0]].d_model, dtype=torch.bfloat16)

    def opened(self) -> Store:
        """Open the store with an empty cache."""
        shutil.rmtree(self._cache, ignore_errors=True)
        return mmcache.open(self._url, cache_dir=self._cache, cache_bytes=4 * self.total)

    def _rate(self, work: Callable[[], object]) -> float:
        return self.total / seconds(work) / 1e9

    def _get(self, key: str) -> int:
        return len(obstore.get(self.client, key).bytes())

    def bare(self) -> float:
        """Get one object after the other."""
        return self._rate(lambda: [self._get(key) for key in self._keys])

    def together(self) -> float:
        """Get several objects at a time."""
        with ThreadPoolExecutor(_THREADS) as threads:
            return self._rate(lambda: list(threads.map(self._get, self._keys)))

    def brought(self) -> float:
        """Download all shards into the cache."""
        with self.opened() as store:

            def bring() -> None:
                for site in store.sites:
                    store[site].read_ahead(0, store.n_tokens)

            return self._rate(bring)

    def gathered(self) -> float:
        """Gather every row."""
        with self.opened() as store:
            every = range(store.n_tokens)
            return self._rate(lambda: [store[site].gather(every, out=self._out) for site in store.sites])

    def pulled(self) -> float:
        """Copy the store into a folder, durably."""
        folder = self._cache.with_name("pulled")
        shutil.rmtree(folder, ignore_errors=True)
        return self._rate(lambda: mmcache.pull(self._url, folder))

    def epoch(self) -> float:
        """Iterate over an epoch."""
        with self.opened() as store:
            data = ActivationDataset(store, batch_size=1024, shuffle="block", buffer_bytes=self.total // 4)
            return self._rate(lambda: [batch.positions for batch in data])


def _measured(plan: Plan, local: Store, url: str) -> Iterator[Row]:
    sides = _Sides(plan.folder / "bucket-cache", local, url)
    found = in_turn({name: getattr(sides, name) for name in _SIDES}, plan.repeats)
    said = f"{sides.total / 2**20:.0f} MiB from S3 on loopback"
    for name, what, goal in (
        ("brought", "all shards brought into the cache, checksums compared", 0.8),
        ("gathered", "a gather of every row, nothing cached", 0.8),
        ("pulled", "pulled into a folder, verified and synced", 0.8),
        ("epoch", "an epoch of a block shuffle, nothing cached", None),
    ):
        yield compare(f"bucket {name}", f"{said}: {what}", _BESIDE, "GB/s", found[name], found["bare"], goal=goal)
    yield compare(
        "bucket brought, together", f"{said}: all shards brought into the cache", f"{_BESIDE}, {_THREADS} at a time",
        "GB/s", found["brought"], found["together"],
    )  # fmt: skip
    yield from _rows(plan, sides.opened(), sides.client)


def _rows(plan: Plan, store: Store, client: Any) -> Iterator[Row]:
    site = store.sites[0]
    view, size = store[site], store[site].d_model * 2
    key = next(iter(store.path.joinpath(site).glob("c.*"))).name
    positions = torch.randint(0, min(store.n_tokens, store.shard_tokens or 1), (_ROWS,)).tolist()
    view.get_position(0, 0)

    def bare() -> float:
        get = obstore.get_range
        return (
            seconds(lambda: [get(client, f"{site}/{key}", start=4096 + at * 64, length=size) for at in positions])
            / _ROWS
            * 1e3
        )

    def ours() -> float:
        return seconds(lambda: [view.get_position(1, at) for at in positions]) / _ROWS * 1e3

    found = in_turn({"ours": ours, "bare": bare}, plan.repeats)
    yield compare(
        "bucket row", f"get_position from the bucket, {size} bytes", "obstore.get_range of as many", "ms",
        found["ours"], found["bare"], goal=0.8,
    )  # fmt: skip
