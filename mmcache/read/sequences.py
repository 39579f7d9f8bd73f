"""The sequences of a store: where each begins and ends, and which one holds a position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from mmcache.errors import OutOfRangeError
from mmcache.read.positions import whole_number
from mmcache.system.arguments import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Location", "Sequences", "Span"]


class Span(NamedTuple):
    """One sequence: the positions from `start` to before `stop`, and the number of its document."""

    start: int
    stop: int
    document: int


class Location(NamedTuple):
    """Where a position lies: in which sequence, how far in, and which token it is (-1: unknown)."""

    sequence: int
    offset: int
    token_id: int


class Sequences:
    """The sequences of a store, in order: `sequences[i]` is a `Span`, `numpy()` all of them as `[n, 3]` int64."""

    def __init__(self, spans: np.ndarray) -> None:
        self._spans = spans
        # `np.asarray(store.sequences)` is this very memory.
        self._spans.flags.writeable = False

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> list[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | list[Span]:
        if isinstance(index, slice):
            return [Span(*span) for span in self._spans[index].tolist()]
        index = whole_number("sequence", index)
        if not -len(self) <= index < len(self):
            raise OutOfRangeError(f"sequence {shown(index)} not in store (n_sequences={len(self)})")
        return Span(*self._spans[index].tolist())

    def __iter__(self) -> Iterator[Span]:
        return (Span(*span) for span in self._spans.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._spans, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Sequences(n={len(self)})"

    def numpy(self) -> np.ndarray:
        """Give start, stop and document of each as `[n_sequences, 3]` int64, in the caller's own memory."""
        return self._spans.copy()

    def tolist(self) -> list[Span]:
        """Give all of them as a list of spans."""
        return list(self)

    def find(self, position: int) -> int:
        """Give the number of the sequence that holds a position that is there."""
        return int(np.searchsorted(self._spans[:, 0], position, side="right")) - 1
