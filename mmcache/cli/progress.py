"""How far a job is, on stderr."""

from __future__ import annotations

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
    from rich.console import Console

    from mmcache.extraction.job import Progress as Done

__all__ = ["BytesBar", "ProgressBar"]


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
