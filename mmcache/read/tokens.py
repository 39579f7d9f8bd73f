"""Reading token ids, flags and sequences of a store (`TokenArrays`, `Sequences`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch

from mmcache.errors import CorruptError, OutOfRangeError
from mmcache.read.positions import whole_number
from mmcache.storage.shard_folder import MANY
from mmcache.system.arguments import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmcache.format.manifest import Manifest
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["Location", "Sequences", "Span", "TokenArrays"]


class Span(NamedTuple):
    """One sequence: the positions from `start` to before `stop`, and the number of its document."""

    start: int
    stop: int
    document: int


class Location(NamedTuple):
    """Where a position lies: its sequence, the offset in it, and the token id (-1: unknown)."""

    sequence: int
    offset: int
    token_id: int


class Sequences:
    """The sequences of a store, in order: `sequences[i]` is a `Span`, `numpy()` is all of them as `[n, 3]` int64."""

    def __init__(self, spans: np.ndarray) -> None:
        self._spans = spans
        # `np.asarray(store.sequences)` shares this memory.
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
        """Start, stop and document of each: `[n_sequences, 3]` int64, a copy."""
        return self._spans.copy()

    def tolist(self) -> list[Span]:
        """All of them as a list of spans."""
        return list(self)

    def find(self, position: int) -> int:
        """The number of the sequence that holds a position, which must exist."""
        return int(np.searchsorted(self._spans[:, 0], position, side="right")) - 1


# Ids and flags of a store that has none, such as a cache.
_UNKNOWN = {"tokens": -1, "flags": 0}


class TokenArrays:
    """The arrays `tokens`, `flags` and `sequences` of one store; `whole` and `sequences` keep what they read.

    Args:
        manifest: the store's metadata.
        folder: returns the shards of an array.
        where: the store's name in errors.
    """

    def __init__(self, manifest: Manifest, folder: Callable[[str], ShardFolder], where: str) -> None:
        self._manifest, self._folder, self._where = manifest, folder, where
        self._whole: dict[str, torch.Tensor] = {}
        self._sequences: Sequences | None = None

    def whole(self, array: str) -> torch.Tensor:
        """Read all of `tokens` or `flags`: `[n_tokens]`; shared by all callers."""
        found = self._whole.get(array)
        if found is None:
            found = self._whole[array] = self._read(array)
        return found

    def _read(self, array: str) -> torch.Tensor:
        total = self._manifest.n_tokens or 0
        if self._manifest.has_tokens:
            return self._folder(array).read(0, total)
        # A small cache opens even if some of its shards are lost.
        if total >= MANY:
            self._folder(next(iter(self._manifest.sites))).believe_rows(0, total)
        return self._unknown(array, total)

    def piece(self, array: str, start: int, stop: int) -> torch.Tensor:
        """Read only `tokens` or `flags` from `start` to before `stop`, which must exist."""
        if array in self._whole:
            return self._whole[array][start:stop]
        if not self._manifest.has_tokens:
            return self._unknown(array, stop - start)
        return self._folder(array).read(start, stop)

    def _unknown(self, array: str, count: int) -> torch.Tensor:
        return torch.full((count,), _UNKNOWN[array], dtype=self._manifest.spec(array).dtype.torch)

    @property
    def sequences(self) -> Sequences:
        """The contexts that the model saw, in order; together they cover all tokens.

        Raises:
            CorruptError: they do not follow each other without gaps.
        """
        if self._sequences is None:
            self._sequences = self._read_sequences()
        return self._sequences

    def _read_sequences(self) -> Sequences:
        total, count = self._manifest.n_tokens or 0, self._manifest.n_sequences
        if self._manifest.has_tokens:
            spans = self._folder("sequences").read(0, count).numpy()
            if len(spans) and self._manifest.kind == "grown":
                # After a crash, the last one may extend past the committed tokens.
                spans[-1, 1] = min(spans[-1, 1], total)
        else:
            spans = np.array([[0, total, 0]][:count], np.int64).reshape(-1, 3)
        edges = np.append(spans[:, 0], total)
        if (edges[0] if len(spans) else total) or (spans[:, 1] != edges[1:]).any():
            raise CorruptError(f"{self._where}: its sequences do not follow each other up to {total} tokens")
        return Sequences(spans)
