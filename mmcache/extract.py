"""The job that fills a store from a model and text: plan, fill, resume.

Each batch is a function of the plan alone: batch number `b` is sequences `b * batch_size` to
`(b + 1) * batch_size`, padded on the right to the longest, whoever runs it and whenever.
"""

from __future__ import annotations

import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mmcache.block import Block, PageCachePolicy
from mmcache.capture import capture, probe
from mmcache.columns import BOS, SPECIAL
from mmcache.dtypes import activation_dtype
from mmcache.errors import ArgumentError
from mmcache.files import remove_drafts
from mmcache.geometry import PAGE
from mmcache.pipeline import SLOT_BYTES, Pipeline
from mmcache.plan import Settings, bytes_to_write, check_room, open_plan
from mmcache.provenance import model_identity, numerics, site_identity, tokenizer_digest
from mmcache.sites import resolve, unwrap
from mmcache.staging import Stager
from mmcache.store import Store, open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from mmcache.capture import Captured
    from mmcache.manifest import Manifest

__all__ = ["Progress", "extract"]

_DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    `phase` is `"tokenise"` or `"extract"`; `tokens` of `total` (0: not known yet) are done, in this run or
    before; `run_tokens` went through the model in this run, and `bytes` were handed to the disk, in `seconds`.
    """

    phase: Literal["tokenise", "extract"]
    tokens: int
    total: int
    run_tokens: int
    bytes: int
    seconds: float


def extract(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    path: str | os.PathLike[str],
    *,
    sites: Sequence[str] = ("mlp_in", "mlp_out"),
    layers: Sequence[int] | None = None,
    context_length: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: Literal["layer", "token"] = "token",
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    accept_numerics: bool = False,
    record: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Run a model over text and store its activations; blocks until the store is complete.

    Called again with the same arguments after an interruption it goes on with the shards that are missing.
    Any number of processes may run the same job on one path after it is planned.

    Args:
        model: a language model; it is run in eval mode, under `torch.inference_mode`, up to the last layer
            that is wanted. It computes in its own dtype.
        tokenizer: a Hugging Face tokenizer.
        texts: documents. Each is cut into contexts, with the special tokens that the tokenizer wants.
        path: the store, new or to be gone on with.
        sites: what to store, as in `mmcache.capture`.
        layers: the model's own layer numbers; None for all.
        context_length: tokens a context at most; None for 1,024, or what the model can do if that is less.
        batch_size: contexts a forward pass.
        dtype: the storage dtype.
        layout: `"token"` (training) or `"layer"`.
        shard_tokens: tokens a shard where the default (256 MiB of the widest site) does not fit.
        max_tokens: store whole contexts up to this many tokens; None for all.
        device: where the model runs; None for where it is.
        accept_numerics: go on with a store although batch size, device, threads or versions differ.
        record: anything JSON keeps, stored beside the provenance and never compared.
        progress: called after each batch.

    Raises:
        UnknownSiteError, UnsupportedModelError, OutOfRangeError, ArgumentError, DtypeError: the arguments make
            no sense for this model; nothing is written.
        PlanMismatchError: the store at `path` was planned with other settings, which are listed.
        CorpusError: the texts cannot be read as text. DiskFullError: they will not fit; the numbers are given.
        WriteError: the disk refused. Shards that were published stay.
    """
    folder = Path(path)
    inner = unwrap(model)
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size!r}: expected a positive number of contexts")
    if device is not None:
        inner.to(device)
    resolved = resolve(inner, sites, layers)
    began = time.monotonic()

    def tell(phase: Literal["tokenise", "extract"], done: int, total: int, ran: int, size: int) -> None:
        if progress is not None:
            progress(Progress(phase, done, total, ran, size, time.monotonic() - began))

    with _evaluating(inner):
        length = _context_length(inner, context_length)
        where = next((weight.device for weight in inner.parameters()), torch.device("cpu"))
        settings = Settings(
            identity={
                **model_identity(inner),
                "tokenizer": tokenizer_digest(tokenizer),
                **site_identity(resolved),
                "context_length": length,
                "max_tokens": max_tokens,
                "compute_dtype": str(next((w.dtype for w in inner.parameters()), None)).removeprefix("torch."),
                "dtype": activation_dtype(dtype).name,
                "layout": _checked_layout(layout),
                "shard_tokens": shard_tokens,
            },
            numerics=numerics(inner, where, batch_size),
            record=record or {},
            widths=probe(inner, sites, layers),
            layers=resolved[0].layers,
            dtype=activation_dtype(dtype).name,
            layout=layout,
            shard_tokens=shard_tokens,
            context_length=length,
            max_tokens=max_tokens,
            special_tokens=tuple(sorted(tokenizer.all_special_ids)),
        )
        manifest = open_plan(
            folder,
            settings,
            tokenizer,
            texts,
            accept_numerics=accept_numerics,
            tokenised=lambda tokens: tell("tokenise", tokens, 0, 0, 0),
        )
        with capture(inner, sites, layers, stop=True) as captured:
            fill = _Fill(folder, manifest, inner, captured, where, batch_size)
            fill.run(lambda done, ran, size: tell("extract", done, manifest.n_tokens or 0, ran, size))
    return open_store(folder)


