"""One process's work on a planned store: the batches that its missing shards need, in order.

Each batch is a function of the plan alone: batch number `b` is sequences `b * batch_size` to
`(b + 1) * batch_size`, padded on the right to the longest, whoever runs it and whenever.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmcache.block import Block
from mmcache.draft import remove_drafts
from mmcache.errors import NonFiniteError
from mmcache.flags import counted
from mmcache.format import ids_digest
from mmcache.geometry import PAGE
from mmcache.page_cache import PageCachePolicy
from mmcache.pipeline import SLOT_BYTES, Pipeline
from mmcache.room import bytes_to_write, check_room
from mmcache.shards import ShardFolder
from mmcache.staging import Stager

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from mmcache.capture import Captured
    from mmcache.manifest import Manifest

__all__ = ["Batches", "Fill", "NonFiniteWarning", "forward"]


class NonFiniteWarning(UserWarning):
    """NaN or infinity among the activations: counted and located, and left out of the statistics."""


class _Window:
    """A column read piece by piece: the last shard that was asked for is kept."""

    def __init__(self, path: Path, manifest: Manifest, array: str, rows: int) -> None:
        self._folder = ShardFolder(path, manifest, array, rows)
        self._block, self._rows = -1, np.empty(0)

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self._folder.spec.shard_rows
        parts = []
        while start < stop:
            block, row = divmod(start, size)
            if block != self._block:
                self._block, self._rows = block, self._folder.checked(0, block).numpy().copy()
            parts.append(self._rows[row : row + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


class Batches:
    """The batches of a plan, as token ids, in memory that does not grow with the corpus."""

    def __init__(self, path: Path, manifest: Manifest, batch_size: int) -> None:
        self._size, self._sequences = batch_size, manifest.n_sequences
        total = manifest.n_tokens or 0
        self._spans = _Window(path, manifest, "sequences", manifest.n_sequences)
        self._tokens = _Window(path, manifest, "tokens", total)
        self._flags = _Window(path, manifest, "flags", total)

    def spans(self) -> Iterator[np.ndarray]:
        """Give start, stop and document of the sequences of each batch: `[sequences, 3]`."""
        for first in range(0, self._sequences, self._size):
            yield self._spans.read(first, min(first + self._size, self._sequences))

    def ids(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give ids and attention mask of a batch: `[sequences, longest]` int64, padded on the right with 0."""
        lengths = spans[:, 1] - spans[:, 0]
        ids = np.zeros((len(spans), int(lengths.max())), np.int64)
        tokens = self._tokens.read(int(spans[0, 0]), int(spans[-1, 1]))
        for row, (start, stop) in enumerate(spans[:, :2] - spans[0, 0]):
            ids[row, : stop - start] = tokens[start:stop]
        return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)

    def digest(self, start: int, stop: int) -> str:
        """Hash the ids of some tokens, as a shard's header says them."""
        return ids_digest(self._tokens.read(start, stop))

    def keep(self, spans: np.ndarray) -> np.ndarray:
        """Tell which tokens of a batch count in the statistics: `[tokens]` bool."""
        return counted(self._flags.read(int(spans[0, 0]), int(spans[-1, 1])))


def forward(model: nn.Module, captured: Captured, ids: np.ndarray, mask: np.ndarray, device: torch.device) -> None:
    """Run one batch as far as the last wanted site; what was captured is in `captured`."""
    accepted = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    options: dict[str, Any] = {}
    if anything or "use_cache" in accepted:
        options["use_cache"] = False
    if anything or "attention_mask" in accepted:
        options["attention_mask"] = torch.from_numpy(mask).to(device)
    with torch.inference_mode():
        captured.run(model, torch.from_numpy(ids).to(device), **options)


