"""A shard that comes in parts: whether it is, byte for byte, what its writer made."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.format import HEADER_BYTES, STATISTICS

if TYPE_CHECKING:
    from mmcache.format import Layout

__all__ = ["Arriving", "ArrivingPart"]


class ArrivingPart:
    """One part of a shard, from `start` on, whose bytes come in order. Used by one thread.

    Args:
        layout: what the shard's header promises.
        start: where the part begins: at the header, or an inner chunk.
    """

    def __init__(self, layout: Layout, start: int) -> None:
        self._layout, self.at, self._crc = layout, start, 0
        self.crcs: list[int] = []
        self.first, self.tail = bytearray(), bytearray()

    def add(self, data: memoryview) -> None:
        """Take in the next bytes."""
        layout, offset, step = self._layout, self.at, self._layout.spec.chunk_bytes
        self.first += data[: max(0, HEADER_BYTES - offset)]
        self.tail += data[max(0, layout.data_end - offset) :]
        at, stop = max(offset, HEADER_BYTES), min(offset + len(data), layout.chunks_end)
        while at < stop:
            end = min(stop, at + step - (at - HEADER_BYTES) % step)
            self._crc = crc32c.crc32c(data[at - offset : end - offset], self._crc)
            if not (end - HEADER_BYTES) % step:
                self.crcs.append(self._crc)
                self._crc = 0
            at = end
        self.at += len(data)


class Arriving:
    """What is known of a shard that comes in parts, all at the same time.

    Args:
        layout: what its header promises.
        head: the header, which was read before.
        size: about how many bytes a part may have.
    """

    def __init__(self, layout: Layout, head: bytes, size: int) -> None:
        self._layout, self._head = layout, head
        step = layout.spec.chunk_bytes
        whole = max(1, size // step) * step
        edges = [0, *range(HEADER_BYTES + whole, layout.chunks_end, whole), layout.size]
        self.parts = [(ArrivingPart(layout, start), stop) for start, stop in pairwise(edges)]

    def problem(self) -> str:
        """Say what is wrong with it, once all has come; empty if nothing is. In detail: `shard_check`."""
        layout = self._layout
        first, tail = (b"".join(getattr(part, name) for part, _ in self.parts) for name in ("first", "tail"))
        crcs = [crc for part, _ in self.parts for crc in part.crcs]

        def of(name: str) -> bytes:
            _, _, start, stop = layout.tensors[name]
            return tail[start - layout.data_end : stop - layout.data_end]

        if first != self._head:
            return "its header is not the one that was checked"
        bad = np.flatnonzero(np.frombuffer(of("crc32c"), "<u4") != np.array(crcs, np.uint32))
        if len(bad):
            return f"inner chunk {bad[0]} does not match its checksum"
        names = STATISTICS if layout.spec.stat_layers else ()
        found = {name: np.frombuffer(of(name), f"<{layout.tensors[name][0][0].lower()}8") for name in names}
        same = tail == layout.tail(crcs, found or None)
        return "" if same else "its statistics, padding or index do not match their checksums"
