"""Errors of tokenizers: Rust panics as catchable errors, and a check that a normalizer does not inflate texts."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_growth", "growth", "panics_as_errors", "said"]

# The factor by which a normalizer may lengthen a text; the usual ones at most double it.
_GROWTH = 1 << 10


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a Rust panic, a BaseException that `except Exception` does not catch, into a RuntimeError."""
    try:
        yield
    except BaseException as error:
        # Each library has its own class of panics, and none exports it.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise RuntimeError(f"it panicked: {error}") from error


def said(error: BaseException) -> str:
    """The class and message of another library's error, in one line of bounded length."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:300]}…"


def check_growth(tokenizer: Any) -> None:
    """Refuse a tokenizer whose normalizer may inflate texts.

    Raises:
        UnsupportedModelError: the factor is too large; the message has it.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    times = 1 if normalizer is None else growth(json.loads(normalizer.__getstate__()))
    if times > _GROWTH:
        raise UnsupportedModelError(
            f"the tokenizer's normalizer may make a text {times:,} times as long, expected at most {_GROWTH:,}: give "
            f"the model's own tokenizer"
        )


def growth(part: Any) -> int:
    """The largest factor by which a tokenizer's normalizer or decoder, as JSON, can lengthen a text."""
    if not isinstance(part, dict):
        return 1
    inner = [*(part.get("normalizers") or ()), *(part.get("decoders") or ())]
    found = math.prod(map(growth, inner))
    if isinstance(added := part.get("prepend"), str):
        found *= 1 + len(added)
    if isinstance(content := part.get("content"), str):
        pattern = part.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        # A pattern that is empty or no plain string may match between any two letters.
        found *= max(1, -(-len(content) // len(replaced))) if replaced else 1 + len(content)
    return found
