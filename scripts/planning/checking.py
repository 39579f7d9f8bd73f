"""Check a plan against reality: an extraction of the demo model on the CPU."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from benchmarks.limits import raw_write

from mmcache.extraction.job import Extraction
from mmcache.extraction.runner import forward
from mmcache.format.names import RESERVED
from mmcache.models.capture import capture
from mmcache.models.loading import load_model, load_tokenizer
from planning.figures import Figure
from planning.measuring import digest_rate
from planning.models import find_model
from planning.size import measure, planned
from planning.writing import Job, outcome

if TYPE_CHECKING:
    from torch import nn

    from planning.figures import Figures
    from planning.machine import Machine
    from planning.size import Size

__all__ = ["Checked", "check", "differences"]

_SITES = ("mlp_in", "mlp_out")
_LENGTH, _BATCH = 256, 8
_SHARD_TOKENS = 8192
_WRITTEN = 256 << 20

Checked = dict[str, dict[str, Any]]


def check(folder: Path, machine: Machine, figures: Figures, *, tokens: int, repeats: int = 3) -> Checked:
    """Plan a store of the demo model, then make it; leaves no files.

    Bare forward passes, a digest and a write are measured for each repeat, the passes before and after it, because
    other programs compete for the machine. The result is the repeat whose ratio of planned to found seconds is the
    median.

    Returns:
        For each of `bytes`, `shards`, `seconds` and so on, what was `planned` and what was `found`.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mmcache-check-", dir=folder))
    try:
        model, known = load_model("demo", None), find_model("demo")
        texts = list(np.random.default_rng(0).integers(0, 255, (max(1, tokens // _LENGTH), _LENGTH)))
        manifest = planned(
            dict.fromkeys(_SITES, known.width), tuple(range(known.layers)), len(texts) * _LENGTH, len(texts),
            dtype="bfloat16", layout="token", shard_tokens=_SHARD_TOKENS,
        )  # fmt: skip
        times = []
        for _ in range(repeats):
            now = figures | {
                "digest": Figure(digest_rate(scratch, manifest), "bytes/s", "measured now"),
                "disk write": Figure(raw_write(scratch, _WRITTEN) * 1e9, "bytes/s", "measured now"),
            }
            shutil.rmtree(scratch / "store", ignore_errors=True)
            earlier = _forward_seconds(model, texts)
            taken = _extract(model, texts, scratch / "store")
            forward = 2 / (earlier + _forward_seconds(model, texts))
            on = replace(machine, gpus=0, workers=1, forward=forward)
            job = Job(known, measure(manifest), on, known.layers, _LENGTH, as_text=False)
            found = outcome(job, now)
            before = sum(part.seconds for part in found.parts if part.phase == "before")
            times.append((found.seconds - before, taken))
        times.sort(key=lambda pair: pair[0] / pair[1])
        return _beside(scratch / "store", job.size, times[len(times) // 2])
    finally:
        shutil.rmtree(scratch)


def _forward_seconds(model: nn.Module, texts: list[np.ndarray]) -> float:
    """Seconds per token of bare forward passes over a third of the contexts. The first two batches warm up."""
    some = texts[: max(3 * _BATCH, len(texts) // 3)]
    device, began, counted = torch.device("cpu"), time.perf_counter(), 0
    with capture(model, _SITES, stop=True) as captured:
        for number, start in enumerate(range(0, len(some), _BATCH)):
            ids = np.stack(some[start : start + _BATCH])
            forward(model, captured, ids, np.ones_like(ids), device)
            if number == 1:
                began, counted = time.perf_counter(), 0
            else:
                counted += ids.size
    return (time.perf_counter() - began) / counted


def _extract(model: nn.Module, texts: list[np.ndarray], path: Path) -> float:
    """Make the store: seconds from the plan to the complete store."""
    job = Extraction(
        model, load_tokenizer("demo"), path, sites=_SITES, context_length=_LENGTH, batch_size=_BATCH,
        shard_tokens=_SHARD_TOKENS,
    )  # fmt: skip
    began: list[float] = []
    job.run(texts, planned=lambda _survey: began.append(time.perf_counter()))
    return time.perf_counter() - began[0]


def _beside(path: Path, size: Size, times: tuple[float, float]) -> Checked:
    files = {array: [file.stat().st_size for file in (path / array).glob("c.*")] for array in (*_SITES, *RESERVED)}
    said: dict[str, tuple[float, float]] = {
        "bytes": (sum(size.sites.values()) + size.columns, sum(map(sum, files.values()))),
        "shards": (size.shards, sum(len(files[site]) for site in _SITES)),
        "seconds": times,
    }
    for site in _SITES:
        said[f"bytes of {site}"] = (size.sites[site], sum(files[site]))
    return {name: {"planned": ours, "found": theirs} for name, (ours, theirs) in said.items()}


def differences(checked: Checked, tolerance: float) -> list[str]:
    """What is not as planned: bytes and shards must be equal, seconds within a share of those found."""
    wrong = []
    for name, one in checked.items():
        allowed = tolerance * one["found"] if name == "seconds" else 0
        if abs(one["planned"] - one["found"]) > allowed:
            wrong.append(f"{name}: {one['planned']:,.6g} planned, {one['found']:,.6g} found")
    return wrong
