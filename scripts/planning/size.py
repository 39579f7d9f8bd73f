"""The size of a store on disk, computed by the library itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmcache.format.dtypes import BY_NAME
from mmcache.format.manifest import NEW_STORES, Manifest, array_json
from mmcache.format.names import RESERVED
from mmcache.format.shard import STATISTICS, Layout, shard_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Size", "measure", "planned"]


@dataclass(frozen=True)
class Size:
    """The size of a complete store, in bytes of whole files.

    `bytes` is everything but the root's record of the source, a few KiB. `shards` counts the sites' files, `names`
    those of the largest folder. `columns` are tokens, flags and sequences. `overhead` is what shards hold besides rows:
    headers, checksums, statistics, padding; `statistics` is the part of it that is merged at the end.
    """

    tokens: int
    sequences: int
    bytes_a_token: int
    record_bytes: int
    bytes: int
    sites: dict[str, int]
    columns: int
    metadata: int
    overhead: int
    statistics: int
    shards: int
    names: int
    blocks: int
    shard_tokens: int
    shard_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def planned(
    widths: Mapping[str, int],
    layers: tuple[int, ...],
    tokens: int,
    sequences: int,
    *,
    dtype: str,
    layout: Literal["layer", "token"],
    shard_tokens: int | None,
) -> Manifest:
    """The manifest that `extract` would write, as far as sizes depend on it.

    Raises:
        ArgumentError: `shard_tokens` does not suit these rows.
    """
    deep = len(layers) if layout == "token" else 1
    rows = [deep * width * BY_NAME[dtype].size for width in widths.values()]
    return Manifest(
        kind="planned",
        store="",
        layout=layout,
        dtype=dtype,
        sites=dict(widths),
        layers=layers,
        n_tokens=tokens,
        n_sequences=sequences,
        uses=NEW_STORES,
    ).with_geometry(shard_rows(rows, shard_tokens, tokens), tokens)


def measure(manifest: Manifest) -> Size:
    """Add up the size of a store."""
    tokens, shard = manifest.n_tokens or 0, manifest.shard_tokens or 1
    sites = {site: manifest.array_bytes(site) for site in manifest.sites}
    columns = sum(manifest.array_bytes(array) for array in RESERVED)
    arrays = (*manifest.sites, *RESERVED)
    metadata = len(manifest.to_json()) + sum(len(array_json(manifest, one, manifest.rows(one))) for one in arrays)
    counts = {site: manifest.n_shards(site) for site in sites}
    merged = shard_bytes = 0
    for site, count in counts.items():
        spec = manifest.spec(site)
        tensors = Layout(spec, min(shard, tokens)).tensors
        merged += count * (tensors[STATISTICS[-1]][3] - tensors[STATISTICS[0]][2])
        shard_bytes = max(shard_bytes, Layout(spec, min(shard, tokens)).size)
    return Size(
        tokens=tokens,
        sequences=manifest.n_sequences,
        bytes_a_token=manifest.token_bytes(),
        record_bytes=manifest.widest_row(),
        bytes=sum(sites.values()) + columns + metadata,
        sites=sites,
        columns=columns,
        metadata=metadata,
        overhead=sum(sites.values()) - tokens * manifest.token_bytes(),
        statistics=merged,
        shards=sum(counts.values()),
        names=max(counts.values()),
        blocks=max(manifest.spec(site).blocks(tokens) for site in sites),
        shard_tokens=shard,
        shard_bytes=shard_bytes,
    )
