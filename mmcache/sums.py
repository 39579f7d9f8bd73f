"""Sums of one block of rows: the arithmetic under `statistics`, which says where blocks begin and adds them up.

float16, float32 and float64 are summed in float64. bfloat16, which activations usually are, is summed in float32 by
spans of 32 rows, and the spans in float64: three times as fast, since the conversion is a shift and a register holds
twice as many numbers. No variance is lost by it to squares that cancel. A bfloat16 has 8 significant bits and its
square 16, so a span of squares of the same magnitude is added up exactly; and where values of a span differ in
magnitude by a factor of four or more, their variance is of the size of the squares themselves. Norms, means (against
the root mean square) and m2 are right to 1e-6. What float32's range does not hold is summed in float64 as well.

Each number comes from the rows of its block alone, by calls that numpy runs in the thread that makes them: no number
of threads, and no way of cutting the rows, shows in the last bit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch

from mmcache.memory import anonymous

__all__ = ["SPAN", "Sums", "sum_block"]

# Rows that are added up in float32.
SPAN = 32
# What is widened at once, to float32 and to float64: more leaves the cache, less waits for the interpreter. Rows in
# float64 are gone through five times, beside a model that wants the cache too.
_TILE_BYTES, _WIDE_BYTES = 8 << 20, 1 << 20
# From 10,000 numbers on, BLAS may use threads of its own, and then their number shows in the last bits.
_LONGEST_DOT = 8192
# From 32,768 numbers on, torch copies with as many threads as the user gave it, in each thread of ours.
_SERIAL_COPY = 32_704
# Sums of squares that float32 holds: larger ones may have overflowed, and in smaller ones what underflowed may count.
_LARGEST, _SMALLEST = 2.0**100, 2.0**-90


class _Scratch(threading.local):
    """Memory of one thread that blocks are widened into: fresh memory costs more than the sums themselves."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: type[np.floating]) -> np.ndarray:
        """Give memory of a shape, always at the start of a page; it is the next caller's too."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(self._memory) < size:
            self._memory = anonymous(size)
        return self._memory[:size].view(dtype).reshape(shape)


_SCRATCH = _Scratch()


@dataclass
class Sums:
    """What is known of one block of rows, in float64 and int64.

    `count` `[layers]`; `first` and `second`: sums of the counted rows less `shift`, and of their squares,
    `[layers, width]`; `shift` None for none; `norms` `[rows, layers]`, NaN for rows that are left out;
    `first_non_finite` `[layers]` is a row of the block, or -1.
    """

    count: np.ndarray
    first: np.ndarray
    second: np.ndarray
    shift: np.ndarray | None
    norms: np.ndarray
    non_finite: np.ndarray
    first_non_finite: np.ndarray
    zero_rows: np.ndarray


def sum_block(rows: np.ndarray, keep: np.ndarray | None) -> Sums:
    """Sum a block of rows: `[n, layers, width]` of any float dtype that numpy knows, bfloat16 included; read only.

    Args:
        rows: the block.
        keep: `[n]` bool, False for rows to leave out; None keeps all.
    """
    n, layers, width = rows.shape
    # Most blocks have no row that is left out, and then less is to be done.
    masked = None if keep is None or keep.all() else ~keep
    if rows.strides[-1] != rows.itemsize:
        rows = np.ascontiguousarray(rows)
    narrow = rows.dtype.name == "bfloat16" and not width % 2
    # In float64 the products of 16-bit numbers are exact, and so are their sums, near enough: there is nothing
    # to be lost by squares that cancel. Wider numbers are taken less one of their block's rows.
    shift = np.empty((layers, width)) if rows.dtype.itemsize > 2 else None
    counts = np.zeros(layers, np.int64), np.full(layers, -1, np.int64), np.zeros(layers, np.int64)
    sums = Sums(
        np.empty(layers), np.empty((layers, width)), np.empty((layers, width)), shift, np.empty((n, layers)), *counts
    )
    group = max(1, _TILE_BYTES // (n * width * (4 if narrow else 8)))
    # A signalling NaN, or float64 values near 1e308, are data here and no reason to warn.
    with np.errstate(all="ignore"):
        for low in range(0, layers, group):
            some = slice(low, low + group)
            if not (narrow and _sum_narrow(sums, rows[:, some], masked, some)):
                _sum_wide(sums, rows[:, some], masked, some)
        np.sqrt(sums.norms, out=sums.norms)
    return sums


def _sum_narrow(sums: Sums, rows: np.ndarray, masked: np.ndarray | None, layers: slice) -> bool:
    """Sum bfloat16 rows of some layers in float32; False if they hold what float32's range does not."""
    n, half = len(rows), rows.shape[-1] // 2
    spans = -(-n // SPAN)
    # Even and odd columns apart: the two halves of a 32-bit word, each a float32 once the other is gone.
    tile = _SCRATCH.take((2, spans * SPAN, rows.shape[1], half), np.float32)
    words, bits = rows.view(np.uint32), tile.view(np.uint32)
    np.left_shift(words, 16, out=bits[0, :n])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=bits[1, :n])
    tile[:, n:] = 0
    used = tile[:, :n]
    squared = _squared_norms(used).sum(axis=0, dtype=np.float64)
    sums.norms[:, layers] = squared
    left_out = None if masked is None else np.repeat(masked[:, None], squared.shape[1], axis=1)
    odd = ~((squared >= _SMALLEST) & (squared <= _LARGEST))
    non_finite = zero = None
    if odd.any():
        non_finite, zero = odd.copy(), odd.copy()
        non_finite[odd] = ~np.isfinite(used[:, odd]).all(axis=(0, -1))
        zero[odd] = ~used[:, odd].any(axis=(0, -1))
        left_out = non_finite if left_out is None else left_out | non_finite
        if (odd & ~left_out & ~zero).any():
            return False
    if left_out is not None:
        used[:, left_out] = 0
    flat = tile.reshape(2 * spans, SPAN, -1)
    second = np.einsum("snw,snw->sw", flat, flat)
    if second.min() < _SMALLEST:
        # Nothing is lost of columns that are all zeros.
        few = second < _SMALLEST
        columns = few.any(axis=0)
        if (flat[:, :, columns].any(axis=1) & few[:, columns]).any():
            return False
    first = np.add.reduce(flat, axis=1)
    for found, into in ((first, sums.first), (second, sums.second)):
        added = np.add.reduce(found.reshape(2, spans, -1, half), axis=1, dtype=np.float64)
        into[layers, 0::2], into[layers, 1::2] = added
    _note(sums, layers, left_out, non_finite, zero)
    return True


