"""The bytes of a shard, which is both a Zarr v3 shard and a safetensors file, and its size in tokens. No I/O.

FORMAT.md in the package is the specification. `ShardSpec` is what the shards of an array have in common, `Layout` where
every byte of one shard goes. `encode` makes a whole shard in one simple function; tests compare the streaming writer
with it.

`shard_rows` and `inner_rows` choose the tokens of a shard and an inner chunk. A *row* is one token's data: `d_model`
numbers in the layer layout, `n_layers * d_model` in the token layout. Sizes are bytes, counts are rows (tokens).

Sources: the Zarr v3 `sharding_indexed` codec (https://zarr-specs.readthedocs.io, codecs/sharding-indexed) and the
safetensors format (https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.errors import ArgumentError, CorruptError
from mmcache.system.arguments import count
from mmcache.system.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mmcache.format.dtypes import Dtype

__all__ = [
    "CHUNK_BYTES",
    "FORMAT_VERSIONS",
    "HEADER_BYTES",
    "MOST_ROWS",
    "NORM_COLUMNS",
    "SHARD_BYTES",
    "STATISTICS",
    "Layout",
    "ShardSpec",
    "encode",
    "ids_digest",
    "inner_rows",
    "parse_header",
    "said_ids",
    "shard_rows",
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
# No site name can match: JSON escapes its quotes.
_IDS = re.compile(rb'"ids":"([0-9a-f]{32})"')


@dataclass(frozen=True)
class ShardSpec:
    """What the shards of one array have in common.

    `tensor` names the data tensor, `row_shape` is the shape of one row, `stat_layers` the number of layers with
    statistics in a shard (0: none), each over the last axis of `row_shape`.
    """

    tensor: str
    dtype: Dtype
    row_shape: tuple[int, ...]
    shard_rows: int
    chunk_rows: int
    stat_layers: int = 0

    @cached_property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.row_shape) * self.dtype.size

    @property
    def chunk_bytes(self) -> int:
        """Bytes per inner chunk, which is always stored full-size."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks in the index, present or not."""
        return self.shard_rows // self.chunk_rows

    def rows_in_block(self, block: int, total: int) -> int:
        """The number of rows in block `block` of an array of `total` rows."""
        return max(0, min(self.shard_rows, total - block * self.shard_rows))

    def blocks(self, total: int) -> int:
        """The number of blocks (shards along the rows) of an array of `total` rows."""
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
        """Offset of the end of the last valid row."""
        return HEADER_BYTES + self.rows * self.spec.row_bytes

    @property
    def chunks_end(self) -> int:
        """Offset of the end of the last inner chunk, which is stored full-size."""
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
        """Every safetensors tensor by name: (dtype code, shape, start, stop), without gaps from 4096 to the end."""
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
        """Size of the file in bytes, a multiple of 4096."""
        return self.tensors["index"][3]

    @cached_property
    def _tensors_json(self) -> str:
        """The header's JSON of the tensors, closing brace included: the same in all full shards."""
        entries = {
            name: {"dtype": code, "shape": list(shape), "data_offsets": [start - HEADER_BYTES, stop - HEADER_BYTES]}
            for name, (code, shape, start, stop) in self.tensors.items()
        }
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=True)[1:]

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The first 4096 bytes: the safetensors header, always of the same length.

        Raises:
            CorruptError: the JSON is too long, so that the data would not start at byte 4096.
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
        """The zarr shard index: (offset, nbytes) per inner chunk, absent ones as 2^64-1, then its crc32c."""
        entries = np.full((self.spec.chunks_per_shard, 2), _ABSENT, dtype="<u8")
        entries[: self.chunks, 0] = HEADER_BYTES + np.arange(self.chunks) * self.spec.chunk_bytes
        entries[: self.chunks, 1] = self.spec.chunk_bytes
        body = entries.tobytes()
        return body + crc32c.crc32c(body).to_bytes(4, "little")

    def chunk_padding(self) -> bytes:
        """The padding of the last inner chunk: fill values, NaN for activations."""
        return self.spec.dtype.fill * ((self.chunks_end - self.data_end) // self.spec.dtype.size)

    def tail(self, crcs: list[int], statistics: Mapping[str, np.ndarray] | None) -> bytes:
        """All bytes after the valid rows, from `data_end` to the end of the file.

        Args:
            crcs: the crc32c of each present inner chunk, its padding included.
            statistics: the arrays of `Moments.arrays`, or None where the array has none.
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
    """All bytes of a shard.

    Args:
        spec: the array's shards.
        rows: `[rows, *spec.row_shape]` in `spec.dtype`, 1 to `spec.shard_rows` of them.
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
    """Digest of token ids, as in headers and the root: first 32 hexadecimal digits of the SHA-256 of them as int32."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i4").data).hexdigest()[:32]


def said_ids(head: bytes) -> str:
    """The `ids` in a header; empty if it has none."""
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
    """The layout of a shard, whose first 4096 bytes are compared with the header that the writer would make.

    Args:
        spec: the shards of the array, by its `zarr.json`.
        head: the first 4096 bytes of the file, or fewer if it is shorter.
        size: the size of the file in bytes.
        metadata: what the header's `__metadata__` must be, which detects a shard that was moved or comes from another
            store. A site's header may have `ids` too; they are not checked here, since that needs the store's tokens.
        where: the file, for the error.
        likely: the layout that it probably has, to avoid parsing.

    Raises:
        CorruptError: anything differs from what the writer would make.
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


SHARD_BYTES = 256 << 20
CHUNK_BYTES = 4 << 20
# A shard_tokens of the user whose best inner chunk is smaller than this is refused: readers would get too many chunks.
_USEFUL_CHUNK_BYTES = 1 << 20
# A smaller inner chunk costs more bytes in the shard's index than it saves in padding: with 16 bytes of index per
# chunk, 16 * 256 MiB / c + c is smallest at c = 64 KiB.
_SMALLEST_CHUNK_BYTES = 64 << 10
# No real shard is that long; finding divisors of larger numbers takes too long.
MOST_ROWS = 1 << 40


# Called for each shard key, always with the same few numbers.
@lru_cache(maxsize=64)
def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (and at least 1)."""
    best = 1
    for small in range(1, math.isqrt(number) + 1):
        if number % small == 0:
            for divisor in (small, number // small):
                if best < divisor <= limit:
                    best = divisor
    return best


def _page_rows(row_bytes: int) -> int:
    """The fewest rows that fill whole pages: a power of two, at most 2,048 for elements of 2 bytes."""
    return PAGE // math.gcd(row_bytes, PAGE)


def inner_rows(shard: int, row_bytes: int, known: int | None) -> int:
    """Rows of an inner chunk: the largest divisor of `shard` within 4 MiB and within `known`.

    Args:
        shard: rows per shard.
        row_bytes: bytes per row.
        known: rows to come, if known when the array is created, or None. A chunk is no larger than they are, down to
            64 KiB, below which the index costs more than the padding saved.
    """
    limit = max(1, CHUNK_BYTES // row_bytes)
    if known is not None and known < shard:
        limit = min(limit, max(known, _SMALLEST_CHUNK_BYTES // row_bytes, 1))
    return _largest_divisor(shard, limit)


def _is_good(shard: int, row_bytes: Collection[int]) -> bool:
    for row in row_bytes:
        if shard % _page_rows(row):
            return False
        chunk = inner_rows(shard, row, None)
        if chunk != shard and chunk * row < _USEFUL_CHUNK_BYTES:
            return False
    return True


def _only_shard(known: int, widest: int) -> int:
    """Rows of a shard that holds all `known` rows: exactly these if they fit a chunk, else a multiple of chunks."""
    if known * widest <= CHUNK_BYTES:
        return max(known, 1)
    chunk = 1 << max(0, (CHUNK_BYTES // widest).bit_length() - 1)
    return -(-known // chunk) * chunk


def shard_rows(row_bytes: Collection[int], asked: int | None, known: int | None) -> int:
    """Tokens per shard, the same for all sites of a store: the number asked for, checked, or a default.

    Args:
        row_bytes: bytes per row of each site.
        asked: the user's `shard_tokens`, or None for the default: the largest power of two that keeps the
            widest site's shard within 256 MiB, and fills whole pages in every site.
        known: the total number of tokens, if it is final, or None. If one shard holds them all, it ends after them.

    Raises:
        ArgumentError: `asked` is no count, does not fill whole pages, or has no useful divisor.
    """
    widest = max(row_bytes)
    if asked is None:
        default = 1 << max(0, (SHARD_BYTES // widest).bit_length() - 1)
        default = max(default, *(_page_rows(row) for row in row_bytes))
        if known is None or known > default:
            return default
        return _only_shard(known, widest)
    asked = count(1, MOST_ROWS)("shard_tokens", asked)
    if _is_good(asked, row_bytes):
        return asked
    if known is not None and known <= asked:
        # No other shard follows, so any number would do, but a prime one would make a chunk, with an index entry, of
        # each token.
        return _only_shard(known, widest)
    near = next(
        candidate
        for step in range(1, asked + 2048 * 2)
        for candidate in (asked - step, asked + step)
        if candidate > 0 and _is_good(candidate, row_bytes)
    )
    raise ArgumentError(
        f"shard_tokens is {asked}, whose rows of {' and '.join(str(row) for row in sorted(set(row_bytes)))} "
        f"bytes do not fill whole {PAGE}-byte pages with a useful inner chunk (a divisor near {CHUNK_BYTES} "
        f"bytes): the nearest good number is {near} (a power of two usually is one, 2048 always)"
    )
