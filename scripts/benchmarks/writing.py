"""Writes, timed until durable: ours, the raw device's, peers'. Also the time of a push itself, and its memory."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

import mmcache
from benchmarks.cold import files_of, make_durable
from benchmarks.limits import aligned, raw_write
from benchmarks.machine import has, version_of
from benchmarks.measure import Plan, Row, Skip, compare, in_turn, seconds
from benchmarks.writers import WRITERS, Layers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["memory", "peer_writes", "staging", "writes"]

_LAYERS, _WIDTH = 32, 4096
_SITES, _CLT_LAYERS, _CLT_WIDTH = ("mlp_in", "mlp_out"), 12, 768
# What fits the ring of staging buffers, which holds 64 MiB.
_STAGED = 32 << 20


@contextmanager
def _scratch(plan: Plan) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="write-", dir=plan.folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _layers(plan: Plan, share: float = 1.0) -> Layers:
    """Layers of `plan.size` / 2 bytes in all: the writes are half as large as the stores that are read."""
    tokens = max(128, int(plan.size * share) // 2 // (_LAYERS * _WIDTH * 2))
    piece = torch.randn(min(tokens, 4096), _WIDTH).bfloat16()
    layers = []
    for _ in range(_LAYERS):
        layer = torch.empty(tokens, _WIDTH, dtype=torch.bfloat16)
        for start in range(0, tokens, len(piece)):
            layer[start : start + len(piece)] = piece[: tokens - start]
        layers.append(layer)
    return layers


def _size(layers: Layers) -> int:
    return sum(layer.nbytes for layer in layers)


def _push(plan: Plan, layers: Layers) -> float:
    """Push layers, and close: GB/s until durable."""

    def work() -> None:
        with mmcache.FullActivationCache.with_capacity(len(layers), path / "cache") as cache:
            for layer in layers:
                cache.push(layer)

    with _scratch(plan) as path:
        return _size(layers) / seconds(work) / 1e9


def _append(plan: Plan, layout: Literal["token", "layer"], total: int) -> float:
    """Append batches of 8 x 512 tokens of two sites, and close: GB/s until durable."""
    tokens = torch.randint(0, 50_000, (8, 512))
    batch = {site: list(torch.randn(_CLT_LAYERS, 8, 512, _CLT_WIDTH).bfloat16()) for site in _SITES}
    size = sum(map(_size, batch.values()))
    turns = max(1, total // size)

    def work() -> None:
        with mmcache.create(
            path / "acts", sites=dict.fromkeys(_SITES, _CLT_WIDTH), n_layers=_CLT_LAYERS, layout=layout
        ) as writer:
            for _ in range(turns):
                writer.append(tokens, batch)

    with _scratch(plan) as path:
        return turns * size / seconds(work) / 1e9


def _raw(plan: Plan, total: int) -> float:
    with _scratch(plan) as path:
        return raw_write(path, total)


def writes(plan: Plan) -> Iterator[Row]:
    """`push`, and `append` in both layouts, compared with the raw device; statistics and checksums on."""
    layers = _layers(plan)
    total = _size(layers)
    found = in_turn(
        {
            "push": lambda: _push(plan, layers),
            "raw": lambda: _raw(plan, total),
            "append token": lambda: _append(plan, "token", total),
            "append layer": lambda: _append(plan, "layer", total),
        },
        plan.repeats,
    )
    beside = f"raw O_DIRECT writes of 8 MiB, one thread, reserved, synced; {total / 2**30:.2f} GiB"
    for name, what in (
        ("push", f"push of 32 layers of {len(layers[0])} x 4096, to durable"),
        ("append token", "append, token layout, two sites of 12 x 768, to durable"),
        ("append layer", "append, layer layout, two sites of 12 x 768, to durable"),
    ):
        yield compare(name, what, beside, "GB/s", found[name], found["raw"], goal=0.9)


def _peer(plan: Plan, write: object, layers: Layers) -> float:
    def work() -> None:
        write(path, layers)  # type: ignore[operator]
        make_durable(path)

    with _scratch(plan) as path:
        rate = _size(layers) / seconds(work) / 1e9
        if not files_of(path):
            raise RuntimeError("the peer wrote nothing")
        return rate


def peer_writes(plan: Plan) -> Iterator[Row | Skip]:
    """`push` compared with peers' writes, with every file and folder of theirs synced too."""
    for peer in WRITERS:
        if not has(peer.package):
            yield Skip(f"write, {peer.name}", f"{peer.package} is not installed")
            continue
        layers = _layers(plan, peer.share)
        total = _size(layers)
        found = in_turn(
            {
                "ours": lambda: _push(plan, layers),  # noqa: B023 -- called at once
                "theirs": lambda: _peer(plan, peer.write, layers),  # noqa: B023
                "raw": lambda: _raw(plan, total),  # noqa: B023
            },
            1 if plan.quick else min(plan.repeats, 3),
        )
        # Twice the peer's speed if the device allows it; in any case faster than the peer.
        twice = sorted(found["raw"])[len(found["raw"]) // 2] >= 2.4 * sorted(found["theirs"])[len(found["theirs"]) // 2]
        beside = f"{peer.name} ({version_of(peer.package)}): {peer.how}, synced"
        what = f"push to durable, {total / 2**30:.2f} GiB"
        yield compare(
            f"write, {peer.name}", what, beside, "GB/s", found["ours"], found["theirs"], kind="peer", goal=1 + twice
        )


def staging(plan: Plan) -> Iterator[Row]:
    """Time `push` alone, with nothing else in progress, for a layer that fits its ring."""
    layer = torch.randn(min(_STAGED, plan.size // 4) // (_WIDTH * 2), _WIDTH).bfloat16()
    source, target = layer.view(torch.uint8).numpy().reshape(-1), aligned(layer.nbytes)
    turns = 4 if plan.quick else 16
    with _scratch(plan) as path:
        cache = mmcache.FullActivationCache.with_capacity(1 + turns * plan.repeats, path / "cache")
        cache.push(layer)  # touches the ring
        cache.flush()

        found: dict[str, list[float]] = {"ours": [], "memcpy": []}
        for _ in range(plan.repeats):
            pushes, copies = [], []
            for _ in range(turns):
                pushes.append(seconds(lambda: cache.push(layer)) * 1e3)
                cache.flush()
                # Measured after each push: what was just written has evicted the same processor caches for both.
                copies.append(seconds(lambda: np.copyto(target, source)) * 1e3)
            found["ours"].append(statistics.median(pushes))
            found["memcpy"].append(statistics.median(copies))
        cache.close()
    what = f"push itself, a layer of {layer.nbytes >> 20} MiB, ring idle"
    yield compare("staging", what, "memcpy into touched memory", "ms", found["ours"], found["memcpy"], goal=1 / 1.3)


_MEMORY = """
import json, sys, threading, time, torch, mmcache

def anonymous():
    with open("/proc/self/status") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024

path, tokens, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
layers, width = 8, 1024
if how == "push":
    held = torch.randn(4096, width).bfloat16().repeat(-(-tokens // 4096), 1)[:tokens]
else:
    held = torch.randn(layers, 1, 4096, width).bfloat16()
before, most, stop = anonymous(), [0], threading.Event()

def watch():
    while not stop.wait(0.005):
        most[0] = max(most[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
if how == "push":
    with mmcache.FullActivationCache.with_capacity(layers, path) as cache:
        for _ in range(layers):
            cache.push(held)
else:
    with mmcache.create(path, sites={"resid_post": width}, n_layers=layers, layout="layer") as writer:
        for start in range(0, tokens, 4096):
            writer.append(torch.zeros(1, 4096, dtype=torch.int64), {"resid_post": held}, continues=start > 0)
taken = time.perf_counter() - began
stop.set()
watcher.join()
print(json.dumps({"bytes": most[0] - before, "held": held.nbytes, "seconds": taken}))
"""


def memory(plan: Plan) -> Iterator[Row]:
    """The memory that writing a sequence of a million tokens takes: by `push`, and in pieces as in chunked prefill."""
    tokens = min(1 << 20, max(8192, plan.size // (8 * 1024 * 2) // 4096 * 4096 * (1 if plan.quick else 2)))
    for how, what in (("push", "push"), ("chunks", "append(continues=True), 4,096 tokens at a time")):
        with _scratch(plan) as path:
            done = subprocess.run(  # noqa: S603 -- ourselves
                [sys.executable, "-c", _MEMORY, str(path / "acts"), str(tokens), how],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        said = json.loads(done.stdout)
        yield compare(
            f"memory, {how}",
            f"{what}, {tokens:,} tokens x 8 layers x 1,024: peak beyond the tensors that are handed over",
            f"what is written: {tokens * 8 * 1024 * 2 / 2**30:.1f} GiB",
            "MiB",
            [said["bytes"] / 2**20],
            [tokens * 8 * 1024 * 2 / 2**20],
            kind="self",
            limit=512,
        )
