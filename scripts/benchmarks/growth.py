"""How costs grow with the number of shards, the length of a sequence and the number of layers.

Stores of thousands of shards are sparse files: real headers, and holes instead of rows.
"""

from __future__ import annotations

import shutil
import statistics
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

import mmcache
from benchmarks.cold import make_cold
from benchmarks.measure import Plan, Row, Series, compare, in_turn, seconds
from mmcache.format.manifest import Manifest, array_json
from mmcache.format.shard import Layout
from mmcache.read.describe import overview

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmcache.read.store import Store

__all__ = ["by_layers", "by_length", "by_shards", "many_shards", "sparse_store"]

_WIDTH = 1024
_SHARD_ROWS = 2048


def sparse_store(path: Path, shards: int, shard_rows: int = _SHARD_ROWS) -> Path:
    """Make a store of one layer and `shards` shards of rows of 2 KiB, whose rows are holes."""
    manifest = Manifest(
        kind="grown", store="sparse", layout="layer", dtype="bfloat16", sites={"x": _WIDTH}, layers=(0,),
        n_tokens=shards * shard_rows, n_sequences=1, has_tokens=False,
    ).with_geometry(shard_rows, None)  # fmt: skip
    folder = path / "x"
    folder.mkdir(parents=True)
    layout = Layout(manifest.spec("x"), shard_rows)
    for block in range(shards):
        with (folder / manifest.shard_key("x", block)).open("wb") as file:
            file.write(layout.header(manifest.shard_metadata("x", block)))
            file.truncate(layout.size)
    (folder / "zarr.json").write_bytes(array_json(manifest, "x", manifest.n_tokens or 0))
    (path / "zarr.json").write_bytes(manifest.to_json())
    return path


def _counts(plan: Plan) -> tuple[int, ...]:
    return (1, 10, 100, 1000) if plan.quick else (1, 10, 100, 1000, 10_000)


def _row_cost(store: Store, positions: list[int]) -> float:
    view = store["x"]

    def work() -> None:
        for position in positions:
            view.get_position(0, position)

    return seconds(work) / len(positions) * 1e6


def _random(store: Store, count: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, store.n_tokens, count).tolist()
    return found


def many_shards(plan: Plan) -> Iterator[Row]:
    """Open and read a store of very many shards, compared with a store of one shard."""
    shards = _counts(plan)[-1]
    many, one = plan.folder / "many", plan.folder / "one"
    sparse_store(many, shards)
    # As large as default shards, so that as many pages are touched.
    sparse_store(one, 1, 131_072)
    metadata = [path for folder in (many, one) for path in folder.rglob("zarr.json")]

    def opened(path: Path) -> float:
        make_cold(metadata, names=True)
        return seconds(lambda: mmcache.open(path)) * 1e3

    found = in_turn({"many": partial(opened, many), "one": partial(opened, one)}, plan.repeats)
    yield compare(
        f"open {shards} shards", f"open, cold, {shards:,} shards", "one shard", "ms", found["many"], found["one"],
        kind="self", limit=100,
    )  # fmt: skip
    count = 500 if plan.quick else 5000
    stores = {"many": mmcache.open(many), "one": mmcache.open(one)}
    sides = {name: partial(_row_cost, store, _random(store, count)) for name, store in stores.items()}
    in_turn(sides, 2)  # opens the shards, and faults the pages in
    found = in_turn(sides, plan.repeats)
    yield compare(
        f"row of {shards} shards", f"get_position, warm, random on {shards:,} shards", "random on one shard", "us",
        found["many"], found["one"], kind="self", goal=1 / 1.2,
    )  # fmt: skip
    for store in stores.values():
        store.close()
    shutil.rmtree(many)
    shutil.rmtree(one)


