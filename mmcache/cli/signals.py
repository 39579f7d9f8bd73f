"""Signals that end a job tidily, and those that end a command which only reads."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Stopped", "ended_at_once", "stoppable"]

# Seconds that tidying up after a signal may take.
_TIDYING = 5.0


class Stopped(BaseException):
    """A signal came: which, and what there is now. The command line says it, and exits with 128 and its number.

    Caught only there: it may come when the block that it is meant for is being left already.
    """

    def __init__(self, number: int, left: str) -> None:
        super().__init__(number, left)
        self.number, self.left = number, left


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
            raise Stopped(number, left)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            for number in before:
                signal.signal(number, stop)
            yield
        finally:
            told = math.inf  # nothing is left that could be stopped
    finally:
        # Reached also where a signal came in the line above.
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_at_once() -> Iterator[ExitStack]:
    """Let Ctrl-C and SIGTERM end the process at once, with exit 0: for commands that only read, until they are ended.

    Nothing that runs in the background is waited for, and nothing is said. What is on the stack is removed before.
    """
    with ExitStack() as tidy:

        def end(_number: int, _frame: object) -> None:
            # A second signal that comes in here does all of it, before the first goes on.
            try:
                tidy.close()
            finally:
                os._exit(0)

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield tidy
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
