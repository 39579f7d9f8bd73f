"""The metadata of a store: `Manifest` (the attributes of the root's `zarr.json`), and the `zarr.json` of each array.

zarr-python makes the metadata in memory, and `system/atomic.py` writes it. Every `zarr.json` carries a digest of its
own bytes (see `format/signed_json.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import zarr
import zarr.storage
from zarr.codecs import TransposeCodec

from mmcache.errors import ArgumentError, CorruptError, StoreNotFoundError, VersionError
from mmcache.format.dtypes import ACTIVATION_DTYPES, BY_NAME
from mmcache.format.names import RESERVED, site_name_problem
from mmcache.format.shard import Layout, ShardSpec, inner_rows
from mmcache.format.signed_json import ROOT, attributes, group_json, read_signed, signed
from mmcache.format.token_flags import known_flags
from mmcache.system.arguments import shown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ARRAY_LIMIT",
    "FIRST_TOKENS",
    "IMPLEMENTED",
    "METADATA_LIMIT",
    "NEW_STORES",
    "ROOT",
    "ROOT_LIMIT",
    "Manifest",
    "array_json",
    "check_user_metadata",
    "checked_uses",
    "is_store",
    "read_array",
    "read_manifest",
]

FIRST_TOKENS = "first"
# Other names that the format reserves are refused like unknown ones.
IMPLEMENTED = (FIRST_TOKENS,)
# Features of a new store with tokens. A cache has no tokens, so it uses none and has version 1.
NEW_STORES = (FIRST_TOKENS,)


def checked_uses(said: dict[str, Any], where: Path | str) -> tuple[str, ...]:
    """The names in a root's `uses`: features of format version 2 that the store uses; none in version 1.

    Raises:
        VersionError: this library does not know one of them.
        CorruptError: they are no sorted list of distinct names, or do not fit the version.
    """
    uses = said.get("uses")
    if said.get("format") == 1:
        if "uses" in said:
            raise CorruptError(f"{where} does not describe a store: version 1 has no field `uses`")
        return ()
    if not isinstance(uses, list) or not uses or not all(isinstance(name, str) for name in uses):
        raise CorruptError(f"{where} does not describe a store: `uses` is {uses!r}, not one name or more")
    unknown = [name for name in uses if name not in IMPLEMENTED]
    if unknown:
        raise VersionError(
            f"{where} uses {unknown[0]!r} of format version 2, which this library does not know (it knows "
            f"{', '.join(IMPLEMENTED)}): open it with the mmcache that made it, or upgrade"
        )
    if uses != sorted(set(uses)):
        raise CorruptError(f"{where} does not describe a store: `uses` is {uses}, not each once and sorted")
    return tuple(uses)


# Rows per shard of `tokens`, `flags` and `sequences`: a grown store rewrites the last shard at every commit, but a
# billion tokens should be few files.
_RESERVED_SHARD_ROWS = 1 << 20
# Most bytes of the root's zarr.json, of an array's, and of any other file beside the shards (tokenizers are largest).
ROOT_LIMIT, ARRAY_LIMIT, METADATA_LIMIT = 16 << 20, 1 << 20, 256 << 20
# The fields of an array's metadata that do not depend on its number of rows.
_FIXED = (
    "zarr_format", "node_type", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    "dimension_names",
)  # fmt: skip
# Most inner chunks in a shard's index, which is read into memory.
_MOST_CHUNKS = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """The root's attributes: what the store holds, and how much of it is committed.

    `sites` maps each site to its `d_model` (None until the first rows of a cache are pushed), `inner_tokens` to the
    tokens in its inner chunk. `n_tokens`, `n_sequences` and `layers` are the commit point of a grown store; a planned
    store has its final numbers from the start (`n_tokens` is None while it is being planned). Without `has_tokens`
    there are no `tokens`, `flags` and `sequences`: a cache is one sequence of unknown tokens. `uses` names the features
    of format version 2 that the store uses; a store that uses none has version 1.
    """

    kind: Literal["planned", "grown"]
    store: str
    layout: Literal["layer", "token"]
    dtype: str | None
    sites: dict[str, int | None]
    layers: tuple[int, ...]
    shard_tokens: int | None = None
    inner_tokens: dict[str, int] = field(default_factory=dict)
    n_tokens: int | None = None
    n_sequences: int = 0
    has_tokens: bool = True
    special_tokens: tuple[int, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """The format version of the store."""
        return 2 if self.uses else 1

    @property
    def flags_first(self) -> bool:
        """Whether the first token of each sequence is flagged."""
        return FIRST_TOKENS in self.uses

    @property
    def flag_bits(self) -> dict[str, int]:
        """Name and bit of each flag that the library sets in this store."""
        return known_flags(first=self.flags_first)

    @property
    def left_out(self) -> int:
        """The bits (OR) of the flags that leave a token out of the statistics."""
        return sum(self.flag_bits.values())

    def row_shape(self, site: str) -> tuple[int, ...]:
        """The shape of one row of a shard of `site`."""
        width = self.sites[site]
        if width is None:
            raise AssertionError(f"the width of {site} is not known yet")
        return (width,) if self.layout == "layer" else (len(self.layers), width)

    def spec(self, array: str) -> ShardSpec:
        """The `ShardSpec` of a site, or of `tokens`, `flags` or `sequences`."""
        if array in RESERVED:
            name, row_shape, _ = RESERVED[array]
            # Chunks of 64 KiB: a store of ten tokens stays small, and reading all of them is not slower.
            chunk = inner_rows(_RESERVED_SHARD_ROWS, BY_NAME[name].size * max(1, *row_shape, 1), 1)
            return ShardSpec(array, BY_NAME[name], row_shape, _RESERVED_SHARD_ROWS, chunk)
        if self.dtype is None or self.shard_tokens is None:
            raise AssertionError(f"the geometry of {array} is not known yet")
        row_shape = self.row_shape(array)
        stat_layers = 1 if self.layout == "layer" else row_shape[0]
        return ShardSpec(
            "activations",
            BY_NAME[self.dtype],
            row_shape,
            self.shard_tokens,
            self.inner_tokens[array],
            stat_layers,
        )

    def shard_key(self, array: str, block: int, slot: int = 0) -> str:
        """The file name of a shard; `slot` is the index of its layer in `layers` (layer layout only)."""
        if array == "sequences":
            return f"c.{block}.0"
        if array in RESERVED:
            return f"c.{block}"
        return f"c.{slot}.{block}.0"

    def slots(self, array: str) -> range:
        """The slots of an array: a site has one per layer in the layer layout, otherwise one in all."""
        return range(len(self.layers) if self.layout == "layer" and array not in RESERVED else 1)

    def n_shards(self, site: str) -> int:
        """The number of shards that a site has when it is complete; 0 before its geometry is known."""
        if not self.n_tokens or self.shard_tokens is None:
            return 0
        return self.spec(site).blocks(self.n_tokens) * len(self.slots(site))

    def rows(self, array: str) -> int:
        """The number of committed rows of an array: sequences, or tokens."""
        return self.n_sequences if array == "sequences" else self.n_tokens or 0

    def array_bytes(self, array: str) -> int:
        """Bytes of all shards of a complete array; 0 before its geometry is known."""
        rows = self.rows(array)
        if not rows or (array in self.sites and self.shard_tokens is None):
            return 0
        spec, slots = self.spec(array), len(self.slots(array))
        whole = spec.blocks(rows) - 1
        last = Layout(spec, spec.rows_in_block(whole, rows)).size
        return (whole * Layout(spec, spec.shard_rows).size + last) * slots

    def token_bytes(self) -> int:
        """Bytes of one token's rows in all sites and layers."""
        return sum(self.spec(site).row_bytes * len(self.slots(site)) for site in self.sites)

    def widest_row(self) -> int:
        """Bytes of the widest row of any site."""
        return max(self.spec(site).row_bytes for site in self.sites)

    def shard_metadata(self, array: str, block: int, slot: int = 0, ids: str | None = None) -> dict[str, str]:
        """The `__metadata__` of a shard's header, by which a moved or foreign shard is detected.

        `ids` is the digest of its rows' token ids, None where headers have none.
        """
        said = {
            "format": f"mmcache/{self.version}",
            "store": self.store,
            "array": array,
            "key": self.shard_key(array, block, slot),
        }
        if array in RESERVED:
            return said
        layers = self.layers if self.layout == "token" else (self.layers[slot],)
        first = block * (self.shard_tokens or 0)
        if "tokens" in self.source:
            # Ties the activations to their corpus.
            said["tokens"] = str(self.source["tokens"])[:32]
        said |= {"layout": self.layout, "layers": ",".join(map(str, layers)), "first_token": str(first)}
        return said if ids is None else said | {"ids": ids}

    def to_json(self) -> bytes:
        """The root's `zarr.json`."""
        said = asdict(self)
        if self.version == 1:
            del said["uses"]
        return group_json(self.version, **said)

    @classmethod
    def from_attributes(cls, said: dict[str, Any], where: Path | str) -> Self:
        """The manifest with these attributes, every field checked.

        Raises:
            CorruptError: a field is missing, of the wrong type or out of range.
            VersionError: the store uses a feature that this library does not know.
        """
        uses = checked_uses(said, where)
        fields = {name: value for name, value in said.items() if name not in ("format", "digest")}
        try:
            fields["layers"] = tuple(fields["layers"])
            fields["special_tokens"] = tuple(fields.get("special_tokens", ()))
            manifest = cls(**fields | {"uses": uses})
            problem = manifest._problem()
        except (TypeError, KeyError, AttributeError) as error:
            problem = repr(error)
        if problem:
            raise CorruptError(f"{where} does not describe a store: {problem}")
        return manifest

    def _problem(self) -> str | None:
        """What is wrong with the fields; None if nothing is."""
        geometry = [*self.sites.values(), self.shard_tokens]
        numbers = [*geometry, self.n_tokens, *self.inner_tokens.values()]
        checks = {
            "kind": self.kind in ("planned", "grown"),
            "store": isinstance(self.store, str) and len(self.store) <= 64,
            "layout": self.layout in ("layer", "token"),
            "dtype": self.dtype is None or self.dtype in ACTIVATION_DTYPES,
            "sites": bool(self.sites) and all(site_name_problem(name, self.version) is None for name in self.sites),
            "numbers": all(n is None or (type(n) is int and 0 <= n < 2**48) for n in numbers),
            "d_model": all(n is None or n > 0 for n in geometry),
            "n_sequences": type(self.n_sequences) is int and 0 <= self.n_sequences < 2**48,
            "layers": _are_layers(self.layers),
            "special_tokens": all(type(token) is int for token in self.special_tokens),
            "has_tokens": type(self.has_tokens) is bool,
            "metadata": isinstance(self.metadata, dict) and isinstance(self.source, dict),
        }
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            return f"bad {', '.join(wrong)}"
        if self.shard_tokens is None:
            return "rows without a geometry" if self.n_tokens else None
        if None in self.sites.values() or self.dtype is None or not self.layers:
            return "a geometry without widths, layers or dtype"
        for site in self.sites:
            inner = self.inner_tokens.get(site)
            if not inner or self.shard_tokens % inner or self.shard_tokens // inner > _MOST_CHUNKS:
                return (
                    f"inner_tokens of {site} is {inner}, no divisor of shard_tokens {self.shard_tokens} (or too small)"
                )
        return None

    def with_geometry(self, shard_tokens: int, known: int | None) -> Manifest:
        """The manifest with `shard_tokens` and the inner chunks set; `known`: number of tokens to come, or None."""
        known_first = replace(self, shard_tokens=shard_tokens)
        inner = {}
        for site in self.sites:
            size = BY_NAME[self.dtype or ""].size
            row_bytes = size
            for extent in known_first.row_shape(site):
                row_bytes *= extent
            inner[site] = inner_rows(shard_tokens, row_bytes, known)
        return replace(known_first, inner_tokens=inner)


