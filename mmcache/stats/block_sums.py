"""Sums of one group of rows, in numpy or by a compiled kernel, for `stats/moments.py`, which adds them up.

float16, float32 and float64 are summed in float64. bfloat16, which activations usually are, is summed in float32 by
spans of 32 rows, and the spans in float64: three times as fast, since the conversion is a shift and a register holds
twice as many numbers. No variance is lost by cancellation: a bfloat16 has 8 significant bits and its square 16, so a
span of squares of similar magnitude is summed exactly; and where values of a span differ in magnitude by a factor of
four or more, their variance is of the size of the squares themselves. Norms, means (relative to the root mean square)
and m2 are accurate to 1e-6. Values outside float32's range are summed in float64.

Results depend on the group's rows alone, not on the number of threads, to the last bit.

With numba (`pip install 'mmcache[fast]'`), a compiled kernel sums bfloat16 rows in one pass, three times as fast again.
numpy makes five passes, and may wait for the GIL after each (see system/threads.py).
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import ml_dtypes
import numpy as np
import torch

from mmcache.system.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SPAN", "Kernel", "Sums", "load_kernel", "span_sums", "sum_block", "together"]

# As `span_sums`.
Kernel: TypeAlias = "Callable[[np.ndarray, int, int, np.ndarray, int, np.ndarray, np.ndarray, np.ndarray], None]"

_LANES = 32
_HIGH = np.uint32(0xFFFF0000)
_HALF = np.uint32(16)

_loading = threading.Lock()


def load_kernel() -> Kernel | None:
    """The compiled kernel; None if numba is not installed or, with a warning, does not work.

    The first call blocks for a quarter of a second, or for one second if it was never compiled on this machine.
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
        # The kernel would run as plain Python, a thousand times slower.
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
        # The compiled code cached on disk is damaged, or cannot be written.
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
    """Sum columns `low` to `high` of bfloat16 rows, and their squares, by spans of rows; and the squares of each row.

    The column sums equal numpy's, to the last bit. A row's squares are summed in another order than in BLAS, but
    always the same one.

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
    """The two bfloat16 numbers of a word, as float32, exactly."""
    return np.uint32(word << _HALF).view(np.float32), np.uint32(word & _HIGH).view(np.float32)


def _add_row(words: np.ndarray, even: np.ndarray, odd: np.ndarray, even2: np.ndarray, odd2: np.ndarray) -> None:
    for place in range(len(words)):
        a, b = _pair(words[place])
        even[place] += a
        odd[place] += b
        even2[place] += a * a
        odd2[place] += b * b


def _square_norm(words: np.ndarray, lanes: np.ndarray) -> float:
    """Sum of the squares of one row of one layer, in 32 partial sums that fill the processor's registers."""
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


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Rows that are added up in float32.
SPAN = 32
# Bytes widened at once: more would not stay in the CPU cache for five passes; less would wait for the GIL more often.
_TILE_BYTES = 5 << 18
# From 10,000 numbers, BLAS may use its own threads, whose number changes the last bits.
_LONGEST_DOT = 8192
# From 32,768 numbers, torch copies with its thread pool, in each thread of ours.
_SERIAL_COPY = 32_704
# Sums of squares that float32 holds: larger ones may have overflowed, and in smaller ones what underflowed may count.
_LARGEST, _SMALLEST = 2.0**100, 2.0**-90


class _Scratch(threading.local):
    """Reused memory of one thread for widened rows: fresh memory costs more than the sums themselves."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: type[np.floating]) -> np.ndarray:
        """Page-aligned memory of a shape; valid until the thread's next call."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(self._memory) < size:
            # At least a huge page, where there are such.
            self._memory = anonymous(max(size, 2 << 20))
        return self._memory[:size].view(dtype).reshape(shape)


_SCRATCH = _Scratch()


