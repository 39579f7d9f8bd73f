"""Extraction beside the bare forward pass, and beside SAELens's CacheActivationsRunner on the same model and text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.measure import Plan, Row, Skip, compare, seconds
from mmcache.capture import capture
from mmcache.fill import forward
from mmcache.job import Extraction
from mmcache.loading import load_tokenizer
from mmcache.manifest import read_manifest
from mmcache.token_batches import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["against_saelens", "extraction"]

_LENGTH, _BATCH, _LAYER = 512, 4, 6
_HOOK = f"transformer.h.{_LAYER}"
_SIDE = Path(__file__).with_name("saelens_side.py")


def _model(plan: Plan) -> nn.Module:
    """Build a model of GPT-2 small's shape, or a tiny one where a run is only to be tried; random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 -- an extra, and slow to import

    torch.manual_seed(0)
    # What a tiny run, such as a test's, can afford.
    tiny = {"n_embd": 64, "n_head": 4, "n_layer": 8} if plan.tokens < _LENGTH * _BATCH else {}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**tiny)).eval()
    return model


def _texts(plan: Plan) -> list[np.ndarray]:
    count = max(1, plan.tokens // _LENGTH)
    return list(np.random.default_rng(0).integers(0, 50000, (count, _LENGTH)))


def extraction(plan: Plan) -> Iterator[Row]:
    """`extract` of every layer's mlp_in and mlp_out, beside the forward passes alone."""
    model, tokenizer, device, texts = _model(plan), load_tokenizer("demo"), torch.device("cpu"), _texts(plan)
    ours, bare, full = [], [], []
    path = plan.folder / "extracted"
    for _ in range(plan.repeats):
        job = Extraction(model, tokenizer, path, context_length=_LENGTH, batch_size=_BATCH)
        planned: list[float] = []
        job.run(texts, planned=lambda _survey: planned.append(time.perf_counter()))  # noqa: B023 -- called at once
        ours.append(time.perf_counter() - planned[0])
        batches = Batches(path, read_manifest(path), _BATCH)
        with capture(model, ("mlp_in", "mlp_out"), stop=True) as captured:
            began = time.perf_counter()
            for spans in batches.spans():
                forward(model, captured, *batches.ids(spans), device)
            bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.inference_mode():
            for spans in batches.spans():
                ids, mask = map(torch.from_numpy, batches.ids(spans))
                model(ids, attention_mask=mask, use_cache=False)
        full.append(time.perf_counter() - began)
        shutil.rmtree(path)
    what = f"extract on CPU, GPT-2 small's shape, {len(texts) * _LENGTH:,} tokens, from the plan to durable"
    yield compare("extract", what, "bare forward, stopped at the same layer", "s", ours, bare, goal=1 / 1.08)
    yield compare("extract, logits", what, "full forward with logits", "s", ours, full)


def _bare(model: nn.Module, texts: list[np.ndarray]) -> float:
    def work() -> None:
        with capture(model, ("resid_post",), [_LAYER], stop=True) as captured:
            for start in range(0, len(texts), _BATCH):
                ids = np.stack(texts[start : start + _BATCH])
                forward(model, captured, ids, np.ones_like(ids), torch.device("cpu"))

    return seconds(work)


def against_saelens(plan: Plan) -> Iterator[Row | Skip]:
    """One site and layer, float32, whole jobs, in paired processes; SAELens in an environment of its own."""
    python = plan.saelens_python
    if python is None:
        yield Skip("extract, SAELens", "no --saelens-python: a Python in whose environment sae-lens is installed")
        return
    model, tokenizer, texts = _model(plan), load_tokenizer("demo"), _texts(plan)
    folder = plan.folder / "model"
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    np.save(folder / "texts.npy", np.stack(texts))
    found: dict[str, list[float]] = {"ours": [], "bare": [], "theirs": [], "their bare": []}
    version = ""
    for _ in range(min(plan.repeats, 3)):
        path = plan.folder / "one-layer"
        job = Extraction(
            model, tokenizer, path, sites=("resid_post",), layers=[_LAYER], context_length=_LENGTH, batch_size=_BATCH,
            dtype=torch.float32,
        )  # fmt: skip
        found["ours"].append(seconds(lambda: job.run(texts)))  # noqa: B023 -- called at once
        found["bare"].append(_bare(model, texts))
        shutil.rmtree(path)
        done = subprocess.run(  # noqa: S603 -- the Python that was asked for
            [python, str(_SIDE), str(folder), str(plan.folder / "saelens"), _HOOK, str(_BATCH)],
            capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            yield Skip("extract, SAELens", f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
            return
        said = json.loads(done.stdout.splitlines()[-1])
        found["theirs"].append(said["runner"])
        found["their bare"].append(said["bare"])
        version = said["version"]
        shutil.rmtree(plan.folder / "saelens")
    total = len(texts) * _LENGTH
    beside = f"CacheActivationsRunner (sae-lens {version}), AutoModelForCausalLM, given the same early stop, synced"
    what = f"extract, one site and layer, float32, {total:,} tokens"
    rates = {name: [total / taken for taken in found[name]] for name in ("ours", "theirs")}
    yield compare("extract, SAELens", what, beside, "tokens/s", rates["ours"], rates["theirs"], kind="peer", goal=1)
    beyond = {
        name: [max(0.1, (job / bare - 1) * 100) for job, bare in zip(found[name], found[other], strict=True)]
        for name, other in (("ours", "bare"), ("theirs", "their bare"))
    }
    yield compare(
        "extract beyond forward, SAELens", f"{what}: beyond the bare forward pass", beside, "%", beyond["ours"],
        beyond["theirs"], kind="peer", goal=4,
    )  # fmt: skip
