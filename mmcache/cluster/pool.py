"""The pool of Ray workers of an extraction: resources, handing out blocks, restarts and progress."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmcache.cluster.worker import Worker
from mmcache.errors import ArgumentError, ClusterError, MmcacheError
from mmcache.extraction.job import Progress
from mmcache.extraction.runner import NonFiniteWarning
from mmcache.extraction.scheduling import BlockScheduler
from mmcache.format.manifest import is_store, read_manifest
from mmcache.system.atomic import remove_drafts
from mmcache.system.files import sync_folder
from mmcache.system.launcher import Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mmcache.cluster.worker import Job, Planned
    from mmcache.extraction.corpus import Document
    from mmcache.format.manifest import Manifest

__all__ = ["Pool", "Resources", "deal"]

# How often Ray restarts a worker that keeps dying; then its task is assumed to be the cause. Retries of tasks are
# unlimited: Ray counts each call to a machine that it has not given up yet as a retry.
_RESTARTS = 5
# Seconds between two looks at the store.
_LOOK_AGAIN = 1.0
_AGAIN = 0.05
# Seconds after which others may take blocks that a worker was given and has not begun, if no others are left.
_PATIENCE = 5.0
# Seconds in which shards that a worker finds must appear on this machine.
_SEEN_WITHIN = 60.0
# Seconds that workers have, at the end, to return from blocks that others made, or to exit after a kill.
_GRACE = 2.0
# Tasks per worker, so that workers finish at about the same time; and the least batches per task, since batches at the
# ends of a task's range may be run twice.
_STRETCHES, _BATCHES = 16, 8


@dataclass(frozen=True)
class Resources:
    """The number of workers, and GPUs and CPUs for each."""

    workers: int
    gpus: float
    cpus: float

    @classmethod
    def of(cls, ray: Any, workers: int | None, gpus: float | None, cpus: float) -> Self:
        """Choose what was not asked for from the cluster's resources.

        Raises:
            ArgumentError: these numbers make no sense.
            ClusterError: no machine has room for a worker.
        """
        if workers is not None and workers < 1:
            raise ArgumentError(f"workers is {workers}: expected a positive number")
        if cpus < 0 or (gpus or 0) < 0:
            raise ArgumentError(f"num_gpus is {gpus}, num_cpus {cpus}: expected no negative numbers")
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = float(any(machine.get("GPU", 0) >= 1 for machine in machines))
        fit = [_fit(machine, gpus, cpus) for machine in machines]
        if workers is None:
            # Without GPUs, a worker computes with all processors of its machine.
            workers = sum(fit) if gpus else sum(room > 0 for room in fit)
            if not workers:
                has = ", ".join(f"{machine.get('GPU', 0):g} and {machine.get('CPU', 0):g}" for machine in machines)
                raise ClusterError(
                    f"no machine of the cluster has the {gpus:g} GPUs and {cpus:g} processors that a worker is to be "
                    f"given (they have {has}): lower num_gpus or num_cpus, or say how many workers to wait for"
                )
        return cls(workers, gpus, cpus)


def _fit(machine: dict[str, float], gpus: float, cpus: float) -> int:
    """The number of workers that a machine has room for."""
    rooms = [machine.get(name, 0) / need for name, need in (("GPU", gpus), ("CPU", cpus)) if need]
    return math.floor(min(rooms, default=1))


def deal(manifest: Manifest, missing: int, workers: int, batch_size: int) -> int:
    """The number of blocks in a worker's task, of `missing` blocks in all."""
    batch = batch_size * (manifest.n_tokens or 0) / max(1, manifest.n_sequences)
    least = math.ceil(_BATCHES * batch / (manifest.shard_tokens or 1))
    return max(1, min(max(least, math.ceil(missing / workers / _STRETCHES)), math.ceil(missing / workers)))


@dataclass
class _Task:
    """The blocks that a worker was given, and when."""

    worker: int
    blocks: np.ndarray
    since: float = field(default_factory=time.monotonic)


