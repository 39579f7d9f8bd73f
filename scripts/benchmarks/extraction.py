"""Extraction compared with the bare forward pass, and with SAELens's CacheActivationsRunner on the same input.

A job's own time is a few percent of the forward passes, which vary by as much themselves. So each job runs between two
bare passes, and its own time is its total minus their mean, which cancels any steady drift.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.measure import Plan, Row, Skip, compare, seconds
from mmcache.extraction.job import Extraction
from mmcache.extraction.runner import Batches, forward
from mmcache.models.capture import capture
from mmcache.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from torch import nn

__all__ = ["against_saelens", "extraction"]

_LENGTH, _BATCH, _LAYER = 512, 4, 6
_HOOK = f"transformer.h.{_LAYER}"
_SIDE = Path(__file__).with_name("saelens_side.py")
# Times below this are noise, and ratios of them mean nothing.
_LEAST_MS = 1.0
# glibc's options M_TRIM_THRESHOLD and M_MMAP_MAX, and the environment variables that set them in another process.
_STEADY = {-1: ("MALLOC_TRIM_THRESHOLD_", (1 << 31) - 1), -4: ("MALLOC_MMAP_MAX_", 0)}


def _model(plan: Plan) -> nn.Module:
    """A model of GPT-2 small's shape, or a tiny one for trial runs; random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 -- an extra, and slow to import

    torch.manual_seed(0)
    # A size that a tiny run, such as a test's, can afford.
    tiny = {"n_embd": 64, "n_head": 4, "n_layer": 8} if plan.tokens < _LENGTH * _BATCH else {}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**tiny)).eval()
    return model


