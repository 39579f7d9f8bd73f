"""On a GPU: writes from the device to disk, their cost for the forward pass, and reads of rows to the device."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import mmcache
from benchmarks.cold import make_warm
from benchmarks.limits import raw_write
from benchmarks.measure import Plan, Row, Skip, compare, in_turn, seconds
from benchmarks.reading import warm_share
from benchmarks.samples import ROW_WIDTH, data_files, rows_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["on_device"]

_LAYERS, _WIDTH = 32, 4096
_GATHERED = 4096


def _timed(work: Callable[[], object]) -> float:
    """Time a call, including its work on the device."""

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds(whole)


def _model(layers: int) -> Any:
    """A Llama of 4,096-wide layers with random weights, on the device, in bfloat16."""
    from transformers import LlamaConfig, LlamaModel  # noqa: PLC0415 -- an extra, and slow to import

    config = LlamaConfig(
        hidden_size=_WIDTH, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaModel(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def _to_disk(plan: Plan) -> Iterator[Row]:
    tokens = max(128, plan.size // 2 // (_LAYERS * _WIDTH * 2))
    layer = torch.randn(tokens, _WIDTH, device="cuda", dtype=torch.bfloat16)
    total, path = _LAYERS * layer.nbytes, plan.folder / "from-device"

    def push() -> float:
        def work() -> None:
            with mmcache.FullActivationCache.with_capacity(_LAYERS, path) as cache:
                for _ in range(_LAYERS):
                    cache.push(layer)

        taken = _timed(work)
        shutil.rmtree(path)
        return total / taken / 1e9

    found = in_turn({"ours": push, "raw": lambda: raw_write(plan.folder, total)}, plan.repeats)
    what = f"push of 32 layers of {tokens} x 4096 from the GPU, to durable"
    yield compare("gpu push", what, "raw O_DIRECT writes of 8 MiB, one thread", "GB/s", found["ours"], found["raw"])


def _slowdown(plan: Plan) -> Iterator[Row]:
    model = _model(_LAYERS)
    ids = torch.randint(0, 32000, (4, 512), device="cuda")
    path, turns = plan.folder / "streamed", 4

    def bare() -> float:
        def work() -> None:
            with torch.inference_mode():
                for _ in range(turns):
                    model(ids)

        return _timed(work) / turns * 1e3

    def streaming() -> float:
        with mmcache.create(path, sites={"resid_post": _WIDTH}, n_layers=_LAYERS) as writer:

            def work() -> None:
                with torch.inference_mode(), mmcache.capture(model, sites=("resid_post",)) as captured:
                    for _ in range(turns):
                        model(ids)
                        writer.append(ids, {"resid_post": captured["resid_post"]})

            taken = _timed(work)
        shutil.rmtree(path)
        return taken / turns * 1e3

    bare(), streaming()
    found = in_turn({"ours": streaming, "bare": bare}, plan.repeats)
    what = "forward pass while 32 layers of 4,096 stream out (0.5 GiB each pass)"
    yield compare("gpu forward", what, "forward pass alone", "ms", found["ours"], found["bare"], goal=1 / 1.1)


def _onto(plan: Plan) -> Iterator[Row]:
    store = rows_store(plan)
    view, tokens = store["x"], warm_share(store)
    make_warm(data_files(store, "x")[: tokens // (store.shard_tokens or 1)])
    positions = torch.randint(0, tokens, (_GATHERED,))
    out = torch.empty(_GATHERED, 1, ROW_WIDTH, dtype=torch.bfloat16, device="cuda")
    pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)

    def rate(work: Callable[[], object]) -> float:
        return out.nbytes / _timed(work) / 1e9

    sides = {
        "ours": partial(rate, lambda: view.gather(positions, out=out)),
        "copy": partial(rate, lambda: out.copy_(pinned, non_blocking=True)),
    }
    in_turn(sides, 2)
    found = in_turn(sides, plan.repeats)
    beside = "copy of as much pinned memory onto the GPU"
    yield compare("gpu gather", "gather(out=on GPU), warm, 4,096 rows", beside, "GB/s", found["ours"], found["copy"])
    row, one = out[0, 0], pinned[0, 0]
    order = positions[:500].tolist()
    each = {
        "ours": lambda: _timed(lambda: [view.get_position(0, at, "cuda") for at in order]) / len(order) * 1e6,
        "copy": lambda: _timed(lambda: [row.copy_(one, non_blocking=True) for _ in order]) / len(order) * 1e6,
    }
    in_turn(each, 1)
    found = in_turn(each, plan.repeats)
    beside = "copy of a pinned row onto the GPU"
    yield compare("gpu row", "get_position(device='cuda'), warm, 8 KiB", beside, "us", found["ours"], found["copy"])
    store.close()


def on_device(plan: Plan) -> Iterator[Row | Skip]:
    """Measure everything that needs a GPU, or report that there is none."""
    if not torch.cuda.is_available():
        yield Skip("gpu", "torch.cuda.is_available() is false")
        return
    yield from _to_disk(plan)
    yield from _slowdown(plan)
    yield from _onto(plan)
