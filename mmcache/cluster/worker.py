"""One worker of an extraction on a cluster: it holds the model and makes the blocks that it is given.

It does not import Ray, which runs it in a process of its own and restarts it elsewhere if its machine is lost. So it
loads everything on first use, and again after a restart.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict

import torch

from mmcache.errors import ClusterError, MmcacheError, WriteError
from mmcache.extraction.estimate import survey_plan
from mmcache.extraction.job import Extraction
from mmcache.extraction.provenance import plan_threads
from mmcache.extraction.runner import NonFiniteWarning
from mmcache.extraction.special_tokens import BosWarning
from mmcache.format.manifest import is_store, read_manifest
from mmcache.models.loading import is_spread
from mmcache.system.launcher import Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import numpy as np
    from torch import nn

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.estimate import Survey
    from mmcache.extraction.special_tokens import Bos
    from mmcache.format.manifest import Manifest

__all__ = ["Job", "Made", "Options", "Planned", "Worker", "see_plan"]

# Seconds that a network file system may take to show a machine what another one wrote.
_SEEN_WITHIN = 15.0
_LOOK_AGAIN = 0.5
_LIMIT = "OMP_NUM_THREADS"


class Options(TypedDict, total=False):
    """The options of `mmcache.extract` that say what is stored and how."""

    sites: Sequence[str]
    layers: Sequence[int] | None
    context_length: int | None
    pack: bool
    bos: Bos
    batch_size: int | Literal["auto"]
    dtype: torch.dtype | str
    layout: Literal["layer", "token"]
    shard_tokens: int | None
    max_tokens: int | None
    device: torch.device | str | None
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """The job, as it is sent to every worker.

    `model` and `tokenizer` are functions that return them; `on_gpu`: each worker has a GPU; `threads`: the number that
    the user set, None if none.
    """

    model: Callable[[], nn.Module]
    tokenizer: Callable[[], Any]
    path: Path
    options: Options
    accept_numerics: bool
    strict: bool
    on_gpu: bool
    threads: int | None


@dataclass(frozen=True)
class Planned:
    """The plan, a survey of what is to do, the host that planned, and its warnings."""

    manifest: Manifest
    survey: Survey
    host: str
    warned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """The result of a task: the tokens that it ran, and its warnings."""

    ran: int = 0
    warned: tuple[str, ...] = ()


class Worker:
    """Makes the blocks that it is given. Used by one thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: nn.Module | None = None
        self._tokenizer: Any = None
        self._extraction: Extraction | None = None
        self._manifest: Manifest | None = None

    def load(self) -> Made:
        """Load the model and the tokenizer, once."""
        if self._model is None:
            self._model, self._tokenizer = self._job.model(), self._job.tokenizer()
        return Made()

    def plan(self, texts: Callable[[], Iterable[Document]]) -> Planned:
        """Plan, or compare with the existing plan; blocks until then."""
        job = self._job
        if not is_store(job.path) and job.threads is not None:
            torch.set_num_threads(job.threads)
        else:
            # Ray sets this to the number of CPUs of the actor; then the last bits would differ from those of a process
            # that Ray did not start.
            os.environ[_LIMIT] = "1"
            plan_threads(job.path, Rank(launcher="Ray"))
        try:
            self._extraction = self._checked()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", BosWarning)
                manifest = self._extraction.plan(texts(), accept_numerics=job.accept_numerics)
            with self._extraction.filling(manifest, Rank(), strict=job.strict) as fill:
                survey = survey_plan(job.path, manifest, fill, fill.batch_size)
        except WriteError as error:
            _raise_from_here(error)
        self._manifest = manifest
        return Planned(manifest, survey, socket.gethostname(), _said(caught, BosWarning))

    def make(self, planned: Planned, blocks: np.ndarray) -> Made:
        """Make those of `blocks` (ascending) that are missing; blocks until they are durable."""
        total = 0

        def told(done: int, ran: int, *, waits: bool) -> None:  # noqa: ARG001 -- progress is read from the store
            nonlocal total
            total = ran

        try:
            extraction, manifest = self._joined(planned)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NonFiniteWarning)
                with extraction.filling(manifest, Rank(), strict=self._job.strict) as fill:
                    fill.run(told, only=blocks)
        except MmcacheError as error:
            _raise_from_here(error)
        return Made(total, _said(caught, NonFiniteWarning))

    def _joined(self, planned: Planned) -> tuple[Extraction, Manifest]:
        """The job and its plan; a plan of another worker is compared first, once this machine sees it."""
        if self._extraction is None or self._manifest is None:
            see_plan(self._job.path, planned)
            plan_threads(self._job.path, Rank(launcher="Ray"))
            extraction = self._checked()
            self._manifest = extraction.join(accept_numerics=self._job.accept_numerics)
            self._extraction = extraction
        return self._extraction, self._manifest

    def _checked(self) -> Extraction:
        self.load()
        if self._model is None:
            raise AssertionError("load() gives a model")
        options = self._job.options.copy()
        if options.get("device") is None and self._job.on_gpu and not is_spread(self._model):
            options["device"] = "cuda"
        return Extraction(self._model, self._tokenizer, self._job.path, **options)


def _said(caught: list[warnings.WarningMessage], kind: type[Warning]) -> tuple[str, ...]:
    return tuple(str(warning.message) for warning in caught if issubclass(warning.category, kind))


def see_plan(path: Path, planned: Planned) -> None:
    """Check that this machine sees the store that was planned, and not another one; waits up to 15 s for it.

    Raises:
        ClusterError: it does not see it.
    """
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (there := is_store(path)) or _mark(read_manifest(path)) != _mark(planned.manifest):
        if time.monotonic() > deadline:
            found = "another store there, of its own" if there else "no store there"
            raise ClusterError(
                f"{path} is not shared by all machines: {planned.host} planned the job there, and "
                f"{socket.gethostname()} finds {found}. Mount the same folder under this path on every machine"
            )
        time.sleep(_LOOK_AGAIN)


def _mark(manifest: Manifest) -> tuple[Any, ...]:
    """Values that identify a plan: `record` has the time, so that two plans with equal settings differ."""
    return manifest.store, manifest.n_tokens, tuple(manifest.sites), manifest.source["record"]


def _raise_from_here(error: MmcacheError) -> NoReturn:
    """Raise an error again, with this machine's name in its message."""
    where = f" (on the machine {socket.gethostname()})"
    if isinstance(error, OSError) and error.errno is not None:
        raise type(error)(error.errno, f"{error.strerror}{where}", error.filename) from error
    raise type(error)(f"{error}{where}") from error
