"""Sums of bfloat16 rows in one pass, by a kernel that numba compiles: `pip install 'mmcache[fast]'`.

numpy goes through the same rows five times, and each time waits for the interpreter, which other threads have too.
"""

from __future__ import annotations

import functools
import threading
import warnings
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Kernel", "load_kernel", "span_sums"]

# As `span_sums`.
Kernel: TypeAlias = "Callable[[np.ndarray, int, int, np.ndarray, int, np.ndarray, np.ndarray, np.ndarray], None]"

_LANES = 32
_HIGH = np.uint32(0xFFFF0000)
_HALF = np.uint32(16)

_loading = threading.Lock()


def load_kernel() -> Kernel | None:
    """Give the compiled kernel, or None where numba is not installed; where it does not work, a warning says so.

    Blocks for a quarter of a second the first time, or for a whole one if it was never compiled on this machine.
    """
    with _loading:
        return _load()


@functools.cache
def _load() -> Kernel | None:
    try:
        return _compile()
    except Exception as error:  # noqa: BLE001 -- whatever is wrong with numba, there is a way without it
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return None
        warnings.warn(
            f"numba is installed but does not work here ({type(error).__name__}: {error}): statistics are computed by "
            f"numpy, and large writes may take longer; reinstall numba, or uninstall it",
            stacklevel=3,
        )
        return None


def _compile() -> Kernel | None:
    import numba  # noqa: PLC0415 -- takes a while, and only large stores gain by it
    from numba.extending import register_jitable  # noqa: PLC0415

    if numba.config.DISABLE_JIT:
        # It would run as it stands here, a thousand times as slowly.
        return None
    for function in (_pair, _add_row, _square_norm):
        register_jitable(function)
    # Compiled here and now, once, for memory that may be read only, and for norms of some of the layers.
    words, skipped = numba.uint32[:, ::1].copy(readonly=True), numba.boolean[::1].copy(readonly=True)
    sums, norms = numba.float32[:, :, ::1], numba.float64[:, :]
    whole = numba.int64
    signature = numba.void(words, whole, whole, skipped, whole, sums, sums, norms)
    try:
        kernel: Kernel = numba.njit([signature], nogil=True, cache=True)(span_sums)
    except Exception:  # noqa: BLE001 -- if it is more than what is meant here, it comes again
        # What was kept of it is damaged, or there is no folder, or no room, to keep it for the next process.
        kernel = numba.njit([signature], nogil=True)(span_sums)
    return kernel


def span_sums(
    words: np.ndarray,
    low: int,
    high: int,
    skipped: np.ndarray,
    span: int,
    first: np.ndarray,
    second: np.ndarray,
    squared: np.ndarray,
) -> None:
    """Sum columns `low` to `high` of rows of bfloat16 by spans of rows, and their squares; and the squares of each row.

    The sums are the same, to the last bit, as numpy's of one row after the other. A row's squares are added up in
    another order than BLAS has, but always the same one.

    Args:
        words: `[n, width / 2]` uint32, two numbers each.
        low: the first column of words.
        high: the column behind the last.
        skipped: `[n]` bool, rows that are left out of the sums by column.
        span: rows that are added up together, in float32.
        first: `[2, spans, high - low]` float32, where the sums of even and of odd columns go.
        second: the same of the squares.
        squared: `[n, layers]` float64, where the sums of the squares of each row and layer go.
    """
    layers = squared.shape[1]
    half = (high - low) // layers
    lanes = np.empty(_LANES, np.float32)
    for number in range(first.shape[1]):
        # What is added to it keeps its sign, even if that is a negative zero.
        first[:, number] = -0.0
        second[:, number] = 0
        for layer in range(layers):
            start, stop = layer * half, (layer + 1) * half
            even, odd = first[0, number, start:stop], first[1, number, start:stop]
            even2, odd2 = second[0, number, start:stop], second[1, number, start:stop]
            for row in range(number * span, min((number + 1) * span, len(words))):
                some = words[row, low + start : low + stop]
                squared[row, layer] = _square_norm(some, lanes)
                if not skipped[row]:
                    _add_row(some, even, odd, even2, odd2)


def _pair(word: np.uint32) -> tuple[np.float32, np.float32]:
    """Give the two numbers of a word, exactly."""
    return np.uint32(word << _HALF).view(np.float32), np.uint32(word & _HIGH).view(np.float32)


def _add_row(words: np.ndarray, even: np.ndarray, odd: np.ndarray, even2: np.ndarray, odd2: np.ndarray) -> None:
    for place in range(len(words)):
        a, b = _pair(words[place])
        even[place] += a
        odd[place] += b
        even2[place] += a * a
        odd2[place] += b * b


def _square_norm(words: np.ndarray, lanes: np.ndarray) -> float:
    """Add up the squares of one row of one layer in as many sums as fill the processor's registers."""
    lanes[:] = 0
    whole = len(words) // _LANES * _LANES
    for start in range(0, whole, _LANES):
        some = words[start : start + _LANES]
        for lane in range(_LANES):
            a, b = _pair(some[lane])
            lanes[lane] += a * a + b * b
    total = np.float64(0)
    for lane in range(_LANES):
        total += lanes[lane]
    for place in range(whole, len(words)):
        a, b = _pair(words[place])
        total += a * a + b * b
    return total
