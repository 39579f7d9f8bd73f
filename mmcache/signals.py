"""Signals that end a job tidily."""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stoppable"]

# Seconds that tidying up after a signal may take.
_TIDYING = 5.0


class _Terminated(BaseException):
    """SIGTERM: a job that is pre-empted stops as one that is interrupted does."""


@contextmanager
def stoppable(left: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a job tidily: drafts go, finished shards stay, and `left` says what there is now."""
    told = -math.inf

    def stop(number: int, _frame: object) -> None:
        # A second signal must not interrupt the tidying up. One that comes long after the first is heeded: the
        # first may have met code that lets no exception out, such as a finaliser.
        nonlocal told
        if time.monotonic() - told > _TIDYING:
            told = time.monotonic()
            raise _Terminated(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            for number in before:
                signal.signal(number, stop)
            yield
        finally:
            told = math.inf  # nothing is left that could be stopped
    except _Terminated as stopped:
        click.echo(f"mmcache: stopped. {left}", err=True)
        sys.exit(128 + stopped.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
