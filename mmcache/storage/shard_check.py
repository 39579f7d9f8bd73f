"""One shard, looked at byte for byte: what of it is not as its writer left it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcache.errors import CorruptError
from mmcache.format.shard import HEADER_BYTES, said_ids
from mmcache.storage.arriving import index_start, read_whole, tail_problems
from mmcache.system.files import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcache.format.shard import Layout
    from mmcache.storage.shard_bytes import ShardBytes
    from mmcache.storage.shards import ShardFolder

__all__ = ["check_ids", "check_shard"]


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
