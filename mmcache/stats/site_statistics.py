"""The statistics of a site: read from its shards, merged, and stored in a complete store.

A complete store keeps them in `statistics/<site>`, a zarr group of two small arrays, since merging ten thousand shards
reads gigabytes. `dimensions` is `[3, n_layers, d_model]` (count, mean, std), `layers` `[8, n_layers]`, both float64
with zarr's crc32c codec; the group's `zarr.json`, written last, names their rows, the store and its number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import crc32c
import numpy as np
import torch
import zarr
import zarr.storage
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from mmcache.errors import CorruptError, IncompleteError, StoreNotFoundError
from mmcache.format.names import STATISTICS_FOLDER
from mmcache.format.shard import STATISTICS
from mmcache.format.signed_json import ROOT, attributes, group_json, read_signed, signed
from mmcache.stats.moments import merge_moments, shard_moments
from mmcache.storage.listing import in_order
from mmcache.system.arguments import choice
from mmcache.system.atomic import publish, publish_all, remove_drafts
from mmcache.system.files import list_names, read_file
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.format.shard import Layout
    from mmcache.storage.shard_bytes import ShardBytes
    from mmcache.storage.shard_folder import ShardFolder

__all__ = [
    "SiteStatistics",
    "brief_statistics",
    "load_summary",
    "merge_site",
    "overflow",
    "save_summary",
    "shard_statistics",
]

# The statistics that are not per dimension.
_BRIEF = STATISTICS[3:]


def shard_statistics(folder: ShardFolder, slot: int, block: int) -> tuple[dict[str, np.ndarray], int]:
    """Read the statistics of one shard, their checksum compared: the arrays of `Moments.arrays`.

    They are of all rows in the file, whose number comes with them: after a crash these may be more than count.

    Raises:
        IncompleteError, CorruptError: as `ShardFolder.open_file`; the checksum differs.
    """

    def compared(shard: ShardBytes, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
        data, digest = _read(shard, layout, STATISTICS, folder.where(slot, block))
        if crc32c.crc32c(data) != digest:
            raise CorruptError(
                f"{folder.where(slot, block)}: its statistics do not match their checksum; "
                f"set the file aside and make it again"
            )
        return _arrays(data, layout, STATISTICS), layout.rows

    return folder.reading(slot, block, compared, scattered=True)


def brief_statistics(folder: ShardFolder, slot: int, block: int) -> tuple[dict[str, np.ndarray], int]:
    """Read one shard's norms and counts, a few KiB, as `shard_statistics`, without the statistics per dimension.

    The checksum covers all statistics, so it is not compared: `mmcache verify` does that. Impossible counts raise.

    Raises:
        IncompleteError, CorruptError: as `ShardFolder.open_file`; such counts.
    """

    def plausible(shard: ShardBytes, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
        found = _arrays(_read(shard, layout, _BRIEF, folder.where(slot, block))[0], layout, _BRIEF)
        if not _plausible(found, block, folder.spec.shard_rows, folder.spec.chunk_rows):
            raise CorruptError(f"{folder.where(slot, block)}: its statistics are damaged; `mmcache verify` says more")
        return found, layout.rows

    return folder.reading(slot, block, plausible, scattered=True)


def overflow(folder: ShardFolder, slot: int, block: int) -> np.ndarray:
    """Count, per layer, the values that became infinite in the cast, among the rows that count.

    Where a crash left more rows in the file, there are no more of them than infinities in those that count.
    """
    found, rows = shard_statistics(folder, slot, block)
    spec = folder.spec
    counted = spec.rows_in_block(block, folder.rows)
    lost = found["overflow"]
    if rows > counted:
        values = folder.open(slot, block).view(counted, spec.stat_layers, -1)
        lost = np.minimum(lost, values.isinf().sum(dim=(0, 2)).numpy())
    return lost


def _read(shard: ShardBytes, layout: Layout, names: tuple[str, ...], where: str) -> tuple[bytearray, int]:
    """Read tensors that follow each other, and the checksum of all of them."""
    start, stop = layout.tensors[names[0]][2], layout.tensors[names[-1]][3]
    _, _, first, last = layout.tensors["statistics_crc32c"]
    # Their checksum stands behind them: of an object, one request instead of two.
    found = bytearray(last - start)
    if not shard.read(memoryview(found), start):
        raise CorruptError(f"{where} was cut short while it was read")
    return found[: stop - start], int.from_bytes(found[first - start : last - start], "little")


def _arrays(data: bytearray, layout: Layout, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Consecutive tensors as arrays, views of `data`."""
    begin, found = layout.tensors[names[0]][2], {}
    for name in names:
        code, shape, start, stop = layout.tensors[name]
        found[name] = np.frombuffer(data, f"<{code[0].lower()}8", (stop - start) // 8, start - begin).reshape(shape)
    return found


def _plausible(found: dict[str, np.ndarray], block: int, size: int, chunk_rows: int) -> bool:
    """Whether counts of rows, and the position of the first that is not finite, are possible for a block."""
    rows, first = found["norms"][..., 0], found["first_non_finite"]
    there = (first >= block * size) & (first < (block + 1) * size)
    fine = [((rows >= 0) & (rows <= chunk_rows)).all(), np.where(found["non_finite"], there, first == -1).all()]
    fine += [((found[name] >= 0) & (found[name] <= size)).all() for name in ("non_finite", "zero_rows")]
    return all(fine)


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
        """`shift` and `scale`, `[n_layers, d_model]` each, for `(x - shift) * scale`.

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
    """The merged statistics of every shard that exists; blocks while it reads them, in order.

    Args:
        folder: the site's shards.
        layout: the store's.
        n_layers: how many layers there are.
        keep: returns which tokens from `start` to `stop` count; called only if a shard has more rows than were
            committed, whose statistics are then recomputed.
        blocks: only these; None for all.

    Raises:
        CorruptError: a shard, or its statistics, are damaged.
        IncompleteError: some layer has no shard.
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


_DIMENSIONS = ("count", "mean", "std")
# Each array and the file of its only chunk.
_ARRAYS = {"dimensions": "dimensions/c/0/0/0", "layers": "layers/c/0/0"}
_COUNTS = ("rows", "non_finite", "first_non_finite", "zero_rows", "overflow")
_LAYERS = ("mean_norm", "min_norm", "max_norm", *_COUNTS)
# Most bytes of a `zarr.json` here.
_LIMIT = 1 << 20


def _of(manifest: Manifest) -> dict[str, object]:
    """Attributes that identify the rows; statistics of others (of a shorter plan, for example) are ignored."""
    return {
        "store": manifest.store,
        "n_tokens": manifest.n_tokens,
        "dimensions": list(_DIMENSIONS),
        "layers": list(_LAYERS),
    }


def save_summary(path: Path, manifest: Manifest, site: str, found: SiteStatistics) -> None:
    """Write the merged statistics of a complete site; blocks until they are durable."""
    folder, memory = f"{STATISTICS_FOLDER}/{site}", zarr.storage.MemoryStore()
    contents = {f"{STATISTICS_FOLDER}/{ROOT}": group_json(manifest.version)}
    for name, rows in (("dimensions", _DIMENSIONS), ("layers", _LAYERS)):
        data = np.stack([getattr(found, row).double().numpy() for row in rows])
        zarr.create_array(
            memory,
            name=name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=data.shape,
            compressors=[Crc32cCodec()],
            fill_value=float("nan"),
            attributes=attributes(manifest.version),
        )
        contents[f"{folder}/{name}/{ROOT}"] = signed(memory, f"{name}/{ROOT}")
        chunk = data.astype("<f8").tobytes()
        contents[f"{folder}/{_ARRAYS[name]}"] = chunk + crc32c.crc32c(chunk).to_bytes(4, "little")
    for parent in dict.fromkeys(name.rpartition("/")[0] for name in contents):
        remove_drafts(path, parent)
    publish_all(path, contents)
    # Written last: if it exists, all files do.
    remove_drafts(path, folder)
    publish(path, f"{folder}/{ROOT}", group_json(manifest.version, **_of(manifest)))


def load_summary(path: Path, manifest: Manifest, site: str) -> SiteStatistics | None:
    """The merged statistics of a site; None if there are none of exactly these tokens.

    Raises:
        CorruptError: they are damaged.
    """
    folder = path / STATISTICS_FOLDER / site
    for part in ("", *(file.rpartition("/")[0] for file in _ARRAYS.values())):
        check_path(path, f"{STATISTICS_FOLDER}/{site}/{part}".rstrip("/"))
    if ROOT not in list_names(folder):
        return None
    try:
        said, text = read_signed(folder / ROOT, _LIMIT)
        if said | _of(manifest) != said:
            return None
        deep, width = len(manifest.layers), manifest.sites[site] or 0
        shapes = {"dimensions": (len(_DIMENSIONS), deep, width), "layers": (len(_LAYERS), deep)}
        files = {ROOT: text}
        for name, chunk in _ARRAYS.items():
            files[f"{name}/{ROOT}"] = read_signed(folder / name / ROOT, _LIMIT)[1]
            files[chunk] = read_file(folder / chunk, math.prod(shapes[name]) * 8 + 4)
        buffer = default_buffer_prototype().buffer
        memory = zarr.storage.MemoryStore({key: buffer.from_bytes(content) for key, content in files.items()})
        arrays = {name: zarr.open_array(memory, path=name, mode="r") for name in _ARRAYS}
        if any(array.shape != shapes[name] or array.chunks != shapes[name] for name, array in arrays.items()):
            raise CorruptError(f"its arrays are {[array.shape for array in arrays.values()]}, not {shapes}")
        dimensions, layers = (np.asarray(array[:]) for array in arrays.values())
    except (ValueError, TypeError, KeyError, StoreNotFoundError) as error:
        raise CorruptError(f"{folder} is damaged ({error}): remove the folder, it is made again") from error
    named = {name: torch.from_numpy(dimensions[row].astype(float)) for row, name in enumerate(_DIMENSIONS)}
    for row, name in enumerate(_LAYERS):
        named[name] = torch.from_numpy(layers[row].astype(np.int64 if name in _COUNTS else float))
    return SiteStatistics(**named)
