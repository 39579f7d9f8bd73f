"""The merged statistics of a complete store, kept in it: `statistics/<site>`, a zarr group of two small arrays.

Merging ten thousand shards reads gigabytes; reading what was merged once reads kilobytes. `dimensions` is
`[3, n_layers, d_model]` (count, mean, std), `layers` `[8, n_layers]`, both float64 with zarr's own crc32c codec; the
group's `zarr.json`, written last, names their rows and says of which tokens they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import crc32c
import numpy as np
import torch
import zarr
import zarr.storage
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from mmcache.errors import CorruptError, StoreNotFoundError
from mmcache.format.names import STATISTICS_FOLDER
from mmcache.format.signed_json import ROOT, attributes, group_json, read_signed, signed
from mmcache.stats.site_statistics import SiteStatistics
from mmcache.system.atomic import publish, publish_all, remove_drafts
from mmcache.system.files import list_names, read_file
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["load_summary", "save_summary"]

_DIMENSIONS = ("count", "mean", "std")
# Each array and the file of its only chunk.
_ARRAYS = {"dimensions": "dimensions/c/0/0/0", "layers": "layers/c/0/0"}
_COUNTS = ("rows", "non_finite", "first_non_finite", "zero_rows", "overflow")
_LAYERS = ("mean_norm", "min_norm", "max_norm", *_COUNTS)
# A stranger's zarr.json is not read further than this.
_LIMIT = 1 << 20


def _of(manifest: Manifest) -> dict[str, object]:
    """Say which rows the statistics are of: others, of a shorter plan say, are not believed."""
    return {
        "store": manifest.store,
        "n_tokens": manifest.n_tokens,
        "dimensions": list(_DIMENSIONS),
        "layers": list(_LAYERS),
    }


def save_summary(path: Path, manifest: Manifest, site: str, found: SiteStatistics) -> None:
    """Keep the merged statistics of a complete site; blocks until they are durable."""
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
    # Where it is, all of them are, and this is not done again.
    remove_drafts(path, folder)
    publish(path, f"{folder}/{ROOT}", group_json(manifest.version, **_of(manifest)))


def load_summary(path: Path, manifest: Manifest, site: str) -> SiteStatistics | None:
    """Read the merged statistics of a site; None where there are none of exactly these tokens.

    Raises:
        CorruptError: they are there, and damaged.
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
