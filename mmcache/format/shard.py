"""The shard on paper: a file that is at once a Zarr v3 shard and a safetensors file. Arithmetic only, no I/O.

FORMAT.md in the package is the specification. `ShardSpec` says what the shards of an array have in common, `Layout`
where every byte of one shard goes, and `encode` is the whole of it in one simple function, which the streaming writer
is tested equal to.

How many tokens a shard and an inner chunk hold. Arithmetic only. A *row* is what a store keeps of one token: `d_model`
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


SHARD_BYTES = 256 << 20
CHUNK_BYTES = 4 << 20
# An explicit shard_tokens whose best inner chunk is below this is refused: readers would drown in chunks.
_USEFUL_CHUNK_BYTES = 1 << 20
# Below this many bytes an inner chunk costs more in its shard's index than it saves in padding: with 16
# bytes of index an inner chunk, 16 * 256 MiB / c + c is smallest at c = 64 KiB.
_SMALLEST_CHUNK_BYTES = 64 << 10
# No shard is ever that long; divisors of longer ones take too long to find.
MOST_ROWS = 1 << 40


# Asked for each shard that is named, always of the same few numbers.
@lru_cache(maxsize=64)
def _largest_divisor(number: int, limit: int) -> int:
    """Give the largest divisor of `number` that is at most `limit` (and at least 1)."""
    best = 1
    for small in range(1, math.isqrt(number) + 1):
        if number % small == 0:
            for divisor in (small, number // small):
                if best < divisor <= limit:
                    best = divisor
    return best


def _page_rows(row_bytes: int) -> int:
    """Give the fewest rows that fill whole pages: a power of two, at most 2,048 for elements of 2 bytes."""
    return PAGE // math.gcd(row_bytes, PAGE)


def inner_rows(shard: int, row_bytes: int, known: int | None) -> int:
    """Choose the rows of an inner chunk: the largest divisor of `shard` within 4 MiB and within `known`.

    Args:
        shard: rows a shard.
        row_bytes: bytes a row.
        known: rows known to come when the array is made, or None. A chunk never exceeds them, down to
            64 KiB, below which the index would outweigh the padding that is saved.
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
    """Choose the rows of a shard that holds all: one inner chunk where that is small, whole ones otherwise."""
    if known * widest <= CHUNK_BYTES:
        return max(known, 1)
    chunk = 1 << max(0, (CHUNK_BYTES // widest).bit_length() - 1)
    return -(-known // chunk) * chunk


def shard_rows(row_bytes: Collection[int], asked: int | None, known: int | None) -> int:
    """Choose the tokens a shard of all sites of a store, or check the number that was asked for.

    Args:
        row_bytes: bytes a row of each site.
        asked: the user's `shard_tokens`, or None for the default: the largest power of two that keeps the
            widest site's shard within 256 MiB, and fills whole pages in every site.
        known: tokens known to come, where nothing can follow them, or None. Where one shard holds them all
            it ends where they end.

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
        # No other shard follows, so any number will do. Not as it stands: a prime is a chunk, and an entry
        # of the index, for each of its tokens.
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