def _push_shards(plan: Plan, shards: int) -> float:
    """Write a cache of `shards` small shards: ms each, until durable."""
    layer, path = torch.randn(_SHARD_ROWS * shards, 64).bfloat16(), plan.folder / "pushed"

    def work() -> None:
        with mmcache.FullActivationCache.with_capacity(1, path, shard_tokens=_SHARD_ROWS * 4) as cache:
            cache.push(layer.view(-1, 64))

    taken = seconds(work)
    shutil.rmtree(path)
    return taken * 1e3 / max(1, shards // 4)


def by_shards(plan: Plan) -> Iterator[Series]:
    """Open, info, a row, a gather and a push, by the number of shards."""
    found: dict[str, list[float]] = {name: [] for name in ("open", "info", "4,096 rows gathered")}
    rows: list[float] = []
    counts = _counts(plan)
    for shards in counts:
        path = sparse_store(plan.folder / "sparse", shards)
        opened = [seconds(lambda: mmcache.open(path)) for _ in range(5)]  # noqa: B023 -- called at once
        found["open"].append(statistics.median(opened) * 1e3)
        told = [seconds(lambda: overview(path)) for _ in range(5)]  # noqa: B023
        found["info"].append(statistics.median(told) * 1e3)
        with mmcache.open(path) as store:
            positions = _random(store, 500 if plan.quick else 5000)
            _row_cost(store, positions)
            rows.append(statistics.median(_row_cost(store, positions) for _ in range(3)))
            some = torch.tensor(_random(store, 4096, seed=1))
            out = torch.zeros(4096, 1, _WIDTH, dtype=torch.bfloat16)
            view = store["x"]
            view.gather(some, out=out)
            taken = statistics.median(seconds(lambda: view.gather(some, out=out)) for _ in range(5))  # noqa: B023
            found["4,096 rows gathered"].append(taken * 1e3)
        shutil.rmtree(path)
    yield Series("shards, milliseconds", "shards", "ms", counts, {name: tuple(some) for name, some in found.items()})
    yield Series("shards, a row", "shards", "us", counts, {"get_position": tuple(rows)})
    pushed = tuple(count * 4 for count in counts[:-1])
    costs = tuple(_push_shards(plan, count) for count in pushed)
    yield Series("shards, pushing", "shards", "ms a shard", tuple(n // 4 for n in pushed), {"push": costs})


def by_length(plan: Plan) -> Iterator[Series]:
    """Push a layer and read a row, by the length of the sequence."""
    lengths = tuple(1 << power for power in range(10, 17 if plan.quick else 21, 2))
    pushed, read = [], []
    path = plan.folder / "long"
    for length in lengths:
        layer = torch.randn(min(length, 4096), _WIDTH).bfloat16().repeat(-(-length // 4096), 1)[:length]

        def work() -> None:
            with mmcache.FullActivationCache.with_capacity(1, path) as cache:
                cache.push(layer)  # noqa: B023 -- called at once

        pushed.append(seconds(work) / length * 1e6)
        with mmcache.FullActivationCache.open(path) as cache:
            order = np.random.default_rng(0).integers(0, length, 500).tolist()
            for turn in range(2):
                began = seconds(lambda: [cache.get_position(0, at) for at in order])  # noqa: B023
                if turn:
                    read.append(began / len(order) * 1e6)
        shutil.rmtree(path)
    values = {"push, a token of 2 KiB": tuple(pushed), "get_position": tuple(read)}
    yield Series("length", "tokens in the sequence", "us", lengths, values)


def by_layers(plan: Plan) -> Iterator[Series]:
    """Push layers and gather all of them, by their number."""
    counts = (1, 4, 16) if plan.quick else (1, 4, 16, 64, 128)
    layer = torch.randn(2048, _WIDTH).bfloat16()
    pushed, gathered = [], []
    path = plan.folder / "deep"
    for count in counts:

        def work() -> None:
            with mmcache.FullActivationCache.with_capacity(count, path) as cache:  # noqa: B023 -- called at once
                for _ in range(count):  # noqa: B023
                    cache.push(layer)

        pushed.append(seconds(work) / count * 1e3)
        view = mmcache.open(path)["resid_post"]
        some = torch.randint(0, 2048, (256,))
        out = torch.zeros(256, count, _WIDTH, dtype=torch.bfloat16)
        view.gather(some, out=out)
        gathered.append(statistics.median(seconds(lambda: view.gather(some, out=out)) for _ in range(5)) / count * 1e3)  # noqa: B023
        shutil.rmtree(path)
    values = {"push, a layer of 4 MiB": tuple(pushed), "256 rows gathered, a layer": tuple(gathered)}
    yield Series("layers", "layers", "ms", counts, values)
