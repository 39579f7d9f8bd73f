"""`mmcache.cluster.extract`: run an extraction on the machines of a Ray cluster.

Every worker is a Ray actor that holds the model. One of them plans. Then this process, which needs neither GPU nor
model, hands out ranges of missing blocks, one at a time to each worker, and reads the progress from the store. Ray
restarts the worker of a lost machine, with the same task, as soon as another machine has room. When no other blocks are
left, unstarted blocks of a busy or lost worker are also given to others; the bytes are the same, whoever makes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import urlsplit

from torch import nn

from mmcache.cluster.pool import Pool, Resources
from mmcache.cluster.worker import Job, Options, see_plan
from mmcache.errors import ArgumentError, ClusterError
from mmcache.extraction.job import complete
from mmcache.extraction.special_tokens import BosWarning
from mmcache.models.loading import load_model, load_tokenizer
from mmcache.storage.connection import placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.estimate import Survey
    from mmcache.extraction.job import Progress
    from mmcache.read.store import Store

__all__ = ["extract", "named"]

# Timeout in seconds for connecting to the head node. Ray itself would try for minutes.
_REACHED_WITHIN = 5.0
_USAGE = "RAY_USAGE_STATS_ENABLED"
_ADVICE = "Start it with `ray start --head`, give the address that it prints, or none to use this machine alone"


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The connected `ray` module: an existing connection, the cluster at `address`, or a new one on this machine.

    Raises:
        ClusterError: Ray is not installed, or there is no cluster at the address.
        ArgumentError: Ray is connected to another cluster.
    """
    try:
        import ray  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise ClusterError("running on a cluster needs Ray: pip install 'mmcache[cluster]'") from error
    if ray.is_initialized():
        _check_same(ray, address)
        with _undisguised():
            yield ray
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    _connect(ray, where)
    try:
        # Ray replaces the SIGTERM handler with one that exits at once, without cleanup.
        if ours and callable(before):
            signal.signal(signal.SIGTERM, before)
        with _undisguised():
            yield ray
    finally:
        ray.shutdown()
        if ours and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _undisguised() -> Iterator[None]:
    """Raise again what a signal handler raised: Ray's compiled calls wrap it in a SystemError."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _check_same(ray: Any, address: str | None) -> None:
    there = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", there):
        raise ArgumentError(
            f"Ray is connected to {there}, and the address given is {address!r}: give none, or call ray.shutdown()"
        )


def _connect(ray: Any, where: str) -> None:
    alone = where == "local"
    if not alone:
        _check_reachable(where)
    options = {"include_dashboard": False} if alone else {}
    try:
        with _nothing_sent() if alone else contextlib.nullcontext():
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        # So that the next call does not find half a connection.
        ray.shutdown()
        raise ClusterError(f"no Ray cluster could be joined at {where!r}: {error}. {_ADVICE}") from error


def _check_reachable(where: str) -> None:
    """Refuse an address at which nothing listens."""
    if where == "auto":
        return
    parts = urlsplit(where if "://" in where else f"ray://{where}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise ArgumentError(f"{where!r} is no address of a Ray cluster: expected 'host:port', or 'auto'")
    try:
        socket.create_connection((host, port), _REACHED_WITHIN).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {where}: {error}. Nothing was begun, and what is stored stays. {_ADVICE}"
        ) from error


@contextmanager
def _nothing_sent() -> Iterator[None]:
    """Turn off usage statistics of a Ray that we start, unless the user has set the variable."""
    said = _USAGE in os.environ
    os.environ.setdefault(_USAGE, "0")
    try:
        yield
    finally:
        if not said:
            del os.environ[_USAGE]


def extract(
    model: str | os.PathLike[str] | Callable[[], nn.Module],
    tokenizer: Any,
    texts: Sequence[Document] | Callable[[], Iterable[Document]],
    path: str | os.PathLike[str],
    *,
    address: str | None = None,
    workers: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    accept_numerics: bool = False,
    strict: bool = False,
    planned: Callable[[Survey], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[Options],
) -> Store:
    """Run a model over text on the machines of a Ray cluster; blocks until the store is complete.

    Each file is byte-identical to that of `mmcache.extract` in one process, except for the root's record of when and
    how it was made. The two can resume each other's stores. All machines, this one too, must see the same folder at
    `path` and have this package; only workers load the model. When the call ends, also by Ctrl-C, the workers end too;
    published shards stay.

    The worker of a lost machine is restarted wherever there is room, with the same task; only a worker that is lost six
    times before it finishes any task ends the job. While no machine has room for a worker, the call waits.

    Args:
        model: a name or folder, as in `mmcache extract`, or a function without arguments that returns a model; each
            worker calls it.
        tokenizer: a name or folder, a Hugging Face tokenizer, or a function without arguments that returns one.
        texts: documents, or a function without arguments that returns them, called on one worker, such as
            `functools.partial(mmcache.read_texts, ["corpus.jsonl"])`.
        path: the store, new or to be resumed.
        address: of the cluster: `"host:port"` of its head, or `"auto"` for the one that this machine belongs to. None
            for that in RAY_ADDRESS, or else for this machine alone. If Ray is connected already, that connection is
            used, and left open.
        workers: how many; None for one per GPU, or, without GPUs, one per machine.
        num_gpus: GPUs per worker; None for one if the cluster has any. A model that is too large for one needs
            several, and a `device_map`: `functools.partial(load_model, name, None, device_map="auto")`, from
            `mmcache.loading`.
        num_cpus: CPUs that Ray reserves for a worker. The plan, not this, sets how many threads it computes with.
        accept_numerics: as in `mmcache.extract`.
        strict: as in `mmcache.extract`.
        planned: called once with a survey of what is to do.
        progress: called about once a second; `run_tokens` counts all workers.
        **options: as in `mmcache.extract`; `device` is that of each worker, None for its GPU if it was given one.

    Raises:
        ClusterError: there is no cluster at `address`, or it cannot do the job: a machine does not see `path`, or a
            worker dies repeatedly.
        ArgumentError: an argument cannot be sent to workers.
        MmcacheError: any error of `mmcache.extract`, on any machine.
    """
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"extract() got unexpected options: {', '.join(sorted(unknown))}")
    place = placed(path)
    if isinstance(place, str):
        raise ArgumentError(
            f"{place} is a bucket, and a cluster's workers need a folder that all of them see: call mmcache.extract on "
            f"each machine instead, with the same arguments"
        )
    place = place.absolute()
    loads, tokenizes, reads = _model(model), _tokenizer(tokenizer), _texts(texts)
    with connected(address) as ray:
        resources = Resources.of(ray, workers, num_gpus, num_cpus)
        job = Job(
            model=loads,
            tokenizer=tokenizes,
            path=place,
            options=options,
            accept_numerics=accept_numerics,
            strict=strict,
            on_gpu=resources.gpus > 0,
            threads=_threads(),
        )
        with Pool(ray, job, resources, progress or (lambda _done: None)) as pool:
            plan = pool.plan(reads)
            see_plan(place, plan)
            for said in plan.warned:
                warnings.warn(said, BosWarning, stacklevel=2)
            if planned is not None:
                planned(plan.survey)
            pool.fill(plan)
    return complete(place)


def _model(model: Any) -> Callable[[], nn.Module]:
    if isinstance(model, str | os.PathLike):
        return partial(load_model, named(model), None)
    if isinstance(model, nn.Module) or not callable(model):
        raise ArgumentError(
            f"model is a {type(model).__name__}: each worker loads its own, so give a name, a folder, or a function "
            f"without arguments that returns the model"
        )
    load: Callable[[], nn.Module] = model
    return load


def _tokenizer(tokenizer: Any) -> Callable[[], Any]:
    if isinstance(tokenizer, str | os.PathLike):
        return partial(load_tokenizer, named(tokenizer))
    # Tokenizers are callable too.
    if hasattr(tokenizer, "all_special_ids"):
        return partial(_same, tokenizer)
    if not callable(tokenizer):
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__}: expected a name, a folder, a Hugging Face tokenizer, or a "
            f"function without arguments that returns one"
        )
    load: Callable[[], Any] = tokenizer
    return load


def _texts(texts: Any) -> Callable[[], Iterable[Document]]:
    if callable(texts):
        load: Callable[[], Iterable[Document]] = texts
        return load
    if isinstance(texts, str | bytes | os.PathLike) or not (hasattr(texts, "__len__") and hasattr(texts, "__iter__")):
        raise ArgumentError(
            f"texts is one {type(texts).__name__}: give a list of documents, or a function without arguments that "
            f"returns documents, such as functools.partial(mmcache.read_texts, ['corpus.jsonl'])"
        )
    return partial(_same, texts)


def _same(value: Any) -> Any:
    return value


def named(name: str | os.PathLike[str]) -> str:
    """A model or file name for workers, whose working directory is another: absolute if it exists here."""
    return str(Path(name).absolute()) if Path(name).exists() else str(name)


def _threads() -> int | None:
    """The number of threads set in OMP_NUM_THREADS; None if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdecimal() and int(first) else None
