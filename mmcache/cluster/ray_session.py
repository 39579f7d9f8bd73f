"""A connection to Ray: made where there is none, and ended by whoever made it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mmcache.errors import ArgumentError, ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["connected"]

# Seconds in which the head has to take a connection. Ray itself would try for minutes.
_REACHED_WITHIN = 5.0
_USAGE = "RAY_USAGE_STATS_ENABLED"
_ADVICE = "Start it with `ray start --head`, give the address that it prints, or none to use this machine alone"


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Give Ray, connected: as it is already, or to the cluster at an address, or to one on this machine.

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
        # Ray makes SIGTERM exit at once, past whoever wants to tidy up.
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
    """Let out what a signal's handler raised: it comes out of Ray's compiled calls as the cause of a SystemError."""
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
        # What was begun is ended, so that the next call does not find half a connection.
        ray.shutdown()
        raise ClusterError(f"no Ray cluster could be joined at {where!r}: {error}. {_ADVICE}") from error


def _check_reachable(where: str) -> None:
    """Refuse an address at which nobody listens."""
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
    """Keep a Ray that we start from reporting to its makers, unless the user has said something about it."""
    said = _USAGE in os.environ
    os.environ.setdefault(_USAGE, "0")
    try:
        yield
    finally:
        if not said:
            del os.environ[_USAGE]
