"""The headers of files that others read: safetensors and npy. Arithmetic only, no I/O.

Sources: the safetensors README, "Format" (https://github.com/huggingface/safetensors), and numpy's NEP 1.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["npy_header", "safetensors_header"]

_PAGE = 4096


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]
) -> np.ndarray:
    """Write the header of tensors that lie one behind the other, so that the first begins on a page: `[bytes]` uint8.

    Args:
        tensors: each one's dtype code, shape and bytes, in the order of the file.
        metadata: the strings of `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (code, shape, size) in tensors.items():
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // _PAGE) * _PAGE - 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def npy_header(code: str, shape: tuple[int, ...]) -> np.ndarray:
    """Write the header of a C-ordered npy file, such as for `"<f4"`: `[bytes]` uint8."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": code, "fortran_order": False, "shape": shape})
    return np.frombuffer(head.getvalue(), np.uint8)