class Pool:
    """The workers, as a context manager: leaving it kills them, whatever they are doing.

    Args:
        ray: the connected `ray` module.
        job: given to each worker.
        resources: how many workers, and what each gets.
        progress: called with the progress of all of them.
    """

    def __init__(self, ray: Any, job: Job, resources: Resources, progress: Callable[[Progress], None]) -> None:
        self._ray, self._job, self._resources, self._progress = ray, job, resources, progress
        self._began, self._ran, self._warned = time.monotonic(), 0, False
        self._workers: list[Any] = []
        self._tasks: dict[Any, _Task] = {}
        self._idle: list[int] = []
        self._proven: set[int] = set()

    def __enter__(self) -> Self:
        self._workers = [self._start() for _ in range(self._resources.workers)]
        return self

    def _start(self) -> Any:
        made = self._ray.remote(Worker).options(
            num_gpus=self._resources.gpus,
            num_cpus=self._resources.cpus,
            max_restarts=_RESTARTS,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )
        return made.remote(self._job)

    def __exit__(self, kind: object, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker, no_restart=True)
        # A killed worker leaves temporary files, which cannot be removed before it has exited.
        until = time.monotonic() + _GRACE
        # `_proven`: nothing is removed from a store that was refused.
        while kind is not None and self._proven and self._drafts() and time.monotonic() < until:
            time.sleep(_AGAIN)

    def _drafts(self) -> bool:
        """Remove the temporary files of dead workers; True if there are others, of live ones."""
        path = self._job.path
        sites = read_manifest(path).sites if is_store(path) else ()
        return bool([name for site in sites for name in remove_drafts(path, site)])

    def plan(self, texts: Callable[[], Iterable[Document]]) -> Planned:
        """The plan, made by one worker while the others load their models; blocks until then."""
        for number in range(1, len(self._workers)):
            self._load(number)
        asked = self._workers[0].plan.remote(texts)
        path = self._job.path
        while not self._ray.wait([asked], timeout=_LOOK_AGAIN)[0]:
            source = read_manifest(path).source if is_store(path) else {}
            tokens = source.get("tokenised", {}).get("tokens", 0)
            self._progress(Progress("tokenise", tokens, 0, 0, 0, 0, time.monotonic() - self._began))
            # Raises the error of a worker that cannot load its model: all are likely to fail.
            self._collect(0)
        planned: Planned = self._result(asked)
        self._idle.append(0)
        self._proven.add(0)
        return planned

    def _load(self, number: int) -> None:
        self._tasks[self._workers[number].load.remote()] = _Task(number, np.empty(0, np.int64))

    def fill(self, planned: Planned) -> None:
        """Make all missing shards; blocks until they are durable."""
        path, manifest, survey = self._job.path, planned.manifest, planned.survey
        turns = BlockScheduler(path, manifest, Rank())
        size = deal(manifest, int(turns.wanted.sum()), len(self._workers), survey.batch_size)
        self._began = moved = time.monotonic()
        share, left = survey.bytes_to_do / max(1, survey.tokens_to_do), -1
        while turns.wanted.any():
            if left != (left := int(turns.wanted.sum())):
                moved = time.monotonic()
            self._hand_out(planned, turns, size)
            futile = self._collect(_LOOK_AGAIN)
            if futile:
                self._check_seen(futile, moved)
                time.sleep(_LOOK_AGAIN)
            turns.look()
            done = survey.tokens_to_do - _tokens(manifest, turns.wanted)
            before = survey.tokens - survey.tokens_to_do
            seconds = time.monotonic() - self._began
            self._progress(
                Progress("extract", before + done, survey.tokens, before, self._ran, int(done * share), seconds)
            )
        self._see_off()
        for site in turns.missing:
            # A worker that has not returned may have renamed its last shard without syncing the folder.
            sync_folder(path / site)

    def _hand_out(self, planned: Planned, turns: BlockScheduler, size: int) -> None:
        """Give blocks to every idle worker: unassigned ones, or else those that others have not begun."""
        given, fresh, now = np.zeros_like(turns.wanted), np.zeros_like(turns.wanted), time.monotonic()
        for task in self._tasks.values():
            given[task.blocks] = True
            fresh[task.blocks] |= now - task.since < _PATIENCE
        open_blocks = turns.wanted & ~turns.held
        while self._idle:
            blocks = np.flatnonzero(open_blocks & ~given)[:size]
            if not len(blocks):
                late = open_blocks & ~fresh
                # The second half: its worker goes from the first block on.
                left = [task.blocks[late[task.blocks]] for task in self._tasks.values()]
                most = max(left, key=len, default=blocks)
                blocks = most[len(most) // 2 :]
            if not len(blocks):
                return
            number = self._idle.pop(0)
            asked = self._workers[number].make.remote(planned, blocks)
            self._tasks[asked] = _Task(number, blocks)
            given[blocks] = fresh[blocks] = True

    def _collect(self, timeout: float) -> np.ndarray | None:
        """Wait for a finished task. Returns its blocks if its worker found nothing to do there, else None."""
        futile = None
        if not self._tasks:
            time.sleep(timeout)
            return None
        tasks = list(self._tasks)
        for done in self._ray.wait(tasks, num_returns=1, timeout=timeout)[0]:
            task = self._tasks.pop(done)
            try:
                made = self._result(done)
            except ClusterError:
                if task.worker not in self._proven:
                    raise
                # It has worked before: start another. Its blocks are still missing, and so are handed out again.
                self._proven.remove(task.worker)
                self._workers[task.worker] = self._start()
                self._load(task.worker)
                continue
            self._idle.append(task.worker)
            if len(task.blocks):
                self._proven.add(task.worker)
            self._ran += made.ran
            if len(task.blocks) and not made.ran:
                futile = task.blocks
            if made.warned and not self._warned:
                self._warned = True
                warnings.warn(made.warned[0], NonFiniteWarning, stacklevel=5)
        return futile

    def _result(self, done: Any) -> Any:
        """The result of a task, or its error."""
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MmcacheError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"a worker was lost {_RESTARTS + 1} times before it had done anything, or could not begin: {error}\n"
                f"What is finished is stored, and the same call goes on from there. Processes that take more memory "
                f"than there is are killed so: give each worker more, with fewer on a machine (num_cpus, num_gpus)"
            ) from error

    def _check_seen(self, blocks: np.ndarray, moved: float) -> None:
        """Refuse to continue if a worker finds shards that do not appear on this machine."""
        if time.monotonic() - moved > _SEEN_WITHIN:
            raise ClusterError(
                f"{self._job.path}: a worker finds the shards of block {blocks[0]}, and this machine has not for "
                f"{_SEEN_WITHIN:g} seconds: mount the same folder under this path on every machine"
            )

    def _see_off(self) -> None:
        """Wait a moment for workers to return from blocks that others made; a lost one does not."""
        tasks = [asked for asked, task in self._tasks.items() if len(task.blocks)]
        if tasks:
            ended, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=_GRACE)
            self._tasks = {asked: self._tasks[asked] for asked in ended}
            while self._tasks:
                with suppress(ClusterError):
                    self._collect(0)


def _tokens(manifest: Manifest, blocks: np.ndarray) -> int:
    """The number of tokens in some blocks: `[blocks]` bool."""
    shard, total = manifest.shard_tokens or 1, manifest.n_tokens or 0
    return int(blocks.sum()) * shard - bool(blocks[-1]) * (len(blocks) * shard - total)