def _are_layers(layers: tuple[int, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 2**31 for n in layers) and list(layers) == sorted(set(layers))


def array_json(manifest: Manifest, array: str, rows: int) -> bytes:
    """The bytes of an array's `zarr.json`, made by zarr-python, for `rows` tokens (or sequences)."""
    spec = manifest.spec(array)
    shape: tuple[int, ...]
    fill: float
    names: tuple[str, ...]
    if array in RESERVED:
        tail, fill = spec.row_shape, RESERVED[array][2]
        shape, shards, chunks = (rows, *tail), (spec.shard_rows, *tail), (spec.chunk_rows, *tail)
        names = ("sequence", "start_stop_document") if array == "sequences" else ("token",)
        said = attributes(manifest.version)
    else:
        layers, width = len(manifest.layers), spec.row_shape[-1]
        deep = layers if manifest.layout == "token" else 1
        shape, fill = (layers, rows, width), float("nan")
        shards, chunks = (deep, spec.shard_rows, width), (deep, spec.chunk_rows, width)
        names = ("layer", "token", "d_model")
        said = attributes(manifest.version, layers=list(manifest.layers))
    transpose = manifest.layout == "token" and array not in RESERVED
    memory = zarr.storage.MemoryStore()
    zarr.create_array(
        memory,
        shape=shape,
        shards=shards,
        chunks=chunks,
        dtype=spec.dtype.numpy,
        fill_value=fill,
        filters=[TransposeCodec(order=(1, 0, 2))] if transpose else None,
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=names,
        attributes=said,
        zarr_format=3,
    )
    return signed(memory)


def is_store(path: Path) -> bool:
    """Whether there is a zarr node at `path`: a store, or something else that must not be written into."""
    return (path / ROOT).exists()


def read_array(path: Path, manifest: Manifest, array: str) -> bytes:
    """The bytes of an array's `zarr.json`, compared with the root; its shape may be ahead of a grown store's commit.

    Raises:
        StoreNotFoundError: there is no such file.
        CorruptError: it is damaged, or contradicts the root.
    """
    where = path / array / ROOT
    said, text = read_signed(where, ARRAY_LIMIT)
    found, wanted = json.loads(text), json.loads(array_json(manifest, array, manifest.rows(array)))
    wrong = [name for name in _FIXED if json.dumps(found.get(name)) != json.dumps(wanted[name])]
    shapes = [found.get("shape"), wanted["shape"]]
    alike = all(isinstance(shape, list) and len(shape) == len(wanted["shape"]) for shape in shapes)
    if not alike or not all(type(a) is int and a >= b for a, b in zip(*shapes, strict=True)):
        wrong.append("shape")
    if said["format"] != manifest.version:
        wrong.append("format version")
    if wrong:
        raise CorruptError(
            f"{where}: {', '.join(wrong)} differ from what the store's root says; `mmcache repair` writes it anew"
        )
    return text


def read_manifest(path: Path) -> Manifest:
    """Read and check a store's root `zarr.json`.

    Raises:
        StoreNotFoundError: there is none.
        VersionError: it has a format version that this library does not read.
        CorruptError: it is damaged, was changed by another program, or describes no store.
    """
    where = path / ROOT
    try:
        said, _ = read_signed(where, ROOT_LIMIT)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(
            error.errno, "no mmcache store there (a store is a folder with a zarr.json)", str(path)
        ) from error
    return Manifest.from_attributes(said, where)


# Most bytes of user metadata: half of ROOT_LIMIT.
_LIMIT = 8 << 20


def check_user_metadata(name: str, metadata: Any) -> dict[str, Any]:
    """A copy of the user's metadata, checked to survive a round trip through JSON; `{}` for None.

    Args:
        name: the argument's name.
        metadata: its value.

    Raises:
        ArgumentError: it changes in the round trip, or is larger than 8 MiB.
    """
    kept = {} if metadata is None else metadata
    try:
        text = json.dumps(kept, allow_nan=False, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{name} cannot be kept as JSON ({error}): use text, numbers, lists, dicts") from error
    copy = json.loads(text)
    if not isinstance(copy, dict) or copy != kept:
        raise ArgumentError(
            f"{name} changes when kept as JSON: expected a dict with text keys, found {shown(metadata)}"
        )
    size = len(text) + 6 * text.count("\n")  # as it will be indented in the root
    if size > _LIMIT:
        raise ArgumentError(
            f"{name} takes {size} bytes as JSON, and the root's zarr.json has room for {_LIMIT}: keep "
            f"it in a file of its own"
        )
    return copy
