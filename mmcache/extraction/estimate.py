"""Predict a job's tokens, bytes, disk space and time before it runs; find the fastest batch size."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcache.extraction.runner import forward
from mmcache.extraction.special_tokens import warn_of_missing
from mmcache.extraction.tokenization import Tokenised
from mmcache.format.manifest import NEW_STORES, Manifest
from mmcache.format.shard import shard_rows
from mmcache.system.files import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import nn

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.runner import ShardFiller
    from mmcache.extraction.settings import Settings
    from mmcache.extraction.tokenization import Contexts
    from mmcache.models.capture import Captured

__all__ = ["Survey", "quickest_batch", "survey_contexts", "survey_plan"]

_LARGEST_BATCH = 256
# A larger batch has to be faster by this factor to be worth its memory.
_WORTH = 1.05
_MEASURED_BATCHES = 3


@dataclass(frozen=True)
class Survey:
    """The size, work and estimated time of a job.

    `sites` maps each site to its width; `bytes_a_token` counts all sites and layers for one token; `bytes_to_do` and
    `shards_to_do` are the missing part of `total_bytes` and `shards`; `seconds` is an estimate from a few measured
    batches, None if none was measured. `staging` is the folder in which shards wait for upload to a bucket, None for a
    local store; `free_bytes` is then that of the staging folder. `framed` counts the documents that already have
    special tokens which would be put around them.
    """

    tokens: int
    sequences: int
    sites: dict[str, int]
    layers: tuple[int, ...]
    dtype: str
    layout: str
    batch_size: int
    bytes_a_token: int
    total_bytes: int
    bytes_to_do: int
    free_bytes: int
    shards: int
    shards_to_do: int
    tokens_to_do: int
    tokens_a_second: float | None = None
    seconds: float | None = None
    staging: str | None = None
    framed: int = 0


def _survey(path: Path, plan: Manifest, batch_size: int, to_do: tuple[int, int, int] | None = None) -> Survey:
    """The survey of a plan; `to_do` is what is missing in bytes, shards and tokens, None for all."""
    size = sum(plan.array_bytes(site) for site in plan.sites)
    shards = sum(plan.n_shards(site) for site in plan.sites)
    bytes_to_do, shards_to_do, tokens_to_do = to_do or (size, shards, plan.n_tokens or 0)
    return Survey(
        tokens=plan.n_tokens or 0,
        sequences=plan.n_sequences,
        sites={site: width or 0 for site, width in plan.sites.items()},
        layers=plan.layers,
        dtype=plan.dtype or "",
        layout=plan.layout,
        batch_size=batch_size,
        bytes_a_token=plan.token_bytes(),
        total_bytes=size,
        bytes_to_do=bytes_to_do,
        free_bytes=free_bytes(path),
        shards=shards,
        shards_to_do=shards_to_do,
        tokens_to_do=tokens_to_do,
    )


def survey_plan(path: Path, manifest: Manifest, fill: ShardFiller, batch_size: int) -> Survey:
    """The survey of a plan, with what is left to do."""
    found = _survey(path, manifest, batch_size, (fill.bytes, fill.shards, fill.tokens))
    return replace(found, framed=Tokenised.of(manifest).framed)


def survey_contexts(
    path: Path,
    settings: Settings,
    contexts: Contexts,
    texts: Iterable[Document],
    batch_size: int,
    run: Callable[[np.ndarray, np.ndarray], None],
) -> Survey:
    """The survey of a job that is not planned yet; writes nothing, and runs the first three batches.

    Args:
        path: where the store would be.
        settings: those of the job.
        contexts: cuts documents into contexts.
        texts: the documents, read up to `max_tokens`.
        batch_size: contexts per batch.
        run: runs one batch, given ids and attention mask.
    """
    tokens = sequences = framed = 0
    first: list[np.ndarray] = []
    warn_of_missing(contexts.frame)
    for context in contexts.cut(texts):
        if settings.max_tokens is not None and tokens + len(context.tokens) > settings.max_tokens:
            break
        tokens, sequences, framed = tokens + len(context.tokens), sequences + 1, framed + context.framed
        if len(first) < batch_size * _MEASURED_BATCHES:
            first.append(context.tokens)
    plan = Manifest(
        kind="planned",
        store="",
        layout=settings.layout,
        dtype=settings.dtype,
        sites=dict(settings.widths),
        layers=settings.layers,
        n_tokens=tokens,
        n_sequences=sequences,
        uses=NEW_STORES,
    ).with_geometry(shard_rows(settings.row_bytes(settings.widths), settings.shard_tokens, tokens), tokens)
    groups = [first[at : at + batch_size] for at in range(0, len(first), batch_size)]
    if settings.equal_lengths:
        groups = [list(run) for group in groups for _, run in itertools.groupby(group, len)]
    rate = _rate(groups, run)
    seconds = tokens / rate if rate else None
    return replace(_survey(path, plan, batch_size), tokens_a_second=rate, seconds=seconds, framed=framed)


def _rate(batches: list[list[np.ndarray]], run: Callable[[np.ndarray, np.ndarray], None]) -> float | None:
    """Tokens per second, measured; None without batches. The first batch is a warm-up if there are others."""
    taken = []
    for batch in batches:
        longest = max(map(len, batch))
        ids = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens in batch]).astype(np.int64)
        mask = np.stack([np.arange(longest) < len(tokens) for tokens in batch]).astype(np.int64)
        began = time.perf_counter()
        run(ids, mask)
        taken.append((sum(map(len, batch)), time.perf_counter() - began))
    counted = taken[1:] or taken
    return sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted) if counted else None


def quickest_batch(model: nn.Module, captured: Captured, length: int, device: torch.device) -> int:
    """The batch size with the most tokens per second: doubled until that no longer pays, or memory runs out.

    Blocks for two forward passes at each size, of contexts of `length` tokens.
    """
    best, best_rate = 1, 0.0
    for size in itertools.takewhile(lambda size: size <= _LARGEST_BATCH, (1 << power for power in range(20))):
        ids, mask = np.zeros((size, length), np.int64), np.ones((size, length), np.int64)
        try:
            # The first pass at each size warms up, the second one counts.
            for _ in range(2):
                began = time.perf_counter()
                forward(model, captured, ids, mask, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken = time.perf_counter() - began
        except torch.OutOfMemoryError:
            break
        rate = size * length / taken
        if rate < best_rate * _WORTH:
            break
        best, best_rate = size, rate
    return best
