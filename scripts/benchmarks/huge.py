"""Stores of a terabyte that take no room: real headers and statistics, and holes instead of rows."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmcache.format.manifest import Manifest, array_json
from mmcache.format.names import RESERVED
from mmcache.format.shard import NORM_COLUMNS, Layout
from mmcache.write.token_columns import Column, publish_columns

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["huge_store"]

_SEQUENCE = 1024


def huge_store(
    path: Path,
    shards: int = 10_000,
    *,
    layers: int = 12,
    d_model: int = 1024,
    shard_tokens: int = 4096,
    layout: Literal["layer", "token"] = "token",
    tokens: bool = True,
) -> Path:
    """Make a store of one site, `x`, with `shards` shards: by default 1.0 TB of 41 million tokens.

    The statistics of each shard are plausible; dimension 7 is an outlier in layer 1, dimension 5 never changes in layer
    0, and block 3 has a NaN in its first layer.
    """
    blocks = shards if layout == "token" else shards // layers
    total = blocks * shard_tokens
    manifest = Manifest(
        kind="grown", store="huge", layout=layout, dtype="bfloat16", sites={"x": d_model}, layers=tuple(range(layers)),
        n_tokens=total, n_sequences=-(-total // _SEQUENCE) if tokens else 1, has_tokens=tokens,
    ).with_geometry(shard_tokens, None)  # fmt: skip
    folder = path / "x"
    folder.mkdir(parents=True)
    for slot in manifest.slots("x"):
        for block in range(blocks):
            _shard(folder, manifest, slot, block)
    if tokens:
        _columns(path, manifest)
    for array in ("x", *(RESERVED if tokens else ())):
        (path / array / "zarr.json").write_bytes(array_json(manifest, array, manifest.rows(array)))
    (path / "zarr.json").write_bytes(manifest.to_json())
    return path


def _shard(folder: Path, manifest: Manifest, slot: int, block: int) -> None:
    spec = manifest.spec("x")
    layout = Layout(spec, spec.shard_rows)
    with (folder / manifest.shard_key("x", block, slot)).open("wb") as file:
        file.write(layout.header(manifest.shard_metadata("x", block, slot)))
        file.truncate(layout.size)
        file.seek(layout.data_end)
        # The rows are holes, so their checksums are left 0, not computed.
        file.write(layout.tail([0] * layout.chunks, statistics_of(layout, slot, block)))


def statistics_of(layout: Layout, slot: int, block: int) -> dict[str, np.ndarray]:
    """Invent the statistics of one shard."""
    spec = layout.spec
    dice = np.random.default_rng(zlib.crc32(f"{slot} {block}".encode()))
    deep, width = spec.stat_layers, spec.row_shape[-1]
    layers = slot + np.arange(deep)
    rows, chunks = spec.shard_rows, layout.chunks
    std = np.ones((deep, width)) * (1 + layers[:, None])
    mean = dice.normal(0, 0.01, (deep, width))
    mean[layers == 1, 7], std[layers == 0, 5], mean[layers == 0, 5] = 300.0, 0.0, 0.25
    size = np.sqrt(width) * (1 + layers) * (1 + 0.3 * np.sin(block / 400))
    norms = np.empty((chunks, deep, len(NORM_COLUMNS)))
    norms[..., 0] = rows / chunks
    each = size * dice.normal(1, 0.02, (chunks, deep))
    norms[..., 1], norms[..., 2] = each * norms[..., 0], np.square(each) * norms[..., 0]
    norms[..., 3], norms[..., 4] = each * 0.8, each * 1.3
    none = np.zeros(deep, np.int64)
    bad = ((layers == 0) & (block == 3)).astype(np.int64)
    return {
        "count": np.full((deep, width), float(rows)), "mean": mean, "m2": np.square(std) * rows, "norms": norms,
        "non_finite": bad, "first_non_finite": np.where(bad, block * rows + 17, -1), "zero_rows": none,
        "overflow": none,
    }  # fmt: skip


def _columns(path: Path, manifest: Manifest) -> None:
    total = manifest.n_tokens or 0
    starts = np.arange(0, total, _SEQUENCE)
    spans = np.stack([starts, np.minimum(starts + _SEQUENCE, total), np.arange(len(starts))], axis=1)
    ids = np.random.default_rng(0).integers(0, 50_000, total).astype(np.int32)
    flags = np.zeros(total, np.uint8)
    ids[starts], flags[starts] = 0, 3
    for array, rows in (("tokens", ids), ("flags", flags), ("sequences", spans)):
        (path / array).mkdir()
        column = Column(path, manifest, array, 0)
        column.extend(rows)
        publish_columns(path, [column])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layout", choices=["layer", "token"], default="token")
    parser.add_argument("--shards", type=int, default=10_000)
    given = parser.parse_args()
    huge_store(given.path, given.shards, layout=given.layout)
