"""Which tokens are asked for: any kind of list of whole numbers, checked and counted from the start."""

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
    """A whole number of any kind, such as a tensor's, as an int.

    Raises:
        DtypeError: it is none.
    """
    try:
        return whole(value)
    except TypeError as error:
        raise DtypeError(f"{name} is {shown(value)}: expected a whole number") from error


def listed(name: str, values: Iterable[T]) -> Iterable[T]:
    """What can be iterated over, as it is.

    Raises:
        DtypeError: it cannot.
    """
    try:
        return iter(values)
    except TypeError as error:
        raise DtypeError(f"{name} is {shown(values)}: expected a list of whole numbers") from error


def slice_range(rows: slice, total: int) -> range:
    """The rows of a slice of so many.

    Raises:
        DtypeError: its bounds are no whole numbers, or it has no step.
    """
    try:
        return range(*rows.indices(total))
    except (TypeError, ValueError) as error:
        raise DtypeError(f"the slice is {shown(rows)}: expected whole numbers, and a step that is not 0") from error


def span_of(start: SupportsIndex, stop: SupportsIndex, total: int, of: str) -> tuple[int, int]:
    """The bounds of some of `total` rows, which are called `of`.

    Raises:
        OutOfRangeError, DtypeError: they are not all there, or the bounds are no whole numbers.
    """
    first, last = whole_number("start", start), whole_number("stop", stop)
    if not 0 <= first <= last <= total:
        raise OutOfRangeError(f"tokens {shown(first)} to {shown(last)} out of range ({of}={total})")
    return first, last


def _as_array(positions: Positions, n_tokens: int, bad: Callable[[int], OutOfRangeError]) -> np.ndarray:
    if isinstance(positions, torch.Tensor):
        # Every call of torch lets go of the interpreter's lock, and none of these is needed as a rule.
        positions = positions if is_cpu(positions.device) else positions.cpu()
        positions = (positions.detach() if positions.requires_grad else positions).numpy()
    if isinstance(positions, range) and positions:
        # Before memory is taken for them.
        for end in (positions[0], positions[-1]):
            if not -n_tokens <= end < n_tokens:
                raise bad(end)
    try:
        return np.asarray(positions)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"positions are {shown(positions)}: expected a list of whole numbers") from error


def whole_positions(positions: Positions, n_tokens: int, bad: Callable[[int], OutOfRangeError]) -> np.ndarray:
    """Give positions as int64 `[k]`, every one of them from 0 to `n_tokens` - 1.

    Args:
        positions: integers, negative ones from the end: a list, range, array or 1-D tensor.
        n_tokens: how many there are.
        bad: makes the error that names the first one out of range.

    Raises:
        ShapeError, DtypeError: they are no list of integers.
        OutOfRangeError: as `bad` makes it.
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
        # Before the cast, in which a large unsigned number would become a negative one.
        least, most = int(some.min()), int(some.max())
        if least < -n_tokens or most >= n_tokens:
            raise bad(int(some[np.argmax((some < -n_tokens) | (some >= n_tokens))]))
        found[piece] = some
        if least < 0:
            found[piece][some < 0] += n_tokens
    return found