def _texts(plan: Plan) -> list[np.ndarray]:
    count = max(1, plan.tokens // _LENGTH)
    return list(np.random.default_rng(0).integers(0, 50000, (count, _LENGTH)))


def extraction(plan: Plan) -> Iterator[Row]:
    """`extract` of every layer's mlp_in and mlp_out, compared with the forward passes alone."""
    model, tokenizer, device, texts = _model(plan), load_tokenizer("demo"), torch.device("cpu"), _texts(plan)
    ours, bare, full = [], [], []
    path = plan.folder / "extracted"

    def alone() -> None:
        with capture(model, ("mlp_in", "mlp_out"), stop=True) as captured:
            for spans in batches.spans():
                forward(model, captured, *batches.ids(spans), device)

    def whole() -> None:
        with torch.inference_mode():
            for spans in batches.spans():
                ids, mask = map(torch.from_numpy, batches.ids(spans))
                model(ids, attention_mask=mask, use_cache=False)

    for _ in range(plan.repeats):
        job = Extraction(model, tokenizer, path, context_length=_LENGTH, batch_size=_BATCH)
        batches = Batches(path, job.plan(texts), _BATCH)
        before = seconds(alone)
        planned: list[float] = []
        job.run(texts, planned=lambda _survey: planned.append(time.perf_counter()))  # noqa: B023 -- called at once
        ours.append(time.perf_counter() - planned[0])
        bare.append((before + seconds(alone)) / 2)
        full.append(seconds(whole))
        shutil.rmtree(path)
    what = f"extract on CPU, GPT-2 small's shape, {len(texts) * _LENGTH:,} tokens, from the plan to durable"
    yield compare("extract", what, "bare forward, stopped at the same layer", "s", ours, bare, goal=1 / 1.08)
    yield compare("extract, logits", what, "full forward with logits", "s", ours, full)


def _steady() -> None:
    """Make malloc keep freed memory, on both sides alike: fresh memory slows a forward pass by up to a tenth."""
    with suppress(OSError, AttributeError):
        for option, (_, value) in _STEADY.items():
            ctypes.CDLL(None).mallopt(option, value)


@dataclass
class _Taken:
    """Seconds of whole jobs, and of the bare passes around each."""

    jobs: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def measure(self, bare: Callable[[], float], job: Callable[[], float]) -> None:
        """Measure one job."""
        before = bare()
        self.jobs.append(job())
        self.bare.append((before + bare()) / 2)

    def beyond(self) -> list[float]:
        """Each job's milliseconds beyond the bare passes."""
        return [(job - bare) * 1000 for job, bare in zip(self.jobs, self.bare, strict=True)]

    def share(self) -> float:
        """The time of the jobs beyond the bare passes, in percent of these."""
        return statistics.median(self.beyond()) / statistics.median(self.bare) / 10


class _Saelens:
    """A process in SAELens's own environment, which waits while we measure."""

    def __init__(self, python: str, folder: Path, out: Path) -> None:
        self._errors = folder / "errors.txt"
        arguments = [python, str(_SIDE), str(folder), str(out), _HOOK, str(_BATCH), str(torch.get_num_threads())]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(  # noqa: S603 -- the Python that was asked for
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | {name: str(value) for name, value in _STEADY.values()},
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def answer(self) -> str:
        """The next line of output; waits for it. Raises RuntimeError if the process failed."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError((self._errors.read_text().strip().splitlines() or ["it said nothing"])[-1])
        return line

    def ask(self, what: str, how: str) -> float:
        """Run a job or the bare passes there, stopped early or whole: seconds."""
        if self._process.stdin is not None:
            print(what, how, file=self._process.stdin, flush=True)
        return float(self.answer())


class _Ours:
    """Our side of the comparison, in this process."""

    def __init__(self, plan: Plan) -> None:
        self.model, self.tokenizer, self.texts = _model(plan), load_tokenizer("demo"), _texts(plan)
        self._path = plan.folder / "one-layer"

    def bare(self) -> float:
        """Run the model alone, up to the layer wanted: seconds."""
        gc.collect()
        began = time.perf_counter()
        with capture(self.model, ("resid_post",), [_LAYER], stop=True) as captured:
            for start in range(0, len(self.texts), _BATCH):
                ids = np.stack(self.texts[start : start + _BATCH])
                forward(self.model, captured, ids, np.ones_like(ids), torch.device("cpu"))
        return time.perf_counter() - began

    def job(self) -> float:
        """Run a job whose model is already loaded and checked, as SAELens's is: seconds."""
        job = Extraction(
            self.model, self.tokenizer, self._path, sites=("resid_post",), layers=[_LAYER], context_length=_LENGTH,
            batch_size=_BATCH, dtype=torch.float32,
        )  # fmt: skip
        gc.collect()
        taken = seconds(lambda: job.run(self.texts))
        shutil.rmtree(self._path)
        return taken


def against_saelens(plan: Plan) -> Iterator[Row | Skip]:
    """One site and layer, float32, whole jobs, in turn; SAELens in an environment of its own."""
    python = plan.saelens_python
    if python is None:
        yield Skip("extract, SAELens", "no --saelens-python: a Python in whose environment sae-lens is installed")
        return
    _steady()
    ours = _Ours(plan)
    folder = plan.folder / "model"
    ours.model.save_pretrained(folder)  # type: ignore[operator]
    ours.tokenizer.save_pretrained(folder)
    np.save(folder / "texts.npy", np.stack(ours.texts))
    taken = {"ours": _Taken(), "stop": _Taken(), "whole": _Taken()}
    try:
        with _Saelens(python, folder, plan.folder / "saelens") as theirs:
            versions = json.loads(theirs.answer())
            # The first runs import, compile and allocate memory.
            ours.job()
            theirs.ask("run", "whole")
            for turn in range(plan.repeats):
                for name in list(taken)[:: -1 if turn % 2 else 1]:
                    bare, job = (lambda: theirs.ask("bare", "stop")), (lambda n=name: theirs.ask("run", n))
                    taken[name].measure(*((ours.bare, ours.job) if name == "ours" else (bare, job)))
    except RuntimeError as error:
        yield Skip("extract, SAELens", f"{python} failed: {error}")
        return
    said = f"CacheActivationsRunner (sae-lens {versions['sae-lens']}, torch {versions['torch']}), AutoModelForCausalLM"
    total = len(ours.texts) * _LENGTH
    yield from _rows("SAELens", total, f"{said}, as its users run it, synced", taken["ours"], taken["whole"])
    yield from _rows("SAELens stopped", total, f"{said}, given our early stop, synced", taken["ours"], taken["stop"])


def _rows(name: str, total: int, beside: str, ours: _Taken, theirs: _Taken) -> Iterator[Row]:
    """The rows of both sides' speed, and of their time beyond bare passes up to the layer wanted.

    SAELens runs Hugging Face models up to their logits; its time when stopped as early as ours is a separate row.
    """
    what = f"extract, one site and layer, float32, {total:,} tokens"
    rates = [[total / taken for taken in side.jobs] for side in (ours, theirs)]
    yield compare(f"extract, {name}", what, beside, "tokens/s", *rates, kind="peer", goal=1)
    ratio, spread = _ratio(ours.beyond(), theirs.beyond())
    shares = f"({ours.share():.1f} % of it, SAELens's {theirs.share():.1f} %)"
    yield Row(
        f"extract beyond forward, {name}", f"{what}: beyond the bare forward pass {shares}", beside, "peer", "ms",
        _middle(ours.beyond()), _middle(theirs.beyond()), ratio, spread, 4.0, None, tuple(ours.beyond()),
        tuple(theirs.beyond()),
    )  # fmt: skip


def _middle(beyond: Sequence[float]) -> float:
    return max(_LEAST_MS, statistics.median(beyond))


def _ratio(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The ratio of two medians, and its interquartile range over resamples of the repeats.

    Not the median of ratios: a difference of two passes may be near zero or negative, and its ratio anything.
    """
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(ours), (1000, len(ours)))
    sides = [np.maximum(_LEAST_MS, np.median(np.array(side)[picked], axis=1)) for side in (theirs, ours)]
    low, high = np.quantile(sides[0] / sides[1], [0.25, 0.75])
    return _middle(theirs) / _middle(ours), float(high - low)
