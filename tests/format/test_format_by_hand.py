"""A store written by FORMAT.md alone: the page says enough for another program to be a writer."""

import hashlib
import json

import crc32c
import numpy as np
import pytest
import torch
import zarr

import mmcache

LAYERS, TOKENS, WIDTH = [2, 5], 700, 24
SHARD, INNER = 512, 128
COLUMN_SHARD = 1 << 20
CODES = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "uint8": "U8"}
FILLS = {"float32": b"\0\0\xc0\x7f", "int32": b"\xff" * 4, "int64": b"\xff" * 8, "uint8": b"\0"}


def signed(said):
    text = json.dumps(said).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def attributes(version, **said):
    return {"mmcache": {"format": version, "digest": "0" * 64, **said}}


def crc(data):
    return crc32c.crc32c(data).to_bytes(4, "little")


def statistics_of(rows, keep):
    """The eight statistics of `[R, L, D]` float64 rows, all of them finite, of which those of `keep` count."""
    norms = np.linalg.norm(rows, axis=2)
    chunks = [norms[start : start + INNER][keep[start : start + INNER]] for start in range(0, len(rows), INNER)]
    rows = rows[keep]
    columns = [
        [np.full(len(LAYERS[: rows.shape[1]]), len(c)), c.sum(axis=0), (c**2).sum(axis=0), c.min(axis=0), c.max(axis=0)]
        for c in chunks
    ]
    mean, none = rows.mean(axis=0), np.zeros(rows.shape[1], "<i8")
    return {
        "count": np.full(mean.shape, float(len(rows))),
        "mean": mean,
        "m2": ((rows - mean) ** 2).sum(axis=0),
        "norms": np.array(columns).swapaxes(1, 2),
        "non_finite": none,
        "first_non_finite": none - 1,
        "zero_rows": none,
        "overflow": none,
    }


