"""What several batches want of several sites, gathered in one go: beside a busy thread each call of its own costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mmcache.read.local_rows import SiteRows, take_pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from mmcache.read.local_rows import Piece, Taker
    from mmcache.read.site_view import SiteView

__all__ = ["Gather", "gather_together"]


class Gather(NamedTuple):
    """A `view.gather(positions, layers=layers, out=out)`, of positions int64 `[k]` from 0 on into host memory."""

    view: SiteView
    positions: np.ndarray
    layers: Sequence[int] | None
    out: torch.Tensor


def gather_together(wanted: Sequence[Gather]) -> None:
    """Gather them all, equal to one after the other; blocks until all rows are there.

    Errors as `SiteView.gather`; what any `out` holds then is undefined.
    """
    fast: list[tuple[Taker, Piece]] = []
    for view, positions, layers, out in wanted:
        reader, slots = view.rows_of(layers)
        if isinstance(reader, SiteRows):
            fast += [(reader, piece) for piece in reader.pieces(positions, slots, out)]
        else:
            reader.take(positions, slots, out)
    take_pieces(fast)
