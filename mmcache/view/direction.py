"""What a number is taken of for each row: its norm, one dimension, or its dot product with a direction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import torch

from mmcache.errors import ArgumentError, ShapeError
from mmcache.system.arguments import a_path, public, shown
from mmcache.view.base import Name
from mmcache.view.dimensions import check_dimension

if TYPE_CHECKING:
    import os

    from mmcache.view.look import Look

__all__ = ["Direction", "load_direction", "named", "resolve_direction"]

# A dimension's number, or a vector.
Direction = int | np.ndarray | torch.Tensor


@public(file=a_path)
def load_direction(file: str | os.PathLike[str]) -> np.ndarray:
    """Read a direction from a `.npy` or `.safetensors` file that holds one array: float64, any shape.

    Raises:
        ArgumentError: the file cannot be read as such, or holds several arrays.
    """
    path = Path(file)
    try:
        if path.suffix == ".npy":
            # Never unpickled: what a file says is not run.
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        with safetensors.safe_open(path, "pt") as opened:
            names = list(opened.keys())
            if len(names) != 1:
                raise ArgumentError(f"{path} holds {', '.join(names) or 'nothing'}: expected one tensor, the direction")
            found: np.ndarray = opened.get_tensor(names[0]).double().numpy()
            return found
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"{path} is no direction: expected a .npy or .safetensors file of one array ({error})"
        ) from error


def resolve_direction(look: Look, direction: Direction | None) -> np.ndarray | int | None:
    """Check a direction against a site, and give it as `Look.scores` takes it.

    Raises:
        OutOfRangeError: there is no such dimension.
        ShapeError: a vector that is not `[d_model]`, or `[layers, d_model]` of the layers looked at.
    """
    if direction is None:
        return None
    if isinstance(direction, int | np.integer) and not isinstance(direction, bool):
        check_dimension(look, int(direction))
        return int(direction)
    given = direction.detach().double().cpu() if isinstance(direction, torch.Tensor) else direction
    try:
        vector = np.asarray(given, float)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"direction is {shown(direction)}: expected a dimension's number, or a vector") from error
    shapes = ((look.view.d_model,), (len(look.slots), look.view.d_model))
    if vector.shape not in shapes:
        raise ShapeError(f"direction is {vector.shape}: expected {shapes[0]} or {shapes[1]} for {look.site}")
    return vector


def named(direction: Direction | None) -> int | Name | None:
    """Give what a view's Python says of a direction: a dimension's number, or the variable that the vector is in."""
    return direction if direction is None or isinstance(direction, int) else Name("direction")
