"""`ShardFiller`: run the batches that a worker's missing shards need, and write the shards.

Each batch depends on the plan alone, not on who runs it or when: batch `b` is sequences `b * batch_size` to
`(b + 1) * batch_size`, padded on the right to the longest. If the plan has `equal_lengths`, because padding would
change the activations, the batch is run in parts: runs of consecutive sequences of one length.
"""

from __future__ import annotations

import bisect
import inspect
import time
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mmcache.errors import NonFiniteError, PlanMismatchError
from mmcache.extraction.missing_shards import bytes_to_write, check_room
from mmcache.extraction.scheduling import BlockScheduler
from mmcache.format.manifest import read_manifest
from mmcache.format.shard import Layout, ids_digest
from mmcache.format.token_flags import counted
from mmcache.models.inference import running
from mmcache.stats.moments import WHOLE_ROWS
from mmcache.storage.listing import is_there
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.arguments import outside
from mmcache.system.memory import PAGE
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.pipeline import SLOT_BYTES, Pipeline
from mmcache.write.shard_writer import BlockWriter
from mmcache.write.staging import Stager

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from mmcache.extraction.bucket_upload import BucketOutput
    from mmcache.format.manifest import Manifest
    from mmcache.models.capture import Captured
    from mmcache.system.launcher import Rank

__all__ = ["Batches", "NonFiniteWarning", "ShardFiller", "forward"]

# Seconds between two looks at other workers' shards: first, and at most.
_LOOK_AGAIN, _LOOK_AT_LAST = 1.0, 30.0
# The smallest slot (two huge pages); and a job of fewer than this many full slots gets smaller ones.
_LEAST_SLOT, _SLOTS_A_JOB = 4 << 20, 16


class TellProgress(Protocol):
    """Callback for the progress of a job."""

    def __call__(self, done: int, ran: int, *, waits: bool) -> None:
        """`done` and `ran`: tokens in shards, and run in this process. `waits`: waiting for other workers."""


class NonFiniteWarning(UserWarning):
    """NaN or infinity among the activations. Such rows are counted, located, and left out of the statistics."""


def forward(model: nn.Module, captured: Captured, ids: np.ndarray, mask: np.ndarray, device: torch.device) -> Any:
    """Run one batch, to the last wanted site if `captured` stops there. Returns the model's output, or None then."""
    accepted = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    options: dict[str, Any] = {}
    if anything or "use_cache" in accepted:
        options["use_cache"] = False
    if anything or "attention_mask" in accepted:
        options["attention_mask"] = torch.from_numpy(mask).to(device)
    given = torch.from_numpy(ids).to(device)
    with torch.inference_mode(), running(model, given):
        return captured.run(model, given, **options)