def _sum_wide(sums: Sums, rows: np.ndarray, masked: np.ndarray | None, layers: slice) -> None:
    """Sum rows of some layers in float64, a few rows at a time: one after the other, however many those are."""
    n, deep, width = rows.shape
    some = min(n, max(1, _WIDE_BYTES // (deep * width * 8)))
    # In front of the rows is room for the sums so far, which are added up like one row more.
    tile = _SCRATCH.take((1 + some, deep, width), np.float64)
    squared = sums.norms[:, layers]
    non_finite, zero = np.zeros((2, n, deep), np.bool_)
    left_out = np.zeros((n, deep), np.bool_) if masked is None else np.repeat(masked[:, None], deep, axis=1)
    shift = None
    if sums.shift is not None:
        shift = sums.shift[layers] = _row_that_counts(rows, left_out)
    for start in range(0, n, some):
        here = slice(start, min(start + some, n))
        part = tile[1 : 1 + here.stop - start]
        _widen(rows[here], part)
        squared[here] = _squared_norms(part)
        odd = ~((squared[here] > 0) & (squared[here] < np.inf))
        if odd.any():
            # Finite float64 values may have an infinite square, or one of zero.
            non_finite[here][odd] = ~np.isfinite(part[odd]).all(axis=-1)
            zero[here][odd] = ~part[odd].any(axis=-1)
            left_out[here] |= non_finite[here]
        if shift is not None:
            np.subtract(part, shift, out=part)
        if left_out[here].any():
            part[left_out[here]] = 0
        _add_up(tile, here, sums.first[layers])
        # No product and sum in one, which rounds otherwise and which not every processor has.
        np.multiply(part, part, out=part)
        _add_up(tile, here, sums.second[layers])
    _note(sums, layers, left_out, non_finite, zero)


def _row_that_counts(rows: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Give the first row of each layer that is finite and not left out, `[layers, width]`; zeros where none is."""
    layers = np.arange(rows.shape[1])
    first = np.argmin(left_out, axis=0)
    found: np.ndarray = rows[first, layers].astype(np.float64)
    for layer in np.flatnonzero(left_out[first, layers] | ~np.isfinite(found).all(axis=-1)):
        fine = np.isfinite(rows[:, layer]).all(axis=-1) & ~left_out[:, layer]
        found[layer] = rows[np.argmax(fine), layer] if fine.any() else 0
    return found


def _add_up(tile: np.ndarray, here: slice, into: np.ndarray) -> None:
    """Add the rows of a tile, which are rows `here` of the block, to the sums of those before them."""
    tile[0] = into
    np.add.reduce(tile[1 if here.start == 0 else 0 : 1 + here.stop - here.start], axis=0, out=into)


def _note(
    sums: Sums,
    layers: slice,
    left_out: np.ndarray | None,
    non_finite: np.ndarray | None,
    zero: np.ndarray | None,
) -> None:
    """Count the rows that count, those that are not finite, and those that are zero: `[rows, layers]`, None for no."""
    sums.count[layers] = len(sums.norms)
    if left_out is not None:
        sums.count[layers] -= left_out.sum(axis=0)
        sums.norms[:, layers][left_out] = np.nan
    if non_finite is not None:
        sums.non_finite[layers] = non_finite.sum(axis=0)
        sums.first_non_finite[layers] = np.where(non_finite.any(axis=0), np.argmax(non_finite, axis=0), -1)
    if zero is not None:
        sums.zero_rows[layers] = zero.sum(axis=0)


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


def _squared_norms(tile: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.vecdot(tile[..., :_LONGEST_DOT], tile[..., :_LONGEST_DOT])
    for start in range(_LONGEST_DOT, tile.shape[-1], _LONGEST_DOT):
        piece = tile[..., start : start + _LONGEST_DOT]
        found = found + np.vecdot(piece, piece)
    return found