def shard(tensor, rows, metadata, shard_rows, inner, statistics):
    """One file, byte by byte."""
    size, fill = inner * rows[0].nbytes, FILLS[rows.dtype.name]
    chunks, length = -(-len(rows) // inner), rows.nbytes
    filled = rows.tobytes() + fill * ((chunks * size - length) // len(fill))
    parts = [(tensor, CODES[rows.dtype.name], rows.shape, rows.tobytes())]
    padding = filled[length:] + bytes(-len(filled) % 4096)
    parts.append(("padding", "U8", [len(padding)], padding))
    crcs = b"".join(crc(filled[start : start + size]) for start in range(0, len(filled), size))
    parts.append(("crc32c", "U32", [chunks], crcs))
    for name, array in statistics.items():
        parts.append((name, CODES[array.dtype.name], array.shape, array.tobytes()))
    if statistics:
        parts.append(("statistics_crc32c", "U32", [1], crc(b"".join(array.tobytes() for array in statistics.values()))))
    entries = [number for chunk in range(chunks) for number in (4096 + chunk * size, size)]
    entries += [2**64 - 1] * (2 * (shard_rows // inner - chunks))
    index = np.array(entries, "<u8").tobytes()
    index += crc(index)
    rest = -(sum(len(data) for *_, data in parts) + len(index)) % 4096
    parts += [("fill", "U8", [rest], bytes(rest)), ("index", "U8", [len(index)], index)]
    header, at = {"__metadata__": metadata}, 0
    for name, code, shape, data in parts:
        if data:
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + len(data)]}
            at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(4088)
    return (4088).to_bytes(8, "little") + text + b"".join(data for *_, data in parts)


def array_json(version, shape, shards, inner, dtype, fill, names, order=None, **more):
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    transpose = [{"name": "transpose", "configuration": {"order": order}}] if order else []
    sharding = {
        "chunk_shape": inner,
        "codecs": [*transpose, little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    said = {
        "attributes": attributes(version, **more),
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "fill_value": fill,
        "dimension_names": names,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return signed(said)


def put(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def put_root(path, version, layout):
    said = attributes(
        version,
        kind="planned",
        store="by hand",
        layout=layout,
        dtype="float32",
        sites={"mid": WIDTH},
        layers=LAYERS,
        shard_tokens=SHARD,
        inner_tokens={"mid": INNER},
        n_tokens=TOKENS,
        n_sequences=2,
        source={"tokens": "c0ffee"},
        **({"uses": ["first"]} if version == 2 else {}),
    )
    put(path / "zarr.json", signed({"attributes": said, "zarr_format": 3, "node_type": "group"}))


def put_column(path, version, array, rows, inner, fill, names):
    key = "c.0" + ".0" * (rows.ndim - 1)
    said = {"format": f"mmcache/{version}", "store": "by hand", "array": array, "key": key}
    put(path / array / key, shard(array, rows, said, COLUMN_SHARD, inner, {}))
    tail = rows.shape[1:]
    text = array_json(version, rows.shape, [COLUMN_SHARD, *tail], [inner, *tail], rows.dtype.name, fill, names)
    put(path / array / "zarr.json", text)


def put_site(path, version, layout, rows, keep):
    deep, order = (len(LAYERS), [1, 0, 2]) if layout == "token" else (1, None)
    names = ["layer", "token", "d_model"]
    shape, shards, inner = [len(LAYERS), TOKENS, WIDTH], [deep, SHARD, WIDTH], [deep, INNER, WIDTH]
    text = array_json(version, shape, shards, inner, "float32", "NaN", names, order, layers=LAYERS)
    put(path / "mid" / "zarr.json", text)
    for slot in range(len(LAYERS) // deep):
        for start in range(0, TOKENS, SHARD):
            part = rows[start : start + SHARD, slot : slot + deep]
            said = {
                "format": f"mmcache/{version}",
                "store": "by hand",
                "array": "mid",
                "key": f"c.{slot}.{start // SHARD}.0",
                "tokens": "c0ffee",
                "layout": layout,
                "layers": "2,5" if layout == "token" else str(LAYERS[slot]),
                "first_token": str(start),
            }
            packed = np.ascontiguousarray(part if layout == "token" else part[:, 0])
            statistics = statistics_of(part.astype("<f8"), keep[start : start + SHARD])
            put(path / "mid" / said["key"], shard("activations", packed, said, SHARD, INNER, statistics))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["layer", "token"])
def test_a_store_written_by_the_page_alone_is_one(layout, version, tmp_path):
    rows = np.random.default_rng(0).standard_normal((TOKENS, len(LAYERS), WIDTH)).astype("<f4")
    ids = np.arange(TOKENS, dtype="<i4")
    spans = np.array([[0, 300, 0], [300, TOKENS, 7]], "<i8")
    # Bits of the user's own; in version 2 the first tokens are flagged beside them, and do not count.
    flags, keep = (ids % 3).astype("u1") * (8 if version == 2 else 4), np.ones(TOKENS, bool)
    if version == 2:
        flags[spans[:, 0]] |= 4
        keep[spans[:, 0]] = False
    put_root(tmp_path, version, layout)
    put_column(tmp_path, version, "tokens", ids, 16384, -1, ["token"])
    put_column(tmp_path, version, "flags", flags, 65536, 0, ["token"])
    put_column(tmp_path, version, "sequences", spans, 2048, -1, ["sequence", "start_stop_document"])
    put_site(tmp_path, version, layout, rows, keep)
    with mmcache.open(tmp_path) as store:
        assert (store.layers, store.n_tokens, store.sites) == (tuple(LAYERS), TOKENS, ("mid",))
        assert torch.equal(store["mid"].gather(range(TOKENS)), torch.from_numpy(rows))
        assert (store.tokens.tolist(), store.flags.tolist()) == (ids.tolist(), flags.tolist())
        assert [list(span) for span in store.sequences] == spans.tolist()
        found = store["mid"].statistics
        wide = rows.astype("f8")[keep]
        np.testing.assert_allclose(found.mean, wide.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(found.max_norm, np.linalg.norm(wide, axis=2).max(axis=0))
        assert store.counted(0, TOKENS).tolist() == keep.tolist()
    group = zarr.open_group(tmp_path, mode="r")
    assert np.array_equal(group["mid"][:].swapaxes(0, 1), rows)
    assert np.array_equal(group["sequences"][:], spans)
