"""Whether a shard is what its writer made, byte for byte: while it is downloaded in parts, or in a file.

A whole shard, byte for byte: whether it is what its writer made, as it comes in parts, or in a file. Its checksums are
compared, and all that stands behind its rows is written anew, and compared.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.errors import CorruptError
from mmcache.format.shard import HEADER_BYTES, STATISTICS, said_ids
from mmcache.storage.shard_folder import FileBytes
from mmcache.system.files import REFUSALS, open_file
from mmcache.system.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmcache.format.shard import Layout
    from mmcache.storage.shard_folder import ShardBytes, ShardFolder

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


class StreamCheck:
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
        self.parts = [(StreamCheckPart(layout, start), stop) for start, stop in pairwise(edges)]

    def problem(self) -> str:
        """What is wrong with it, once all has come; empty if nothing is."""
        first, tail = (b"".join(getattr(part, name) for part, _ in self.parts) for name in ("first", "tail"))
        if first != self._head:
            return "its header is not the one that was checked"
        crcs = [crc for part, _ in self.parts for crc in part.crcs]
        return "; ".join(tail_problems(self._layout, crcs, tail))


def check_copy(file: Path, check: Callable[[bytes, int], Layout]) -> None:
    """Compare every byte of a shard's file with what belongs there; blocks while it is read.

    Args:
        file: the shard.
        check: checks its header and size, and gives its layout.

    Raises:
        IncompleteError: there is no such file.
        CorruptError: it is not what belongs there.
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
    """Read a whole shard: the checksum of each inner chunk, and all that stands behind the rows.

    Raises:
        CorruptError: it ends before its size. OSError: the system refuses to read it.
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
    """Where the index of inner chunks begins, or the fill before it."""
    return layout.tensors.get("fill", layout.tensors["index"])[2]


def tail_problems(layout: Layout, crcs: list[int], tail: bytes) -> list[str]:
    """What is wrong with a whole shard, by the checksums of its inner chunks and all that stands behind its rows."""
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
    """Look at one shard: what is wrong with its bytes, and how many were read; blocks until then.

    Args:
        folder: the array's shards.
        slot: which shard,
        block: and which block of it.
        full: compare every checksum; else only the header, the size, and the index with the fill before it.
        ids: the digest of the tokens that its rows should be of, if its header says any; None where that is not known.
        tell: called with numbers of bytes, as they are read.

    Raises:
        IncompleteError: it is not there.
        CorruptError: its first page or its size is not that of the shard that belongs there, or it is of other tokens.
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
    """Raise CorruptError if a shard's header says that its rows are of other tokens; None where these are not known."""
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