def _checked_layout(layout: str) -> str:
    if layout not in ("layer", "token"):
        raise ArgumentError(f"layout is {layout!r}: expected 'layer' or 'token'")
    return layout


def _context_length(model: nn.Module, asked: int | None) -> int:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if asked is None:
        return min(_DEFAULT_CONTEXT, most or _DEFAULT_CONTEXT)
    if asked < 1 or (most is not None and asked > most):
        raise ArgumentError(f"context_length is {asked}: expected 1 to {most or 'any number'}, what the model can do")
    return asked


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module of it back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Fill:
    """One process's work on a planned store: the batches that the missing shards need, in order."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        model: nn.Module,
        captured: Captured,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self._path, self._manifest, self._model = path, manifest, model
        self._captured, self._device, self._batch_size = captured, device, batch_size
        self._shard = manifest.shard_tokens or 1
        self._total = manifest.n_tokens or 0
        store = open_store(path, partial=True)
        self._spans = store.sequences.numpy()
        self._tokens, self._flags = store.tokens.numpy(), store.flags.numpy()
        accepted = set(inspect.signature(model.forward).parameters)
        anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
        self._options = {"use_cache": False} if anything or "use_cache" in accepted else {}
        self._masked = anything or "attention_mask" in accepted
        self._block: Block | None = None

    def run(self, tell: Callable[[int, int, int], None]) -> None:
        """Fill what is missing; blocks until it is durable."""
        for site in self._manifest.sites:
            remove_drafts(self._path / site)
        missing = check_room(self._path, self._manifest)
        wanted: dict[int, set[tuple[str, int]]] = {}
        for site, shards in missing.items():
            for slot, block in shards:
                wanted.setdefault(block, set()).add((site, slot))
        if not wanted:
            return
        policy = PageCachePolicy(bytes_to_write(self._manifest, missing))
        row = max(self._manifest.spec(site).row_bytes for site in self._manifest.sites)
        pipeline = Pipeline(max(SLOT_BYTES, -(-row // PAGE) * PAGE))
        stager = Stager(pipeline)
        there = self._total - sum(self._rows_of(block) for block in wanted)
        done = ran = size = 0
        token_bytes = sum(self._manifest.spec(site).row_bytes * len(self._manifest.slots(site)) for site in missing)
        try:
            for first, last in self._batches(set(wanted)):
                self._forward(first, last)
                fresh = self._scatter(first, last, wanted, pipeline, stager, policy)
                done, ran = done + fresh, ran + int(self._spans[last - 1, 1] - self._spans[first, 0])
                size += fresh * token_bytes
                tell(there + done, ran, size)
            pipeline.drain()
        finally:
            pipeline.close()
            if self._block is not None:
                self._block.discard()

    def _rows_of(self, block: int) -> int:
        return min(self._shard, self._total - block * self._shard)

    def _batches(self, blocks: set[int]) -> Iterator[tuple[int, int]]:
        """Give the batches (first and behind the last sequence) that have rows in any of `blocks`."""
        for first in range(0, len(self._spans), self._batch_size):
            last = min(first + self._batch_size, len(self._spans))
            start, stop = int(self._spans[first, 0]), int(self._spans[last - 1, 1])
            if any(block in blocks for block in range(start // self._shard, -(-stop // self._shard))):
                yield first, last

    def _forward(self, first: int, last: int) -> None:
        """Run one batch, padded on the right whatever the tokenizer prefers, as far as the last wanted site."""
        spans = self._spans[first:last]
        lengths = spans[:, 1] - spans[:, 0]
        ids = np.zeros((last - first, int(lengths.max())), np.int64)
        for row, (start, stop, _) in enumerate(spans):
            ids[row, : stop - start] = self._tokens[start:stop]
        options: dict[str, Any] = dict(self._options)
        if self._masked:
            mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
            options["attention_mask"] = mask.to(self._device)
        with torch.inference_mode():
            self._captured.run(self._model, torch.from_numpy(ids).to(self._device), **options)

    def _scatter(
        self,
        first: int,
        last: int,
        wanted: dict[int, set[tuple[str, int]]],
        pipeline: Pipeline,
        stager: Stager,
        policy: PageCachePolicy,
    ) -> int:
        """Hand the rows of a batch to the blocks that they belong to; give how many were wanted."""
        acts = {site: self._captured[site] for site in self._manifest.sites}
        fresh = 0
        for row, (start, stop, _) in enumerate(self._spans[first:last].tolist()):
            at = start
            while at < stop:
                number = at // self._shard
                end = min(stop, (number + 1) * self._shard)
                if number in wanted:
                    block = self._open(number, wanted[number], policy)
                    keep = (self._flags[at:end] & (BOS | SPECIAL)) == 0
                    part = slice(at - start, end - start)
                    rows = {site: [layer[row, part] for layer in layers] for site, layers in acts.items()}
                    block.append(stager, rows, keep)
                    fresh += end - at
                    if block.rows == self._rows_of(number):
                        block.seal(pipeline, stager)
                        self._block = None
                at = end
        stager.settle()
        return fresh

    def _open(self, number: int, shards: set[tuple[str, int]], policy: PageCachePolicy) -> Block:
        if self._block is None:
            self._block = Block(self._path, self._manifest, number, policy, rows=self._rows_of(number), only=shards)
        return self._block
