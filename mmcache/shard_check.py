"""One shard, looked at byte for byte: what of it is not as its writer left it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmcache.arriving import ArrivingPart
from mmcache.errors import CorruptError
from mmcache.format import HEADER_BYTES, STATISTICS, said_ids
from mmcache.memory import anonymous
from mmcache.site_map import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcache.format import Layout
    from mmcache.shard_bytes import ShardBytes
    from mmcache.shards import ShardFolder

__all__ = ["check_ids", "check_shard", "tail_problems"]

_PIECE = 8 << 20


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
        wrong = tail_problems(layout, *_read(shard, layout, tell)) if full else _index_problems(shard, layout, tell)
    finally:
        shard.close()
    return wrong, layout.size if full else HEADER_BYTES + layout.size - _index_start(layout)


def check_ids(head: bytes, ids: str | None) -> None:
    """Raise CorruptError if a shard's header says that its rows are of other tokens; None where these are not known."""
    said = said_ids(head)
    if ids is not None and said not in ("", ids):
        raise CorruptError(f"its rows are of other tokens ({said}) than those that the store has there ({ids})")


def _index_start(layout: Layout) -> int:
    return layout.tensors.get("fill", layout.tensors["index"])[2]


def _index_problems(shard: ShardBytes, layout: Layout, tell: Callable[[int], None]) -> list[str]:
    start = _index_start(layout)
    wanted = layout.index()
    wanted = bytes(layout.size - start - len(wanted)) + wanted
    found = bytearray(len(wanted))
    there = shard.read(memoryview(found), start)
    tell(len(found))
    return [] if there and found == wanted else ["its index of inner chunks is not the one that belongs there"]


def _read(shard: ShardBytes, layout: Layout, tell: Callable[[int], None]) -> tuple[list[int], bytes]:
    """Read a whole shard: the checksum of each inner chunk, and all that stands behind the rows."""
    piece, whole = anonymous(min(_PIECE, layout.size)).data, ArrivingPart(layout, 0)
    while whole.at < layout.size:
        count = min(len(piece), layout.size - whole.at)
        if not shard.read(piece[:count], whole.at):
            raise CorruptError(f"it ends behind byte {whole.at}, while it is read; {layout.size} were there")
        whole.add(piece[:count])
        tell(count)
    return whole.crcs, bytes(whole.tail)


def tail_problems(layout: Layout, crcs: list[int], tail: bytes) -> list[str]:
    """Say what of a whole shard is wrong: from the checksums of its inner chunks, and all that stands behind its rows.

    It is written anew, from the checksums and the statistics, and compared.
    """
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
    first = _index_start(layout) - start
    if tail[first:] != wanted[first:]:
        wrong.append("its index of inner chunks is not the one that belongs there")
    return wrong
