"""Panics of Rust libraries, such as tokenizers: as errors that can be caught."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_growth", "growth", "panics_as_errors", "said"]

# How many times as long a normalizer may make a text; the usual ones at most double it.
_GROWTH = 1 << 10


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


def check_growth(tokenizer: Any) -> None:
    """Refuse a tokenizer that blows texts up before it looks at them.

    Raises:
        UnsupportedModelError: how many times as long they may get.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    times = 1 if normalizer is None else growth(json.loads(normalizer.__getstate__()))
    if times > _GROWTH:
        raise UnsupportedModelError(
            f"the tokenizer's normalizer may make a text {times:,} times as long, expected at most {_GROWTH:,}: give "
            f"the model's own tokenizer"
        )


def growth(part: Any) -> int:
    """How many times as long a text can get by the replacements of a tokenizer's normalizer or decoder, in JSON."""
    if not isinstance(part, dict):
        return 1
    inner = [*(part.get("normalizers") or ()), *(part.get("decoders") or ())]
    found = math.prod(map(growth, inner))
    if isinstance(added := part.get("prepend"), str):
        found *= 1 + len(added)
    if isinstance(content := part.get("content"), str):
        pattern = part.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        # Another pattern, or an empty one, may match between any two letters.
        found *= max(1, -(-len(content) // len(replaced))) if replaced else 1 + len(content)
    return found
