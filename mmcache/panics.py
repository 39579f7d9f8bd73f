"""Panics of Rust libraries, such as tokenizers: as errors that can be caught."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["panics_as_errors", "said"]


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A block in which a panic, a BaseException that no `except Exception` catches, is a RuntimeError."""
    try:
        yield
    except BaseException as error:
        # The class is made anew by each library, and none of them exports it.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise RuntimeError(f"it panicked: {error}") from error


def said(error: BaseException) -> str:
    """What an error of another library says, in one line of bounded length, its class first."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:300]}…"
