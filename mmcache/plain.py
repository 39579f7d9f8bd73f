"""Plain data: what JSON can say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["json_ready"]


def json_ready(data: Any) -> Any:
    """Write arrays as lists; NaN and infinities, which JSON has not, as zarr does: "NaN", "Infinity", "-Infinity"."""
    if isinstance(data, dict):
        return {name: json_ready(value) for name, value in data.items()}
    if isinstance(data, np.ndarray):
        if data.dtype.kind != "f" or np.isfinite(data).all():
            return data.tolist()
        data = data.tolist()
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
