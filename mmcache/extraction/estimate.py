"""What a job will take, before it takes it: tokens, bytes, room and time; and the batch size that is quickest."""

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
# A larger batch has to be this much quicker to be worth its memory.
_WORTH = 1.05
_MEASURED_BATCHES = 3


@dataclass(frozen=True)
class Survey:
    """What a job will take.

    `sites` maps each site to its width; `bytes_a_token` is what all sites and layers take for one token,
    `bytes_to_do` and `shards_to_do` what is missing of `total_bytes` and `shards`; `seconds` is an estimate from
    a few measured batches, None where none was measured. `staging` is the folder in which shards wait to be sent to a
    bucket, None for a store of this machine's; there `free_bytes` are that folder's. `framed` documents bring special
    tokens themselves which would be put around them.
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
    """Add up a plan; `to_do` is what is missing in bytes, shards and tokens, None for all of it."""
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
    """Say what is left to do of a plan."""
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
    """Say what a job that is not planned yet would take; writes nothing, and runs the first three batches.

    Args:
        path: where the store would be.
        settings: what is asked for.
        contexts: cuts documents,
        texts: these, up to `max_tokens`.
        batch_size: contexts a batch.
        run: runs one batch of ids and attention mask.
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
    """Measure tokens a second; the first batch, which warms up, is left out where there are others."""
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
    """Find the batch size with the most tokens a second: doubled until that no longer pays, or memory ends.

    Blocks for a few forward passes of `length` tokens each.
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