@dataclass
class Sums:
    """Sums of one group of rows, in float64 and int64.

    `count` `[layers]`; `first` and `second`: sums of the counted rows less `shift`, and of their squares,
    `[layers, width]`, or `[2, layers, width / 2]` with even and odd columns apart; `shift` None for none; `norms`
    `[rows, layers]`, NaN for rows that are left out; `first_non_finite` `[layers]` is a row of the block, or -1.
    """

    count: np.ndarray
    first: np.ndarray
    second: np.ndarray
    shift: np.ndarray | None
    norms: np.ndarray
    non_finite: np.ndarray
    first_non_finite: np.ndarray
    zero_rows: np.ndarray


def sum_block(rows: np.ndarray, keep: np.ndarray | None, *, quickly: bool = False) -> Sums:
    """Sums of a group of rows.

    Args:
        rows: `[n, layers, width]`, any float dtype that numpy knows, bfloat16 included; only read.
        keep: `[n]` bool, False for rows to leave out; None keeps all.
        quickly: use the compiled kernel, if there is one: norms may differ in the last bits of a float32.
    """
    n, layers, width = rows.shape
    # Most groups have no row that is left out, and then need less work.
    masked = None if keep is None or keep.all() else ~keep
    if rows.strides[-1] != rows.itemsize:
        rows = np.ascontiguousarray(rows)
    narrow = rows.dtype == _BFLOAT16 and not width % 2 and layers * width > 2
    # In float64 the products of 16-bit numbers are exact, and so, nearly, are their sums: cancellation loses
    # nothing. From wider numbers, one of the group's rows is subtracted first.
    shift = np.empty((layers, width)) if rows.dtype.itemsize > 2 else None
    counts = np.empty((3, layers), np.int64)
    first, second = np.empty((2, 2, layers, width // 2) if narrow else (2, layers, width))
    sums = Sums(np.empty(layers), first, second, shift, np.empty((n, layers)), *counts)
    # A few layers at a time if a span of all of them does not fit into the processor's cache.
    parts = -(-layers * width * SPAN * 4 // _TILE_BYTES)
    group = -(-layers // parts)
    # A signalling NaN, or float64 values near 1e308, are data here and no reason to warn.
    with np.errstate(all="ignore"):
        for low in range(0, layers, group):
            some = slice(low, low + group)
            if not (narrow and _sum_narrow(sums, rows, masked, some, quickly=quickly)):
                _sum_wide(sums, rows[:, some], masked, some)
        np.sqrt(sums.norms, out=sums.norms)
    return sums


def together(found: np.ndarray) -> np.ndarray:
    """Sums by column, `[layers, width]`, from sums that may have even and odd columns apart."""
    return found if found.ndim == 2 else np.moveaxis(found, 0, -1).reshape(found.shape[1], -1)


def _sum_narrow(sums: Sums, rows: np.ndarray, masked: np.ndarray | None, layers: slice, *, quickly: bool) -> bool:
    """Sum bfloat16 rows of some layers in float32; False if they hold what float32's range does not, or odd rows.

    Rows are checked only after all are summed, to make fewer numpy calls that may wait for the GIL.
    """
    n, width = len(rows), rows.shape[-1]
    some = rows[:, layers]
    deep, spans = some.shape[1], -(-n // SPAN)
    first, second = np.empty((2, 2, spans, deep * width // 2), np.float32)
    squared = sums.norms[:, layers]
    kernel = load_kernel() if quickly and rows.flags.c_contiguous else None
    if kernel is None:
        _sum_spans(some, masked, first, second, squared)
    else:
        skipped = np.zeros(n, np.bool_) if masked is None else masked
        low = layers.start * width // 2
        words = rows.reshape(n, -1).view(np.uint32)
        kernel(words, low, low + deep * width // 2, skipped, SPAN, first, second, squared)
    odd_rows = _OddRows(n, deep, masked)
    odd = ~((squared >= _SMALLEST) & (squared <= _LARGEST))
    if odd.any():
        if masked is None or odd[~masked].any():
            return False
        odd_rows.note(slice(n), odd, some[None].astype(np.float32))
    if second.min() < _SMALLEST and not _only_zeros(some, masked, second):
        return False
    for found, into in ((first, sums.first), (second, sums.second)):
        np.add.reduce(found.reshape(2, spans, deep, -1), axis=1, dtype=np.float64, out=into[:, layers])
    odd_rows.tell(sums, layers)
    return True


def _sum_spans(
    rows: np.ndarray, masked: np.ndarray | None, first: np.ndarray, second: np.ndarray, squared: np.ndarray
) -> None:
    """Do what the kernel does, in numpy: a few spans of rows at a time."""
    n, deep, width = rows.shape
    some = SPAN * max(1, _TILE_BYTES // (SPAN * deep * width * 4))
    squares = np.empty((2, n, deep), np.float32)
    for start in range(0, n, some):
        here = slice(start, min(start + some, n))
        tile = _halves(rows[here])
        used = tile[:, : here.stop - start]
        _square_norms(used, squares[:, here])
        if masked is not None:
            used[:, masked[here]] = -0.0
        flat = tile.reshape(2, -1, SPAN, deep * width // 2)
        span = slice(start // SPAN, start // SPAN + flat.shape[1])
        np.einsum("esnw,esnw->esw", flat, flat, out=second[:, span])
        np.add.reduce(flat, axis=2, out=first[:, span])
    np.add(squares[0], squares[1], out=squared, dtype=np.float64)


def _only_zeros(rows: np.ndarray, masked: np.ndarray | None, second: np.ndarray) -> bool:
    """Whether all squares below float32's range are of columns of zeros only, so that nothing is lost.

    `second` `[2, spans, layers * width / 2]`: the squares, of even and odd columns, by spans of rows.
    """
    zero = second == 0
    if (~zero & (second < _SMALLEST)).any():
        return False
    for span in np.flatnonzero(zero.any(axis=(0, 2))):
        here = slice(span * SPAN, (span + 1) * SPAN)
        part = rows[here] if masked is None else rows[here][~masked[here]]
        # Any bit but the sign's.
        bits = np.bitwise_or.reduce(part.view(np.uint16), axis=0) << 1
        if bits[together(zero[:, span].reshape(2, rows.shape[1], -1))].any():
            return False
    return True


def _sum_wide(sums: Sums, rows: np.ndarray, masked: np.ndarray | None, layers: slice) -> None:
    """Sum rows of some layers in float64, a few rows at a time: one after the other, however many those are."""
    n, deep, width = rows.shape
    some = min(n, max(1, _TILE_BYTES // (deep * width * 8)))
    # In front of the rows is room for the sums so far, which are added up like one row more.
    tile = _SCRATCH.take((1 + some, deep, width), np.float64)
    squared = sums.norms[:, layers]
    odd_rows = _OddRows(n, deep, masked)
    first, second = np.empty((2, deep, width))
    shift = None
    if sums.shift is not None:
        shift = sums.shift[layers] = _row_that_counts(rows, odd_rows.left_out)
    for start in range(0, n, some):
        here = slice(start, min(start + some, n))
        part = tile[1 : 1 + here.stop - start]
        _widen(rows[here], part)
        _square_norms(part, squared[here])
        odd = ~((squared[here] > 0) & (squared[here] < np.inf))
        if odd.any():
            # Finite float64 values may have an infinite square, or one of zero.
            odd_rows.note(here, odd, part[None])
        if shift is not None:
            np.subtract(part, shift, out=part)
        odd_rows.clear(here, part[None])
        _add_up(tile, here, first)
        # No product and sum in one, which rounds otherwise and which not every processor has.
        np.multiply(part, part, out=part)
        _add_up(tile, here, second)
    for found, into in ((first, sums.first), (second, sums.second)):
        if into.ndim == 2:
            into[layers] = found
        else:
            into[:, layers] = found[:, 0::2], found[:, 1::2]
    odd_rows.tell(sums, layers)


class _OddRows:
    """What rows of some layers are left out of the sums, and which of them are not finite or zero: `[n, layers]`."""

    def __init__(self, n: int, layers: int, masked: np.ndarray | None) -> None:
        self.left_out, self._non_finite, self._zero = np.zeros((3, n, layers), np.bool_)
        if masked is not None:
            self.left_out[:] = masked[:, None]

    def note(self, here: slice, odd: np.ndarray, part: np.ndarray) -> None:
        """Look at rows with odd norms, of `[parts, rows, layers, width]`."""
        found = part[:, odd]
        self._non_finite[here][odd] = ~np.isfinite(found).all(axis=(0, -1))
        self._zero[here][odd] = ~found.any(axis=(0, -1))
        self.left_out[here] |= self._non_finite[here]

    def clear(self, here: slice, part: np.ndarray) -> None:
        """Set to zero what is left out."""
        if self.left_out[here].any():
            part[:, self.left_out[here]] = 0

    def tell(self, sums: Sums, layers: slice) -> None:
        """Write the counts of these rows, and of those that count, into `sums`."""
        sums.count[layers] = len(sums.norms) - self.left_out.sum(axis=0)
        sums.norms[:, layers][self.left_out] = np.nan
        sums.non_finite[layers] = self._non_finite.sum(axis=0)
        first = np.argmax(self._non_finite, axis=0)
        sums.first_non_finite[layers] = np.where(self._non_finite.any(axis=0), first, -1)
        sums.zero_rows[layers] = self._zero.sum(axis=0)


def _row_that_counts(rows: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """The first row of each layer that is finite and not left out, `[layers, width]`; zeros if there is none."""
    layers = np.arange(rows.shape[1])
    first = np.argmin(left_out, axis=0)
    found: np.ndarray = rows[first, layers].astype(np.float64)
    for layer in np.flatnonzero(left_out[first, layers] | ~np.isfinite(found).all(axis=-1)):
        fine = np.isfinite(rows[:, layer]).all(axis=-1) & ~left_out[:, layer]
        found[layer] = rows[np.argmax(fine), layer] if fine.any() else 0
    return found


def _add_up(tile: np.ndarray, here: slice, into: np.ndarray) -> None:
    """Add the rows of a tile, which are rows `here` of the group, to the sums of those before them."""
    tile[0] = into
    np.add.reduce(tile[1 if here.start == 0 else 0 : 1 + here.stop - here.start], axis=0, out=into)


def _halves(rows: np.ndarray) -> np.ndarray:
    """Convert bfloat16 rows to float32, even and odd columns apart: `[2, rows, layers, width / 2]`.

    They are the two halves of a 32-bit word, each a float32 once the other is gone. Up to whole spans there are rows of
    negative zeros, which change no sum.
    """
    n, layers, width = rows.shape
    tile = _SCRATCH.take((2, -(-n // SPAN) * SPAN, layers, width // 2), np.float32)
    words, bits = rows.view(np.uint32), tile.view(np.uint32)
    np.left_shift(words, 16, out=bits[0, :n])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=bits[1, :n])
    tile[:, n:] = -0.0
    return tile


def _widen(rows: np.ndarray, tile: np.ndarray) -> None:
    """Convert rows to float64, exactly."""
    if rows.dtype != np.float16:
        np.copyto(tile, rows)
        return
    # numpy converts halves one by one, torch with the processor's own instruction: four times as fast.
    source = torch.from_numpy(np.require(rows, requirements=["C", "W"]).reshape(-1))
    target = torch.from_numpy(tile.reshape(-1))
    for start in range(0, len(source), _SERIAL_COPY):
        piece = slice(start, start + _SERIAL_COPY)
        target[piece].copy_(source[piece].float())


def _square_norms(tile: np.ndarray, into: np.ndarray) -> None:
    np.vecdot(tile[..., :_LONGEST_DOT], tile[..., :_LONGEST_DOT], out=into)
    for start in range(_LONGEST_DOT, tile.shape[-1], _LONGEST_DOT):
        piece = tile[..., start : start + _LONGEST_DOT]
        into += np.vecdot(piece, piece)
