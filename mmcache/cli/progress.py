"""How far a job is, on stderr, and signals that end a job tidily."""

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
    """The progress of a job of so many bytes on stderr: a bar on a terminal, a line every tenth everywhere else."""

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
        """Draw how many bytes of how many are done."""
        self._bar.update(self._task, completed=done, total=total)
        # Of a job of no bytes nothing is to be told.
        tenth = done * 10 // max(1, total)
        if tenth > self._told and not self._console.is_terminal:
            self._told = tenth
            self._console.print(f"{size(done)} of {size(total)}")


class ProgressBar:
    """The progress of an extraction on stderr: a bar on a terminal, and the estimate in a line everywhere."""

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
        """Draw where the job is; after its first batches, say how long it will take."""
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
        """Print a line, of each kind once."""
        if what not in self._said:
            self._said.add(what)
            self._console.print(text)


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
