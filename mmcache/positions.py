"""Which tokens are asked for: any kind of list of whole numbers, checked and counted from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from mmcache.devices import is_cpu
from mmcache.errors import DtypeError, ShapeError
from mmcache.held import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcache.errors import OutOfRangeError

__all__ = ["Positions", "whole_positions"]

Positions: TypeAlias = "torch.Tensor | np.ndarray | Sequence[int] | range"


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
    if isinstance(positions, torch.Tensor):
        # Every call of torch lets go of the interpreter's lock, and none of these is needed as a rule.
        positions = positions if is_cpu(positions.device) else positions.cpu()
        positions = (positions.detach() if positions.requires_grad else positions).numpy()
    wanted = np.asarray(positions)
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