class Fill:
    """Makes the missing shards of a plan.

    Args:
        path: the store.
        manifest: its plan.
        batches: its batches.
        run: runs one batch, given its spans: afterwards `captured` has its activations.
        captured: the sites.
        strict: refuse NaN and infinity instead of counting them.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        batches: Batches,
        run: Callable[[np.ndarray], None],
        captured: Captured,
        *,
        strict: bool,
    ) -> None:
        self._path, self._manifest, self._batches, self._run = path, manifest, batches, run
        self._captured, self._strict = captured, strict
        self._shard, self._total = manifest.shard_tokens or 1, manifest.n_tokens or 0
        self._block: Block | None = None
        self._bad: list[str] = []
        self._warned = False
        for site in manifest.sites:
            remove_drafts(path / site)
        self._missing = check_room(path, manifest)
        self._wanted: dict[int, set[tuple[str, int]]] = {}
        for site, shards in self._missing.items():
            for slot, block in shards:
                self._wanted.setdefault(block, set()).add((site, slot))
        self.bytes = bytes_to_write(manifest, self._missing)
        self.shards = sum(map(len, self._missing.values()))
        self.tokens = sum(self._rows_of(block) for block in self._wanted)

    def run(self, tell: Callable[[int, int], None]) -> None:
        """Fill what is missing; blocks until it is durable.

        Args:
            tell: called after each batch with the tokens that went into shards, and those that were run.
        """
        if not self._wanted:
            return
        policy = PageCachePolicy(self.bytes)
        pipeline = Pipeline(max(SLOT_BYTES, -(-self._manifest.widest_row() // PAGE) * PAGE))
        stager = Stager(pipeline)
        done = ran = 0
        try:
            for spans in self._needed():
                self._run(spans)
                done += self._scatter(spans, pipeline, stager, policy)
                ran += int(spans[-1, 1] - spans[0, 0])
                tell(done, ran)
                self._warn()
            pipeline.drain()
            self._warn()
        finally:
            pipeline.close()
            if self._block is not None:
                self._block.discard()

    def _rows_of(self, block: int) -> int:
        return min(self._shard, self._total - block * self._shard)

    def _needed(self) -> Iterator[np.ndarray]:
        """Give the batches that have rows in any of the shards that are missing."""
        last = max(self._wanted)
        for spans in self._batches.spans():
            first = int(spans[0, 0]) // self._shard
            if first > last:
                return
            if any(block in self._wanted for block in range(first, -(-int(spans[-1, 1]) // self._shard))):
                yield spans

    def _scatter(self, spans: np.ndarray, pipeline: Pipeline, stager: Stager, policy: PageCachePolicy) -> int:
        """Hand the rows of a batch to the blocks that they belong to; give how many were wanted."""
        acts = {site: self._captured[site] for site in self._manifest.sites if self._missing[site]}
        keep, base = self._batches.keep(spans), int(spans[0, 0])
        fresh = 0
        for row, (start, stop, _) in enumerate(spans.tolist()):
            at = start
            while at < stop:
                number = at // self._shard
                end = min(stop, (number + 1) * self._shard)
                if number in self._wanted:
                    block = self._open(number, start, policy)
                    part = slice(at - start, end - start)
                    rows = {site: [layer[row, part] for layer in layers] for site, layers in acts.items()}
                    block.append(stager, [(rows, keep[at - base : end - base])])
                    fresh += end - at
                    if block.rows == self._rows_of(number):
                        block.seal(pipeline, stager)
                        self._block = None
                at = end
        stager.settle()
        return fresh

    def _open(self, number: int, context: int, policy: PageCachePolicy) -> Block:
        """Give the block that is being filled; a new one begins in the context that begins at `context`."""
        if self._block is None:
            rows = self._rows_of(number)
            self._block = Block(
                self._path,
                self._manifest,
                number,
                policy,
                rows=rows,
                ids=self._batches.digest(context, number * self._shard + rows),
                only=self._wanted[number],
                inspect=self._inspect,
            )
        return self._block

    def _inspect(self, site: str, slot: int, statistics: Mapping[str, np.ndarray]) -> None:
        layers: Collection[int] = (
            self._manifest.layers if self._manifest.layout == "token" else (self._manifest.layers[slot],)
        )
        for number, layer in enumerate(layers):
            rows, first = int(statistics["non_finite"][number]), int(statistics["first_non_finite"][number])
            if not rows:
                continue
            lost = int(statistics["overflow"][number])
            cause = f", {lost} values of them lost in the cast to {self._manifest.dtype}" if lost else ""
            what = f"{site}, layer {layer}: {rows} rows that are not finite, the first at position {first}{cause}"
            if self._strict:
                raise NonFiniteError(f"{what}; leave strict off to store and count them")
            self._bad.append(what)

    def _warn(self) -> None:
        """Say once what the digest thread found first; all of it is in the statistics."""
        if self._bad and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._path}: {self._bad[0]}. Such rows are stored, counted and left out of the statistics; "
                f"`mmcache stats` lists them all",
                NonFiniteWarning,
                stacklevel=4,
            )
