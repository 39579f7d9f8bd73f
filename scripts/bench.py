"""Ratios, measured side by side in one run, each beside the physical limit. Prints a table and writes JSON.

Usage: .venv/bin/python scripts/bench.py [--folder DIR] [--repeats N] [--tokens N] [--json FILE]

Writes are counted to the end of the sync. Repeats are interleaved: a machine that slows down slows both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mmcache
from mmcache.capture import capture
from mmcache.extract import Extraction
from mmcache.files import Draft, map_file
from mmcache.fill import Batches, forward
from mmcache.loading import load_tokenizer
from mmcache.manifest import read_manifest
from mmcache.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

_RAW_WRITE = 8 << 20


@dataclass(frozen=True)
class Row:
    """One comparison: ours over the limit, in the medians of interleaved repeats."""

    what: str
    limit: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    spread: float


def compare(what: str, limit: str, unit: str, ours: list[float], theirs: list[float]) -> Row:
    """Compare the medians; `spread` is the range of the paired ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ours) / statistics.median(theirs)
    return Row(what, limit, unit, statistics.median(ours), statistics.median(theirs), ratio, max(ratios) - min(ratios))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give an empty folder on the disk to be measured, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="mmcache-bench-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def raw_write(folder: Path, total: int) -> float:
    """Write `total` bytes past the page cache in pieces of 8 MiB, one thread, and sync: GB/s."""
    block = anonymous(_RAW_WRITE)
    block[:] = np.random.default_rng(0).integers(0, 255, _RAW_WRITE, dtype=np.uint8)
    began = time.perf_counter()
    draft = Draft(folder / "raw", reserve=total, direct=True)
    for offset in range(0, total, _RAW_WRITE):
        draft.write(block, offset)
    draft.publish(total)
    taken = time.perf_counter() - began
    (folder / "raw").unlink()
    return total / taken / 1e9


def bench_push(folder: Path, repeats: int) -> Row:
    """Compare pushing 32 layers of `[16384, 2048]` bfloat16, to durable, with the raw device."""
    layer = torch.randn(16384, 2048).bfloat16()
    ours, theirs = [], []
    for _ in range(repeats):
        with scratch(folder) as path:
            began = time.perf_counter()
            with mmcache.FullActivationCache.with_capacity(32, path / "cache") as cache:
                for _layer in range(32):
                    cache.push(layer)
            ours.append(32 * layer.nbytes / (time.perf_counter() - began) / 1e9)
            theirs.append(raw_write(path, 32 * layer.nbytes))
    return compare("push to durable, 2 GiB bf16", "raw direct write, 8 MiB, 1 thread", "GB/s", ours, theirs)


def bench_rows(folder: Path, repeats: int) -> Row:
    """Compare a warm `get_position` with cloning a row of a plain mapped tensor."""
    rows, width, count = 16384, 2048, 5000
    order = np.random.default_rng(0).integers(0, rows, count).tolist()
    ours: list[float] = []
    theirs: list[float] = []
    with scratch(folder) as path:
        with mmcache.FullActivationCache.with_capacity(1, path / "cache") as cache:
            cache.push(torch.randn(rows, width).bfloat16())
        cache = mmcache.FullActivationCache.open(path / "cache")
        pages = map_file(path / "cache" / "resid_post" / "c.0.0.0", what="the shard")
        plain = torch.from_numpy(pages[4096 : 4096 + rows * width * 2]).view(torch.bfloat16).view(rows, width)
        readers: list[tuple[list[float], Callable[[int], torch.Tensor]]] = [
            (ours, lambda row: cache.get_position(0, row)),
            (theirs, lambda row: plain[row].clone()),
        ]
        for turn in range(repeats + 1):
            for taken, read in readers:
                began = time.perf_counter()
                for row in order:
                    read(row)
                # The first turn faults the pages in.
                if turn:
                    taken.append((time.perf_counter() - began) / count * 1e6)
        cache.close()
    return compare("warm get_position, 4 KiB row", "clone of a row of a mapped tensor", "us", ours, theirs)


def gpt2_small() -> nn.Module:
    """Build a model of GPT-2 small's shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 -- an extra, and slow to import

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config()).eval()
    return model


def bench_extract(folder: Path, repeats: int, tokens: int) -> list[Row]:
    """Compare `extract` with the forward passes alone: stopped at the same layer, and whole with logits."""
    model, tokenizer, device = gpt2_small(), load_tokenizer("demo"), torch.device("cpu")
    length, batch = 512, 4
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 50000, length) for _ in range(-(-tokens // length))]
    ours: list[float] = []
    bare: list[float] = []
    full: list[float] = []
    for _ in range(repeats):
        with scratch(folder) as path:
            job = Extraction(model, tokenizer, path / "acts", context_length=length, batch_size=batch)
            surveyed: list[float] = []
            job.run(texts, planned=lambda _survey: surveyed.append(time.perf_counter()))  # noqa: B023 -- called at once
            ours.append(time.perf_counter() - surveyed[0])
            batches = Batches(path / "acts", read_manifest(path / "acts"), batch)
            began = time.perf_counter()
            with capture(model, ("mlp_in", "mlp_out"), stop=True) as captured:
                for spans in batches.spans():
                    forward(model, captured, *batches.ids(spans), device)
            bare.append(time.perf_counter() - began)
            began = time.perf_counter()
            with torch.inference_mode():
                for spans in batches.spans():
                    ids, mask = map(torch.from_numpy, batches.ids(spans))
                    model(ids, attention_mask=mask, use_cache=False)
            full.append(time.perf_counter() - began)
    what = f"extract, GPT-2 small's shape, {len(texts) * length} tokens"
    return [
        compare(what, "bare forward, stopped at the same layer", "s", ours, bare),
        compare(what, "full forward with logits", "s", ours, full),
    ]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on that disk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12288, help="tokens to extract")
    parser.add_argument("--json", type=Path, help="where to write the results")
    given = parser.parse_args()
    rows = [bench_rows(given.folder, given.repeats), bench_push(given.folder, given.repeats)]
    rows += bench_extract(given.folder, given.repeats, given.tokens)
    table = Table(title=f"{os.cpu_count()} cores, torch {torch.__version__}, medians of {given.repeats}")
    for name in ("what", "limit", "unit", "ours", "theirs", "ratio", "spread"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
