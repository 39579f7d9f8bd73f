"""Checks of requested positions: any list of integers becomes int64, non-negative and in range."""

from __future__ import annotations

from operator import index as whole
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias, TypeVar

import numpy as np
import torch

from mmcache.errors import DtypeError, OutOfRangeError, ShapeError
from mmcache.system.arguments import shown
from mmcache.system.devices import is_cpu
from mmcache.system.threads import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


__all__ = ["Positions", "listed", "slice_range", "span_of", "whole_number", "whole_positions"]

T = TypeVar("T")

Positions: TypeAlias = "torch.Tensor | np.ndarray | Sequence[int] | range"


def whole_number(name: str, value: SupportsIndex) -> int:
    """An integer of any kind, such as a tensor, as an int.

    Raises:
        DtypeError: it is not an integer.
    """
    try:
        return whole(value)
    except TypeError as error:
        raise DtypeError(f"{name} is {shown(value)}: expected a whole number") from error


def listed(name: str, values: Iterable[T]) -> Iterable[T]:
    """An iterator over `values`.

    Raises:
        DtypeError: they are not iterable.
    """
    try:
        return iter(values)
    except TypeError as error:
        raise DtypeError(f"{name} is {shown(values)}: expected a list of whole numbers") from error


def slice_range(rows: slice, total: int) -> range:
    """The rows that a slice selects out of `total`.

    Raises:
        DtypeError: its bounds are not integers, or its step is 0.
    """
    try:
        return range(*rows.indices(total))
    except (TypeError, ValueError) as error:
        raise DtypeError(f"the slice is {shown(rows)}: expected whole numbers, and a step that is not 0") from error


def span_of(start: SupportsIndex, stop: SupportsIndex, total: int, of: str) -> tuple[int, int]:
    """Checked bounds of a range within `total` rows; `of` names that total in errors.

    Raises:
        OutOfRangeError, DtypeError: the range exceeds the rows, or the bounds are not integers.
    """
    first, last = whole_number("start", start), whole_number("stop", stop)
    if not 0 <= first <= last <= total:
        raise OutOfRangeError(f"tokens {shown(first)} to {shown(last)} out of range ({of}={total})")
    return first, last


def _as_array(positions: Positions, n_tokens: int, bad: Callable[[int], OutOfRangeError]) -> np.ndarray:
    if isinstance(positions, torch.Tensor):
        # Each torch call releases the GIL (see system/threads.py), and usually none of these is needed.
        positions = positions if is_cpu(positions.device) else positions.cpu()
        positions = (positions.detach() if positions.requires_grad else positions).numpy()
    if isinstance(positions, range) and positions:
        # Before memory is allocated for them.
        for end in (positions[0], positions[-1]):
            if not -n_tokens <= end < n_tokens:
                raise bad(end)
    try:
        return np.asarray(positions)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"positions are {shown(positions)}: expected a list of whole numbers") from error


def whole_positions(positions: Positions, n_tokens: int, bad: Callable[[int], OutOfRangeError]) -> np.ndarray:
    """Positions as int64 `[k]`, each from 0 to `n_tokens` - 1.

    Args:
        positions: integers (negative: from the end) as a list, range, array or 1-D tensor.
        n_tokens: the number of tokens.
        bad: makes the error that names the first position out of range.

    Raises:
        ShapeError, DtypeError: they are not a list of integers.
        OutOfRangeError: made by `bad`.
    """
    wanted = _as_array(positions, n_tokens, bad)
    if wanted.ndim != 1:
        raise ShapeError(f"positions have shape {wanted.shape}: expected one dimension")
    if not wanted.size:
        return np.empty(0, np.int64)
    if wanted.dtype.kind not in "iu":
        raise DtypeError(f"positions are {wanted.dtype}: expected integers")
    found = np.empty(len(wanted), np.int64)
    for piece in pieces(len(wanted), len(wanted)):
        some = wanted[piece]
        # Before the cast, which would make a large unsigned number negative.
        least, most = int(some.min()), int(some.max())
        if least < -n_tokens or most >= n_tokens:
            raise bad(int(some[np.argmax((some < -n_tokens) | (some >= n_tokens))]))
        found[piece] = some
        if least < 0:
            found[piece][some < 0] += n_tokens
    return found
