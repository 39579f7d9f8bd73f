"""From the stored rows of a site to those that are trained on: another dtype, or normalised, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.site_view import SiteView

__all__ = ["Conversion"]

# Of the wide numbers in which a piece is computed: in the caches, and few enough calls for a batch, since after each
# the interpreter's lock has to be had back.
_PIECE_BYTES = 8 << 20


class Conversion:
    """What is done to the rows of one site: nothing, a cast, or `(x - shift) * scale` and a cast.

    Normalising is computed in float32, from float64 in float64. Immutable; it pickles.

    Args:
        view: the site.
        layers: the layers wanted, in their order; None for all.
        dtype: of the result; None for the storage dtype.
        normalize: as `SiteStatistics.normalizer`; None leaves the values as they are.

    Raises:
        ArgumentError: the statistics of a layer cannot normalise it.
    """

    def __init__(
        self,
        view: SiteView,
        layers: Sequence[int] | None,
        dtype: torch.dtype | None,
        normalize: Literal["scalar", "per_dim"] | None,
    ) -> None:
        self.stored = view.dtype
        self.dtype = view.dtype if dtype is None else dtype
        self.wide = torch.float64 if view.dtype == torch.float64 else torch.float32
        self._shift: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        if normalize is not None:
            chosen = list(view.layers if layers is None else layers)
            slots = [view.layers.index(layer) for layer in chosen]
            shift, scale = (part[slots].to(self.wide) for part in view.statistics.normalizer(normalize))
            good = (shift.isfinite() & scale.isfinite()).all(dim=1)
            if not good.all():
                layer = chosen[int(good.logical_not().nonzero()[0])]
                raise ArgumentError(
                    f"normalize={normalize!r}: the statistics of {view.name}, layer {layer}, give no finite factor "
                    f"(no rows were counted, or all are zeros); leave the layer out with layers="
                )
            self._shift, self._scale = shift if normalize == "per_dim" else None, scale

    @property
    def staged(self) -> bool:
        """Whether the stored rows need a place of their own; otherwise they go where the result will be."""
        return self.stored != self.dtype

    def apply(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` `[k, n_layers, d_model]` from the stored `rows`, which are `out` itself unless `staged`."""
        if self._scale is None:
            if self.staged:
                out.copy_(rows)
            return
        step = max(1, _PIECE_BYTES // max(1, self.wide.itemsize * self._scale.numel()))
        room = None if self.dtype == self.wide else torch.empty((min(step, len(out)), *out.shape[1:]), dtype=self.wide)
        for start in range(0, len(out), step):
            piece, into = rows[start : start + step], out[start : start + step]
            wide = into if room is None else room[: len(into)]
            if self.staged or room is not None:
                wide.copy_(piece)
            self._normalise(wide, self._shift, self._scale)
            if room is not None:
                into.copy_(wide)

    def on_device(self, rows: torch.Tensor) -> torch.Tensor:
        """Give what `apply` gives, of rows on a device and there, in new memory or in the rows' own."""
        if self._scale is None:
            return rows.to(self.dtype)
        wide = rows.to(self.wide)
        shift = None if self._shift is None else self._shift.to(rows.device, non_blocking=True)
        self._normalise(wide, shift, self._scale.to(rows.device, non_blocking=True))
        return wide.to(self.dtype)

    @staticmethod
    def _normalise(wide: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> None:
        if shift is not None:
            wide.sub_(shift)
        wide.mul_(scale)
