"""The statistics of a whole site, merged from those that each shard carries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from mmcache.errors import IncompleteError
from mmcache.stats.moments import merge_moments, shard_moments
from mmcache.stats.shard_statistics import overflow, shard_statistics
from mmcache.storage.listing import in_order
from mmcache.system.arguments import choice

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["SiteStatistics", "merge_site"]


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of the stored values of one site, in float64; all tensors are the caller's own.

    Rows that are not finite, and BOS, special and first tokens (these in a store that flags them), are left out of
    `count`, `mean`, `std` and the norms.
    `std` is that of the population (divided by the count). The norms are Euclidean norms of rows.

    Attributes:
        count, mean, std: `[n_layers, d_model]`.
        mean_norm, min_norm, max_norm: `[n_layers]`.
        rows, non_finite, zero_rows: `[n_layers]` int64: rows counted, rows with a value that is not finite, rows of
            zeros only (the last two among all tokens).
        first_non_finite: `[n_layers]` int64: the position of the first such row, or -1.
        overflow: `[n_layers]` int64: values that became infinite in the cast to the storage dtype.
    """

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    mean_norm: torch.Tensor
    min_norm: torch.Tensor
    max_norm: torch.Tensor
    rows: torch.Tensor
    non_finite: torch.Tensor
    first_non_finite: torch.Tensor
    zero_rows: torch.Tensor
    overflow: torch.Tensor

    def normalizer(self, kind: Literal["scalar", "per_dim"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give `shift` and `scale`, `[n_layers, d_model]` each, for `(x - shift) * scale`.

        Args:
            kind: the two conventions of the field. `"scalar"`: one factor a layer, `sqrt(d_model) / mean norm`, so
                that rows have the norm sqrt(d_model) on average (Anthropic, "Circuits Updates - April 2024").
                `"per_dim"`: each dimension less its mean, over its standard deviation; a constant dimension
                becomes 0.

        Raises:
            ArgumentError: another kind.
        """
        choice("scalar", "per_dim")("normalize", kind)
        if kind == "scalar":
            scale = math.sqrt(self.mean.shape[-1]) / self.mean_norm
            return torch.zeros_like(self.mean), scale[:, None].expand_as(self.mean).clone()
        constant = self.std == 0
        return self.mean.clone(), torch.where(constant, 0.0, 1.0 / self.std.masked_fill(constant, 1.0))


class _Merged:
    """Statistics of one slot of shards (a layer, or all layers of the token layout) as blocks are added."""

    def __init__(self) -> None:
        self.moments: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.norms: np.ndarray | None = None
        self.counts: dict[str, np.ndarray] = {}

    def add(self, found: dict[str, np.ndarray]) -> None:
        moments = (found["count"], found["mean"], found["m2"])
        self.moments = moments if self.moments is None else merge_moments(self.moments, moments)
        norms = found["norms"]
        norms = np.concatenate(
            [norms[..., :3].sum(axis=0), np.fmin.reduce(norms[..., 3:4]), np.fmax.reduce(norms[..., 4:5])], axis=-1
        )
        if self.norms is not None:
            sums = self.norms[:, :3] + norms[:, :3]
            least, most = np.fmin(self.norms[:, 3], norms[:, 3]), np.fmax(self.norms[:, 4], norms[:, 4])
            norms = np.concatenate([sums, least[:, None], most[:, None]], axis=-1)
        self.norms = norms
        for name in ("non_finite", "zero_rows", "overflow"):
            self.counts[name] = self.counts.get(name, 0) + found[name]
        first, here = self.counts.get("first_non_finite"), found["first_non_finite"]
        self.counts["first_non_finite"] = here if first is None else np.where(first < 0, here, first)


def merge_site(
    folder: ShardFolder,
    layout: str,
    n_layers: int,
    keep: Callable[[int, int], np.ndarray],
    blocks: Collection[int] | None = None,
) -> SiteStatistics:
    """Read the statistics of every shard that is there and merge them, in order; blocks while it reads them.

    Args:
        folder: the site's shards.
        layout: the store's.
        n_layers: how many layers there are.
        keep: tells which tokens from `start` to `stop` count; asked only where a shard has more rows than the store
            counts, whose statistics are then computed anew.
        blocks: only of these; None for all.

    Raises:
        CorruptError: a shard, or its statistics, are damaged.
        IncompleteError: no shard is there at all.
    """
    slots = [_Merged() for _ in range(n_layers if layout == "layer" else 1)]
    for slot, block in in_order(folder.present()):
        if blocks is not None and block not in blocks:
            continue
        found, rows = shard_statistics(folder, slot, block)
        start, counted = block * folder.spec.shard_rows, folder.spec.rows_in_block(block, folder.rows)
        if rows > counted:
            found = _anew(folder, slot, block, keep(start, start + counted))
        slots[slot].add(found)
    there = [merged for merged in slots if merged.moments is not None]
    if len(there) < len(slots):
        raise IncompleteError("there are no statistics yet: no shard of some layer has been written")
    count, mean, m2 = (np.concatenate([one.moments[part] for one in there if one.moments]) for part in range(3))
    norms = np.concatenate([one.norms for one in there if one.norms is not None])
    counts = {name: np.concatenate([one.counts[name] for one in there]) for name in there[0].counts}
    with np.errstate(invalid="ignore"):
        arrays = {
            "count": count,
            "mean": mean,
            "std": np.sqrt(m2 / count),
            "mean_norm": norms[:, 1] / norms[:, 0],
            "min_norm": norms[:, 3],
            "max_norm": norms[:, 4],
            "rows": norms[:, 0].astype(np.int64),
            **counts,
        }
    return SiteStatistics(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _anew(folder: ShardFolder, slot: int, block: int, keep: np.ndarray) -> dict[str, np.ndarray]:
    spec = folder.spec
    moments = shard_moments(spec, block * spec.shard_rows)
    rows = folder.checked(slot, block)
    flat = rows.contiguous().view(torch.uint8).numpy().reshape(-1).view(spec.dtype.numpy)
    moments.add(flat.reshape(len(rows), spec.stat_layers, spec.row_shape[-1]), keep)
    moments.add_overflow(overflow(folder, slot, block))
    return moments.arrays(block * spec.shard_rows)
