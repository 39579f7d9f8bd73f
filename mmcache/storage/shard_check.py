"""Verification of a whole shard, in a file or during a download in parts.

Checksums are compared, and everything after the rows is compared with what the writer would make.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.errors import CorruptError
from mmcache.format.shard import HEADER_BYTES, STATISTICS, said_ids
from mmcache.storage.shard_bytes import FileBytes
from mmcache.system.files import REFUSALS, open_file
from mmcache.system.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmcache.format.shard import Layout
    from mmcache.storage.shard_bytes import ShardBytes
    from mmcache.storage.shard_folder import ShardFolder

__all__ = [
    "StreamCheck",
    "StreamCheckPart",
    "check_copy",
    "check_ids",
    "check_shard",
    "index_start",
    "read_whole",
    "tail_problems",
]

_PIECE = 8 << 20


class StreamCheckPart:
    """Incremental checksums of one part of a shard, whose bytes arrive in order. For one thread.

    Args:
        layout: the shard's layout, by its header.
        start: offset of the part: the header (0), or the start of an inner chunk.
    """

    def __init__(self, layout: Layout, start: int) -> None:
        self._layout, self.at, self._crc = layout, start, 0
        self.crcs: list[int] = []
        self.first, self.tail = bytearray(), bytearray()

    def add(self, data: memoryview) -> None:
        """Add the next bytes."""
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


class StreamCheck:
    """Incremental checksum verification of a shard downloaded in parallel parts.

    Args:
        layout: the shard's layout, by its header.
        head: the header, as it was checked.
        size: approximate bytes per part.
    """

    def __init__(self, layout: Layout, head: bytes, size: int) -> None:
        self._layout, self._head = layout, head
        step = layout.spec.chunk_bytes
        whole = max(1, size // step) * step
        edges = [0, *range(HEADER_BYTES + whole, layout.chunks_end, whole), layout.size]
        self.parts = [(StreamCheckPart(layout, start), stop) for start, stop in pairwise(edges)]

    def problem(self) -> str:
        """What is wrong with the shard, after all bytes were added; empty if nothing is."""
        first, tail = (b"".join(getattr(part, name) for part, _ in self.parts) for name in ("first", "tail"))
        if first != self._head:
            return "its header is not the one that was checked"
        crcs = [crc for part, _ in self.parts for crc in part.crcs]
        return "; ".join(tail_problems(self._layout, crcs, tail))


def check_copy(file: Path, check: Callable[[bytes, int], Layout]) -> None:
    """Check every byte of a shard's file; blocks while it is read.

    Args:
        file: the shard.
        check: checks its header and size, and returns its layout.

    Raises:
        IncompleteError: there is no such file.
        CorruptError: it is damaged, or another shard.
        OSError: the system refuses to read it.
    """
    fd, status = open_file(file, what="the copy of a shard")
    shard = FileBytes(fd, status.size)
    try:
        layout = check(shard.head(), shard.size)
        wrong = tail_problems(layout, *read_whole(shard, layout, lambda _: None))
    finally:
        shard.close()
    if wrong:
        raise CorruptError(f"{file}: {'; '.join(wrong)}")


def read_whole(shard: ShardBytes, layout: Layout, tell: Callable[[int], None]) -> tuple[list[int], bytes]:
    """Read a whole shard. The checksum of each inner chunk, and all bytes after the rows.

    Raises:
        CorruptError: it is too short. OSError: the system refuses to read it.
    """
    piece, whole = anonymous(min(_PIECE, layout.size)).data, StreamCheckPart(layout, 0)
    while whole.at < layout.size:
        count = min(len(piece), layout.size - whole.at)
        if not shard.read(piece[:count], whole.at):
            raise CorruptError(f"it ends behind byte {whole.at}, while it is read; {layout.size} were there")
        whole.add(piece[:count])
        tell(count)
    return whole.crcs, bytes(whole.tail)


def index_start(layout: Layout) -> int:
    """Offset of the index of inner chunks, or of the fill before it."""
    return layout.tensors.get("fill", layout.tensors["index"])[2]


def tail_problems(layout: Layout, crcs: list[int], tail: bytes) -> list[str]:
    """What is wrong with a shard, by its inner chunks' computed checksums and all bytes after its rows (`tail`)."""
    start = layout.data_end

    def bytes_of(name: str, of: bytes = tail) -> bytes:
        _, _, first, last = layout.tensors[name]
        return of[first - start : last - start]

    statistics = None
    if layout.spec.stat_layers:
        codes = {name: layout.tensors[name][0] for name in STATISTICS}
        statistics = {name: np.frombuffer(bytes_of(name), f"<{code[0].lower()}8") for name, code in codes.items()}
    wanted = layout.tail(crcs, statistics)
    wrong = []
    stored = np.frombuffer(bytes_of("crc32c"), "<u4")
    bad = np.flatnonzero(stored != np.array(crcs, np.uint32)).tolist()
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        wrong.append(f"inner chunk {bad[0]}{more} of {len(crcs)} does not match its checksum")
    padding = layout.tensors.get("padding", ("", (), start, start))
    if tail[: padding[3] - start] != wanted[: padding[3] - start]:
        wrong.append("the padding behind its rows is not what belongs there")
    if statistics is not None and bytes_of("statistics_crc32c") != bytes_of("statistics_crc32c", wanted):
        wrong.append("its statistics do not match their checksum")
    first = index_start(layout) - start
    if tail[first:] != wanted[first:]:
        wrong.append("its index of inner chunks is not the one that belongs there")
    return wrong


def check_shard(
    folder: ShardFolder, slot: int, block: int, *, full: bool, ids: str | None, tell: Callable[[int], None]
) -> tuple[list[str], int]:
    """Check one shard; blocks until done. What is wrong with its bytes, and how many were read.

    Args:
        folder: the array's shards.
        slot: which shard,
        block: and which block of it.
        full: compare every checksum; else only the header, the size, and the index with the fill before it.
        ids: the digest of its rows' token ids, compared if its header has one; None if unknown.
        tell: called with the number of bytes of each read.

    Raises:
        IncompleteError: it does not exist.
        CorruptError: its first page or size is not that of the expected shard, or its rows are of other tokens.
        OSError: the system refuses to read it.
    """
    try:
        shard, layout = folder.open_layout(slot, block, direct=full)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        shard, layout = folder.open_layout(slot, block)
    try:
        check_ids(shard.head(), ids)
        wrong = (
            tail_problems(layout, *read_whole(shard, layout, tell)) if full else _index_problems(shard, layout, tell)
        )
    finally:
        shard.close()
    return wrong, layout.size if full else HEADER_BYTES + layout.size - index_start(layout)


def check_ids(head: bytes, ids: str | None) -> None:
    """Raise CorruptError if a shard's header has another digest of token ids than `ids`; None if that is unknown."""
    said = said_ids(head)
    if ids is not None and said not in ("", ids):
        raise CorruptError(f"its rows are of other tokens ({said}) than those that the store has there ({ids})")


def _index_problems(shard: ShardBytes, layout: Layout, tell: Callable[[int], None]) -> list[str]:
    start = index_start(layout)
    wanted = layout.index()
    wanted = bytes(layout.size - start - len(wanted)) + wanted
    found = bytearray(len(wanted))
    there = shard.read(memoryview(found), start)
    tell(len(found))
    return [] if there and found == wanted else ["its index of inner chunks is not the one that belongs there"]
