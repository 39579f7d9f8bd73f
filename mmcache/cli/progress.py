"""Progress on stderr, and clean handling of Ctrl-C and SIGTERM."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mmcache.text import duration, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from mmcache.extraction.job import Progress as Done

__all__ = ["BytesBar", "ProgressBar", "Stopped", "ended_at_once", "stoppable"]


class BytesBar:
    """Progress in bytes on stderr: a bar on a terminal, else a line for each tenth."""

    def __init__(self, console: Console) -> None:
        self._console, self._told = console, 0
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        self._bar.update(self._task, completed=done, total=total)
        # A job of no bytes prints nothing.
        tenth = done * 10 // max(1, total)
        if tenth > self._told and not self._console.is_terminal:
            self._told = tenth
            self._console.print(f"{size(done)} of {size(total)}")


class ProgressBar:
    """Progress of an extraction on stderr: a bar on a terminal; the estimate as a line everywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._updates, self._said = 0, set[str]()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tokenising", total=None, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: Done) -> None:
        """Show the progress, and after the first batches the time left."""
        if done.phase == "tokenise":
            self._bar.update(self._task, description="tokenising", rate=f"{done.tokens:,} tokens")
            return
        if done.phase == "wait":
            self._bar.update(self._task, description="waiting for other workers", completed=done.tokens)
            self._say("wait", "waiting for other workers")
            return
        if done.phase == "upload":
            self._bar.update(self._task, description="sending the last shards", completed=done.tokens)
            self._say("upload", "sending the last shards")
            return
        rate = (done.tokens - done.before) / max(done.seconds, 1e-9)
        text = (
            f"{rate:,.0f} tokens/s · {done.bytes / 1e9:.2f} GB · {done.bytes / max(done.seconds, 1e-9) / 1e9:.2f} GB/s"
        )
        self._bar.update(self._task, description="extracting", completed=done.tokens, total=done.total, rate=text)
        self._updates += 1
        if done.tokens == done.total:
            self._say("end", f"{done.tokens:,} of {done.total:,} tokens, {text}")
        elif self._updates >= 3 and rate > 0:
            left = duration((done.total - done.tokens) / rate)
            self._say("estimate", f"{done.tokens:,} of {done.total:,} tokens, {text}, about {left} left")

    def _say(self, what: str, text: str) -> None:
        """Print a line, once for each `what`."""
        if what not in self._said:
            self._said.add(what)
            self._console.print(text)


# Seconds that the cleanup after a signal may take.
_TIDYING = 5.0


class Stopped(BaseException):
    """A signal arrived: its number, and what is left. The command line prints this, and exits with 128 plus the number.

    Only the command line catches it: it may be raised when the `with` statement of `stoppable` has already ended.
    """

    def __init__(self, number: int, left: str) -> None:
        super().__init__(number, left)
        self.number, self.left = number, left


@contextmanager
def stoppable(left: str) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM end a job cleanly: drafts are removed, finished shards stay, `left` is reported."""
    told = -math.inf

    def stop(number: int, _frame: object) -> None:
        # A second signal must not interrupt the cleanup. One that comes long after the first raises again: the first
        # exception may have been lost in code that lets none out, such as a finaliser.
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
            told = math.inf  # the job has ended: nothing to stop
    finally:
        # Also reached if a signal arrived in the line above.
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_at_once() -> Iterator[ExitStack]:
    """Make Ctrl-C and SIGTERM end the process at once with exit code 0: for commands that only read and never end.

    Does not wait for background threads, and prints nothing. The stack's callbacks run first.
    """
    with ExitStack() as tidy:

        def end(_number: int, _frame: object) -> None:
            # A second signal that arrives here runs all of this itself; the first never continues.
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