def _slot_bytes(total: int, row: int) -> int:
    """The size of a staging slot for a job of `total` bytes in rows of `row` bytes.

    The first use of memory costs more than the copy into it, so a small job gets small slots, which are reused sooner.
    """
    small = max(_LEAST_SLOT, total // _SLOTS_A_JOB, WHOLE_ROWS * row)
    return -(-max(min(small, SLOT_BYTES), row) // PAGE) * PAGE


class ShardFiller:
    """Makes the missing shards of a plan.

    Args:
        path: the store.
        manifest: its plan.
        batches: its batches.
        run: runs one batch, given its spans; then `captured` has its activations.
        captured: the activations of the sites.
        strict: refuse NaN and infinity instead of counting them.
        rank: this worker's number, and the number of workers.
        outgoing: uploads the shards, if `path` is a staging folder.
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
        rank: Rank,
        outgoing: BucketOutput | None = None,
    ) -> None:
        self._path, self._manifest, self._batches, self._run = path, manifest, batches, run
        self._captured, self._strict = captured, strict
        self.batch_size = batches.size
        self._shard, self._total = manifest.shard_tokens or 1, manifest.n_tokens or 0
        self._block: BlockWriter | None = None
        self._bad: list[str] = []
        self._warned = False
        self._rank, self._outgoing = rank, outgoing
        self._where = str(path) if outgoing is None else outgoing.url
        self._turns = BlockScheduler(path, manifest, rank, (lambda: None) if outgoing is None else outgoing.refresh)
        missing = self._turns.missing
        # Without the blocks that others are making: those have their room already.
        free = {site: shards & ~self._turns.held for site, shards in missing.items()}
        if outgoing is None:
            check_room(path, manifest, free)
        else:
            outgoing.check_room(free)
        self.bytes = bytes_to_write(manifest, missing)
        self.shards = sum(int(shards.sum()) for shards in missing.values())
        self.tokens = self._tokens_of(self._turns.wanted)

    def run(self, tell: TellProgress, only: np.ndarray | None = None) -> None:
        """Make the missing shards; blocks until they are durable, including those of other workers.

        Args:
            tell: called after each batch, and while waiting; with several workers, `done` counts all of them.
            only: make only these blocks, ascending; None for all.
        """
        if not self.shards:
            return
        self._policy = PageCachePolicy(busy=True)
        self._pipeline = Pipeline(_slot_bytes(self.bytes, self._manifest.widest_row()))
        self._stager = Stager(self._pipeline)
        self._told, self._done, self._ran = time.monotonic(), 0, 0
        try:
            if only is None:
                self._take_turns(tell)
            else:
                self._make(only[self._turns.wanted[only]], tell)
            self._pipeline.drain()
            self._warn()
        finally:
            self._pipeline.close()
            if self._block is not None:
                self._block.discard()

    def _take_turns(self, tell: TellProgress) -> None:
        pause = 0.0
        while self._turns.wanted.any():
            turn = self._turns.take()
            if len(turn):
                self._make(turn, tell)
                pause = 0.0
            else:
                # The rest is being made, here or by others, who may still die.
                self._pipeline.drain()
                time.sleep(pause)
                self._tell(tell, waits=pause > 0)
                pause = min(max(_LOOK_AGAIN, 1.5 * pause), _LOOK_AT_LAST)
            self._turns.look()
        if self._rank.of > 1:
            tell(self.tokens, self._ran, waits=False)

    def _make(self, turn: np.ndarray, tell: TellProgress) -> None:
        """Make some blocks; stops at one that another worker has made meanwhile."""
        self._turn = np.zeros_like(self._turns.wanted)
        self._turn[turn] = True
        for spans in self._needed():
            self._run(spans)
            self._scatter(spans)
            self._ran += int(spans[-1, 1] - spans[0, 0])
            self._tell(tell)
            self._warn()

    def _tell(self, tell: TellProgress, *, waits: bool = False) -> None:
        """Report progress. With several workers, those that lead list the store at intervals, to report all shards."""
        if self._rank.of == 1:
            tell(self._done, self._ran, waits=waits)
            return
        began = time.monotonic()
        if began >= self._told and self._rank.leads:
            self._turns.look()
            self._told = began + max(_LOOK_AGAIN, 50 * (time.monotonic() - began))
        tell(self.tokens - self._tokens_of(self._turns.wanted), self._ran, waits=waits)

    def _tokens_of(self, blocks: np.ndarray) -> int:
        """The number of tokens in some blocks: `[blocks]` bool."""
        return int(blocks[:-1].sum()) * self._shard + int(blocks[-1:].sum()) * self._rows_of(len(blocks) - 1)

    def _rows_of(self, block: int) -> int:
        return min(self._shard, self._total - block * self._shard)

    def _needed(self) -> Iterator[np.ndarray]:
        """The batches that have rows in any block of this turn, which may end early."""
        first = int(self._turn.argmax())
        for spans in self._batches.spans(first * self._shard):
            block = int(spans[0, 0]) // self._shard
            if not self._turn[block:].any():
                return
            if self._turn[block : -(-int(spans[-1, 1]) // self._shard)].any():
                yield spans

    def _scatter(self, spans: np.ndarray) -> None:
        """Append the rows of a batch to the blocks that they belong to."""
        acts = {site: self._captured[site] for site in self._turns.missing}
        keep, base = self._batches.keep(spans), int(spans[0, 0])
        for row, (start, stop, _) in enumerate(spans.tolist()):
            at = start
            while at < stop:
                number = at // self._shard
                end = min(stop, (number + 1) * self._shard)
                block = self._open(number, start) if self._turn[number] else None
                if block is not None:
                    part = slice(at - start, end - start)
                    rows = {site: [layer[row, part] for layer in layers] for site, layers in acts.items()}
                    block.append(self._stager, [(rows, keep[at - base : end - base])])
                    self._done += end - at
                    if block.rows == self._rows_of(number):
                        self._seal(block)
                at = end
        self._stager.settle()

    def _open(self, number: int, context: int) -> BlockWriter | None:
        """The block that is being filled, or a new one; `context` is the start of the context that it begins in.

        None if another worker has made some of it since the last look; then the turn ends.
        """
        if self._block is None:
            missing = self._turns.missing.items()
            only = {(site, slot) for site, shards in missing for slot in np.flatnonzero(shards[:, number]).tolist()}
            self._check_plan()
            rows = self._rows_of(number)
            if not self._may_make(number, rows, only):
                self._turn[number:] = False
                return None
            self._block = BlockWriter(
                self._path,
                self._manifest,
                number,
                self._policy,
                rows=rows,
                ids=self._batches.digest(context, number * self._shard + rows),
                only=only,
                inspect=self._inspect,
                published=None if self._outgoing is None else self._outgoing.published,
            )
        return self._block

    def _may_make(self, number: int, rows: int, only: set[tuple[str, int]]) -> bool:
        """Whether no other worker has made any of a block. For a bucket, also reserves room for it."""
        if self._outgoing is not None:
            self._outgoing.refresh()
        if not only or self._begun(number, only):
            return False
        if self._outgoing is not None:
            files = {
                self._path / site / self._manifest.shard_key(site, number, slot): Layout(
                    self._manifest.spec(site), rows
                ).size
                for site, slot in only
            }
            self._outgoing.reserve(files, self._pipeline.check)
            # Checked again: the wait for room may have been long.
            if self._begun(number, only):
                self._outgoing.release(files)
                return False
        return True

    def _begun(self, number: int, only: set[tuple[str, int]]) -> bool:
        return any(is_there(self._path, self._manifest, site, slot, number) for site, slot in only)

    def _seal(self, block: BlockWriter) -> None:
        self._check_plan()
        block.seal(self._pipeline, self._stager)
        self._block = None

    def _check_plan(self) -> None:
        """Refuse to continue if the plan was changed meanwhile: its last shards differ from ours."""
        ours, now = self._manifest, read_manifest(self._path)
        if (ours.n_tokens, ours.n_sequences, ours.shard_tokens) != (now.n_tokens, now.n_sequences, now.shard_tokens):
            raise PlanMismatchError(
                f"{self._where} was given another plan while it was filled: {ours.n_tokens} tokens then, "
                f"{now.n_tokens} now. Run the command that changed it, or the one of the plan that is there now"
            )

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
        """Warn once, about the first rows that the digest thread found; all are in the statistics."""
        if self._bad and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._where}: {self._bad[0]}. Such rows are stored, counted and left out of the statistics; "
                f"`mmcache stats` lists them all",
                NonFiniteWarning,
                stacklevel=outside(),
            )


class _Window:
    """Reads a column piece by piece, and keeps the last shard in memory."""

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


def parts_of_one_length(group: np.ndarray) -> list[np.ndarray]:
    """A batch `[sequences, 3]`, split wherever a sequence has another length than the one before."""
    lengths = group[:, 1] - group[:, 0]
    return np.split(group, np.flatnonzero(np.diff(lengths)) + 1)


class Batches:
    """The batches of a plan, as token ids, in memory that does not grow with the corpus."""

    def __init__(self, path: Path, manifest: Manifest, batch_size: int) -> None:
        self.size, self._sequences = batch_size, manifest.n_sequences
        total = manifest.n_tokens or 0
        self._equal_lengths = bool(manifest.source.get("equal_lengths"))
        self._spans = _Window(path, manifest, "sequences", manifest.n_sequences)
        self._tokens = _Window(path, manifest, "tokens", total)
        self._flags = _Window(path, manifest, "flags", total)
        self._left_out = manifest.left_out

    def spans(self, start: int = 0) -> Iterator[np.ndarray]:
        """Start, stop and document of the sequences of each batch, `[sequences, 3]`.

        The first batch is the one that contains token `start`.
        """
        batches = range(0, self._sequences, self.size)
        # Bisect, without reading all earlier sequences: most of a store may be complete.
        before = bisect.bisect_right(batches, start, key=lambda first: int(self._spans.read(first, first + 1)[0, 0]))
        for first in batches[max(0, before - 1) :]:
            group = self._spans.read(first, min(first + self.size, self._sequences))
            yield from parts_of_one_length(group) if self._equal_lengths else [group]

    def ids(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and attention mask of a batch: `[sequences, longest]` int64, padded on the right with 0."""
        lengths = spans[:, 1] - spans[:, 0]
        ids = np.zeros((len(spans), int(lengths.max())), np.int64)
        tokens = self._tokens.read(int(spans[0, 0]), int(spans[-1, 1]))
        for row, (start, stop) in enumerate(spans[:, :2] - spans[0, 0]):
            ids[row, : stop - start] = tokens[start:stop]
        return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)

    def digest(self, start: int, stop: int) -> str:
        """The digest of the ids of some tokens, as in a shard's header."""
        return ids_digest(self._tokens.read(start, stop))

    def keep(self, spans: np.ndarray) -> np.ndarray:
        """The tokens of a batch that count in the statistics: `[tokens]` bool."""
        return counted(self._flags.read(int(spans[0, 0]), int(spans[-1, 1])), self._left_out)
