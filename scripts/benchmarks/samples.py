"""The stores that are read: made once per run, by mmcache itself, from random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import mmcache
from benchmarks.cold import files_of

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.measure import Plan
    from mmcache.read.store import Store

__all__ = ["CLT_LAYERS", "CLT_WIDTH", "ROW_WIDTH", "clt_store", "data_files", "rows_store"]

# The width of a row of 8 KiB in bfloat16.
ROW_WIDTH = 4096
# The shape of GPT-2 small: 12 layers of 768, MLP in and out.
CLT_LAYERS, CLT_WIDTH = 12, 768
_SHARDS = 32
_PIECE_BYTES = 64 << 20


def data_files(store: Store, site: str) -> list[Path]:
    """The shard files of a site, in the order of its tokens."""
    return sorted((store.path / site).glob("c.*"), key=lambda path: [int(part) for part in path.name.split(".")[1:]])


def _fill(path: Path, sites: dict[str, int], n_layers: int, tokens: int, **options: object) -> None:
    row = n_layers * max(sites.values()) * 2
    step = max(1, min(tokens, _PIECE_BYTES // row))
    piece = {site: torch.randn(n_layers, step, width).bfloat16() for site, width in sites.items()}
    with mmcache.create(path, sites=sites, n_layers=n_layers, **options) as writer:  # type: ignore[arg-type]
        for start in range(0, tokens, step):
            count = min(step, tokens - start)
            writer.append(torch.arange(count), {site: rows[:, :count] for site, rows in piece.items()})


def rows_store(plan: Plan) -> Store:
    """Open the store of `plan.size` bytes in rows of 8 KiB: one layer, one site `x`, 32 shards."""
    path = plan.folder / "rows"
    if "rows" not in plan.kept:
        # A power of two of at least 1 MiB, as every store's geometry requires.
        shard = max(128, 1 << (plan.size // (ROW_WIDTH * 2) // _SHARDS).bit_length() - 1)
        _fill(path, {"x": ROW_WIDTH}, 1, shard * _SHARDS, layout="layer", shard_tokens=shard)
        plan.kept["rows"] = len(files_of(path))
    return mmcache.open(path)


def clt_store(plan: Plan, size: int | None = None) -> Store:
    """Open a store shaped like the data of a CLT on GPT-2 small, of `size` bytes (`plan.size`), in the token layout."""
    size = size or plan.size
    path = plan.folder / f"clt-{size}"
    if path.name not in plan.kept:
        tokens = max(2048, size // (2 * CLT_LAYERS * CLT_WIDTH * 2))
        _fill(path, {"mlp_in": CLT_WIDTH, "mlp_out": CLT_WIDTH}, CLT_LAYERS, tokens, layout="token")
        plan.kept[path.name] = tokens
    return mmcache.open(path)
