"""Pieces of what is gathered, each taken its own way; what several sites or batches want of the device, in one go."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mmcache.system.direct_io import borrowed
from mmcache.system.files import REFUSALS
from mmcache.system.os_errors import our_error
from mmcache.system.syscalls import will_need_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from mmcache.read.site_map import Table
    from mmcache.system.direct_io import Wanted
    from mmcache.system.syscalls import Ranges

__all__ = ["Piece", "Taker", "Way", "take_pieces"]


class Way(enum.Enum):
    """How rows are taken: from the map, as it is or behind advice to bring them in, or past the page cache."""

    MAPPED = 0
    ADVISED = 1
    DIRECT = 2


class Piece(NamedTuple):
    """Rows of a table, int64 `[n]`, at least one, and where they go: contiguous host memory of theirs."""

    table: Table
    rows: np.ndarray
    into: torch.Tensor


class Taker(Protocol):
    """What knows the rows of a site: `SiteRows`."""

    def way(self, piece: Piece) -> Way:
        """Choose how a piece is best taken."""

    def advice(self, piece: Piece) -> list[Ranges]:
        """Give the memory of as many of its rows as may come in before the first is copied."""

    def copy(self, piece: Piece, *, advised: bool = False) -> None:
        """Copy it from the map."""

    def wanted(self, piece: Piece) -> Wanted:
        """Say what to read past the page cache for it."""

    def was_read(self, size: int) -> None:
        """Note that so many bytes were read past the page cache."""

    def was_refused(self) -> None:
        """Note that the system has no direct reads."""

    def check(self, piece: Piece) -> None:
        """Raise if one of its shards is no longer what it was."""


def take_pieces(wanted: Sequence[tuple[Taker, Piece]]) -> None:
    """Take pieces each its own way: what has to come from the device is asked for before what is there is copied.

    All that is read past the page cache is read in one go. Errors as `SiteRows.take`.
    """
    chosen: dict[Way, list[tuple[Taker, Piece]]] = {way: [] for way in Way}
    for reader, piece in wanted:
        chosen[reader.way(piece)].append((reader, piece))
    will_need_all([part for reader, piece in chosen[Way.ADVISED] for part in reader.advice(piece)])
    for reader, piece in chosen[Way.MAPPED]:
        reader.copy(piece)
    if chosen[Way.DIRECT]:
        _read(chosen[Way.DIRECT])
    for reader, piece in chosen[Way.ADVISED]:
        reader.copy(piece, advised=True)


def _read(wanted: Sequence[tuple[Taker, Piece]]) -> None:
    """Read pieces past the page cache, or where the system refuses that, through it."""
    try:
        with borrowed() as direct:
            taken = direct.read([reader.wanted(piece) for reader, piece in wanted])
    except OSError as error:
        if error.errno not in REFUSALS:
            # A file that was cut short meanwhile is told as that.
            for reader, piece in wanted:
                reader.check(piece)
            raise our_error(error) from error
        for reader, piece in wanted:
            reader.was_refused()
            will_need_all(reader.advice(piece))
            reader.copy(piece, advised=True)
        return
    for (reader, _), size in zip(wanted, taken, strict=True):
        reader.was_read(size)
