"""The shard on paper: a file that is at once a Zarr v3 shard and a safetensors file. No I/O here.

FORMAT.md beside this file is the specification. `ShardSpec` says what the shards of an array have in common,
`Layout` where every byte of one shard goes, and `encode` is the whole of it in one simple function, which the
streaming writer is tested equal to.

Sources: the Zarr v3 `sharding_indexed` codec (https://zarr-specs.readthedocs.io, codecs/sharding-indexed) and
the safetensors format (https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.errors import CorruptError
from mmcache.system.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmcache.format.dtypes import Dtype

__all__ = [
    "FORMAT_VERSIONS",
    "HEADER_BYTES",
    "NORM_COLUMNS",
    "STATISTICS",
    "Layout",
    "ShardSpec",
    "encode",
    "ids_digest",
    "parse_header",
    "said_ids",
]

FORMAT_VERSIONS = (1, 2)
HEADER_BYTES = PAGE
STATISTICS = (
    "count",
    "mean",
    "m2",
    "norms",
    "non_finite",
    "first_non_finite",
    "zero_rows",
    "overflow",
)
NORM_COLUMNS = ("rows", "sum", "sum_of_squares", "min", "max")
_JSON_BYTES = HEADER_BYTES - 8
_ABSENT = 2**64 - 1
# No site's name looks like it: quotes in one stand behind a backslash.
_IDS = re.compile(rb'"ids":"([0-9a-f]{32})"')


@dataclass(frozen=True)
class ShardSpec:
    """What the shards of one array have in common.

    `tensor` names the data tensor, `row_shape` is the shape of one row, `stat_layers` how many layers a shard
    carries statistics for (0: none), each over the last axis of `row_shape`.
    """

    tensor: str
    dtype: Dtype
    row_shape: tuple[int, ...]
    shard_rows: int
    chunk_rows: int
    stat_layers: int = 0

    @cached_property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return math.prod(self.row_shape) * self.dtype.size

    @property
    def chunk_bytes(self) -> int:
        """Bytes an inner chunk, which is always stored full-size."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks that the index lists, present or not."""
        return self.shard_rows // self.chunk_rows

    def rows_in_block(self, block: int, total: int) -> int:
        """Give the rows that block number `block` holds of an array of `total` rows."""
        return max(0, min(self.shard_rows, total - block * self.shard_rows))

    def blocks(self, total: int) -> int:
        """Give the number of blocks (shards along the rows) of an array of `total` rows."""
        return -(-total // self.shard_rows)


@dataclass(frozen=True)
class Layout:
    """Where every byte of a shard with `rows` valid rows goes. Offsets are from the start of the file."""

    spec: ShardSpec
    rows: int

    @property
    def chunks(self) -> int:
        """Inner chunks that are present."""
        return -(-self.rows // self.spec.chunk_rows)

    @property
    def data_end(self) -> int:
        """Give the offset behind the last valid row."""
        return HEADER_BYTES + self.rows * self.spec.row_bytes

    @property
    def chunks_end(self) -> int:
        """Give the offset behind the last inner chunk, which is stored full-size."""
        return HEADER_BYTES + self.chunks * self.spec.chunk_bytes

    def _statistics(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        layers, width = self.spec.stat_layers, self.spec.row_shape[-1]
        shapes: list[tuple[str, tuple[int, ...]]] = [
            *[("F64", (layers, width))] * 3,
            ("F64", (self.chunks, layers, len(NORM_COLUMNS))),
            *[("I64", (layers,))] * 4,
        ]
        named = zip(STATISTICS, shapes, strict=True)
        return [
            *((name, code, shape, math.prod(shape) * 8) for name, (code, shape) in named),
            ("statistics_crc32c", "U32", (1,), 4),
        ]

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Every safetensors tensor: name to (dtype code, shape, start, stop), gapless from 4096 to the end."""
        spec = self.spec
        padding = -(-self.chunks_end // PAGE) * PAGE - self.data_end
        index = spec.chunks_per_shard * 16 + 4
        parts = [
            (spec.tensor, spec.dtype.safetensors, (self.rows, *spec.row_shape), self.rows * spec.row_bytes),
            ("padding", "U8", (padding,), padding),
            ("crc32c", "U32", (self.chunks,), self.chunks * 4),
            *(self._statistics() if spec.stat_layers else []),
        ]
        used = HEADER_BYTES + sum(part[3] for part in parts) + index
        fill = -used % PAGE
        parts += [("fill", "U8", (fill,), fill), ("index", "U8", (index,), index)]
        found, start = {}, HEADER_BYTES
        for name, code, shape, size in parts:
            if size:
                found[name] = (code, shape, start, start + size)
            start += size
        return found

    @property
    def size(self) -> int:
        """Give the size of the file in bytes, a multiple of 4096."""
        return self.tensors["index"][3]

    @cached_property
    def _tensors_json(self) -> str:
        """Write the header's entries of the tensors, the brace behind them included: alike in all full shards."""
        entries = {
            name: {"dtype": code, "shape": list(shape), "data_offsets": [start - HEADER_BYTES, stop - HEADER_BYTES]}
            for name, (code, shape, start, stop) in self.tensors.items()
        }
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=True)[1:]

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Write the first 4096 bytes: the safetensors header, always of the same length.

        Raises:
            CorruptError: the JSON outgrows its place, which would move the data off its page.
        """
        said = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=True)
        text = f'{{"__metadata__":{said},{self._tensors_json}'.encode()
        if len(text) > _JSON_BYTES:
            raise CorruptError(
                f"the header of a shard of {metadata.get('array')!r} takes {len(text)} bytes, more than the "
                f"{_JSON_BYTES} there are: use a shorter site name"
            )
        return _JSON_BYTES.to_bytes(8, "little") + text.ljust(_JSON_BYTES)

    def index(self) -> bytes:
        """Write the zarr shard index: (offset, nbytes) an inner chunk, absent ones as 2^64-1, then its crc32c."""
        entries = np.full((self.spec.chunks_per_shard, 2), _ABSENT, dtype="<u8")
        entries[: self.chunks, 0] = HEADER_BYTES + np.arange(self.chunks) * self.spec.chunk_bytes
        entries[: self.chunks, 1] = self.spec.chunk_bytes
        body = entries.tobytes()
        return body + crc32c.crc32c(body).to_bytes(4, "little")

    def chunk_padding(self) -> bytes:
        """Give the fill that completes the last inner chunk: NaN for activations."""
        return self.spec.dtype.fill * ((self.chunks_end - self.data_end) // self.spec.dtype.size)

    def tail(self, crcs: list[int], statistics: Mapping[str, np.ndarray] | None) -> bytes:
        """Write everything behind the valid rows, from `data_end` to the end of the file.

        Args:
            crcs: the crc32c of each present inner chunk, its padding included.
            statistics: the arrays of `statistics.Moments.arrays`, or None where the array has none.
        """
        out = bytearray(self.size - self.data_end)

        def put(name: str, data: bytes) -> None:
            _, _, start, stop = self.tensors[name]
            if len(data) != stop - start:
                raise AssertionError(f"{name}: {len(data)} bytes for a place of {stop - start}")
            out[start - self.data_end : stop - self.data_end] = data

        padding = self.chunk_padding()
        out[: len(padding)] = padding
        put("crc32c", np.asarray(crcs, dtype="<u4").tobytes())
        if statistics is not None:
            digest = 0
            for name, code, _, _ in self._statistics()[:-1]:
                data = np.ascontiguousarray(statistics[name], dtype=f"<{code[0].lower()}8").tobytes()
                digest = crc32c.crc32c(data, digest)
                put(name, data)
            put("statistics_crc32c", digest.to_bytes(4, "little"))
        put("index", self.index())
        return bytes(out)


def encode(
    spec: ShardSpec,
    rows: np.ndarray,
    metadata: Mapping[str, str],
    statistics: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Write a whole shard in memory.

    Args:
        spec: the array's shards.
        rows: `[rows, *spec.row_shape]` in `spec.dtype`, at most `spec.shard_rows` of them and at least one.
        metadata: the strings of the header's `__metadata__`.
        statistics: as in `Layout.tail`.
    """
    layout = Layout(spec, len(rows))
    data = np.ascontiguousarray(rows, dtype=spec.dtype.numpy).tobytes()
    chunks = data + layout.chunk_padding()
    step = spec.chunk_bytes
    crcs = [crc32c.crc32c(chunks[start : start + step]) for start in range(0, len(chunks), step)]
    return layout.header(metadata) + data + layout.tail(crcs, statistics)


def ids_digest(ids: np.ndarray) -> str:
    """Hash token ids as headers and the root do: the first 32 hexadecimal digits of SHA-256 of them as int32."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i4").data).hexdigest()[:32]


def said_ids(head: bytes) -> str:
    """Give the `ids` that a header says; empty if it says none."""
    found = _IDS.search(head)
    return found[1].decode() if found else ""


def parse_header(
    spec: ShardSpec,
    head: bytes,
    size: int,
    metadata: Mapping[str, str],
    *,
    where: str,
    likely: Layout | None = None,
) -> Layout:
    """Check the first 4096 bytes of a shard by writing them anew, and give its layout.

    Args:
        spec: what the array's `zarr.json` promises.
        head: the first 4096 bytes of the file, or fewer if it is shorter.
        size: the size of the file in bytes.
        metadata: what the header's `__metadata__` must be: a shard that was moved, or comes from another
            store, is found by it. A site's may say `ids` as well, which only the store's tokens can tell.
        where: the file, for the error.
        likely: the layout that it probably has, so that nothing need be parsed.

    Raises:
        CorruptError: anything is not exactly as the writer makes it.
    """
    ids = said_ids(head)
    if ids and "first_token" in metadata:
        metadata = {**metadata, "ids": ids}
    if likely is not None and size == likely.size and head == likely.header(metadata):
        return likely
    if len(head) < HEADER_BYTES or int.from_bytes(head[:8], "little") != _JSON_BYTES:
        raise CorruptError(
            f"{where} does not begin with a safetensors header of {_JSON_BYTES} bytes: it is {size} bytes "
            f"long and not a shard of this format; set it aside and make it again"
        )
    try:
        rows = json.loads(head[8:])[spec.tensor]["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CorruptError(f"{where}: its header names no tensor {spec.tensor!r} ({error!r})") from error
    if type(rows) is not int or not 0 < rows <= spec.shard_rows:
        raise CorruptError(f"{where} says it has {rows!r} rows: expected 1 to {spec.shard_rows}")
    layout = Layout(spec, rows)
    if head != layout.header(metadata):
        found = json.loads(head[8:]).get("__metadata__")
        raise CorruptError(
            f"{where}: its header is not the one that belongs there. It says {found}, expected "
            f"{dict(metadata)}: the file is damaged, was moved, or comes from another store"
        )
    if size != layout.size:
        raise CorruptError(
            f"{where} is {size} bytes long, its header promises {layout.size}: "
            f"it was {'cut short' if size < layout.size else 'written to'}; set it aside and make it again"
        )
    return layout
