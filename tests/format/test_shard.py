import itertools
import json
import tempfile
from pathlib import Path

import crc32c
import numpy as np
import pytest
import safetensors
import tensorstore
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.errors import CorruptError
from mmcache.format.dtypes import BY_NAME
from mmcache.format.manifest import ROOT, Manifest, array_json
from mmcache.format.shard import HEADER_BYTES, STATISTICS, Layout, ShardSpec, encode, parse_header
from mmcache.stats.moments import Moments
from mmcache.stats.site_statistics import shard_statistics
from mmcache.storage.shard_folder import ShardFolder
from random_shards import METADATA, encoded, layouts, random_rows

ABSENT = 2**64 - 1


@given(layouts())
def test_the_tensors_tile_the_file_without_gaps(layout):
    end = HEADER_BYTES
    for code, shape, start, stop in layout.tensors.values():
        assert start == end < stop
        itemsize = {"U8": 1, "U32": 4, "I64": 8, "F64": 8}.get(code, layout.spec.dtype.size)
        assert stop - start == itemsize * int(np.prod(shape))
        end = stop
    assert end == layout.size
    assert layout.size % 4096 == 0
    assert len(layout.tail([0] * layout.chunks, None)) == layout.size - layout.data_end
    assert layout.tensors["activations"][2] == 4096 == len(layout.header(METADATA))
    # Checksums begin on a page, behind inner chunks that are there in full.
    assert layout.tensors["crc32c"][2] % 4096 == 0
    assert layout.data_end <= layout.chunks_end <= layout.tensors["crc32c"][2] < layout.chunks_end + 4096


@given(layouts())
def test_the_index_is_where_zarr_looks_for_it(layout):
    data, _ = encoded(layout, random_rows(layout))
    spec = layout.spec
    size = spec.chunks_per_shard * 16 + 4
    entries, crc = data[-size:-4], data[-4:]
    assert crc32c.crc32c(entries) == int.from_bytes(crc, "little")
    for number, (offset, nbytes) in enumerate(np.frombuffer(entries, "<u8").reshape(-1, 2).tolist()):
        if number < layout.chunks:
            assert (offset, nbytes) == (4096 + number * spec.chunk_bytes, spec.chunk_bytes)
        else:
            assert (offset, nbytes) == (ABSENT, ABSENT)


@given(layouts(), st.integers(0, 2**32))
def test_a_shard_is_a_safetensors_file(layout, seed):
    rows = random_rows(layout, seed)
    data, statistics = encoded(layout, rows)
    assert len(data) == layout.size
    found = dict(safetensors.deserialize(data))
    assert {name: (t["dtype"], tuple(t["shape"])) for name, t in found.items()} == {
        name: (code, shape) for name, (code, shape, _, _) in layout.tensors.items()
    }
    assert found["activations"]["data"] == rows.tobytes()
    # NaN to the end of the last inner chunk, then zeros.
    fill = layout.spec.dtype.fill * ((layout.chunks_end - layout.data_end) // layout.spec.dtype.size)
    if "padding" in found:
        assert bytes(found["padding"]["data"]) == fill.ljust(len(found["padding"]["data"]), b"\0")
    if "fill" in found:
        assert not any(found["fill"]["data"])
    chunks, step = rows.tobytes() + fill, layout.spec.chunk_bytes
    crcs = [crc32c.crc32c(chunks[start : start + step]) for start in range(0, len(chunks), step)]
    assert np.frombuffer(found["crc32c"]["data"], "<u4").tolist() == crcs
    if statistics is not None:
        joined = b"".join(statistics[name].tobytes() for name in STATISTICS)
        assert b"".join(found[name]["data"] for name in STATISTICS) == joined
        assert int.from_bytes(found["statistics_crc32c"]["data"], "little") == crc32c.crc32c(joined)


def manifest_for(layout, rows):
    spec = layout.spec
    return Manifest(
        kind="grown",
        store="0" * 32,
        layout="layer" if len(spec.row_shape) == 1 else "token",
        dtype=spec.dtype.name,
        sites={"mlp_in": spec.row_shape[-1]},
        layers=tuple(range(1 if len(spec.row_shape) == 1 else spec.row_shape[0])),
        shard_tokens=spec.shard_rows,
        inner_tokens={"mlp_in": spec.chunk_rows},
        n_tokens=rows,
    )


@given(layouts(), st.integers(0, 2**32))
def test_zarr_and_tensorstore_read_a_shard_bit_for_bit(layout, seed):
    rows, spec = random_rows(layout, seed), layout.spec
    # One more block, whose shard is not there.
    manifest = manifest_for(layout, total := spec.shard_rows + 3)
    missing = np.broadcast_to(np.frombuffer(spec.dtype.fill, np.uint8), (total, *spec.row_shape, spec.dtype.size))
    expected = missing.copy()
    expected[: len(rows)] = rows[..., None].view(np.uint8)
    if len(spec.row_shape) == 1:
        expected = expected[:, None]
    expected = expected.swapaxes(0, 1).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder) / "mlp_in"
        array.mkdir()
        (array / ROOT).write_bytes(array_json(manifest, "mlp_in", total))
        (array / "c.0.0.0").write_bytes(encoded(layout, rows)[0])
        opened = zarr.open_array(array, mode="r")
        assert opened.shape == (len(manifest.layers), total, spec.row_shape[-1])
        assert opened.metadata.dimension_names == ("layer", "token", "d_model")
        assert opened[:].tobytes() == expected
        kept = {"driver": "file", "path": str(array)}
        by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kept}, open=True, read=True).result()
        assert by_tensorstore.read().result().tobytes() == expected


@given(layouts(), st.integers(0, 2**32))
def test_our_own_reader_gives_the_same_bits(layout, seed):
    rows = random_rows(layout, seed)
    manifest = manifest_for(layout, layout.rows)
    spec = manifest.spec("mlp_in")
    metadata = manifest.shard_metadata("mlp_in", 0)
    whole = Layout(spec, layout.rows)
    data, statistics = encoded(whole, rows)
    data = whole.header(metadata) + data[HEADER_BYTES:]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mlp_in").mkdir()
        (Path(folder) / "mlp_in" / "c.0.0.0").write_bytes(data)
        shards = ShardFolder(Path(folder), manifest, "mlp_in", layout.rows)
        assert shards.checked(0, 0).contiguous().view(torch.uint8).numpy().tobytes() == rows.tobytes()
        found, counted = shard_statistics(shards, 0, 0)
        assert counted == layout.rows
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in statistics.items()
        }


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_the_streaming_writer_makes_the_same_file_however_the_rows_come(layout, tmp_path):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((3, 1500, 5), np.float32))
    rows[1, 700, 2] = torch.nan
    for name, cuts in (("a", [0, 1500]), ("b", [0, 1, 100, 164, 165, 900, 1499, 1500])):
        options = {"sites": {"mlp_in": 5}, "n_layers": 3, "dtype": "float32", "layout": layout, "shard_tokens": 1024}
        with mmcache.create(tmp_path / name, **options) as writer:
            for start, stop in itertools.pairwise(cuts):
                part = {"mlp_in": rows[:, start:stop]}
                writer.append(torch.arange(start, stop), part, continues=start > 0)
                if start == 100:
                    writer.commit()  # the partly filled shard is written again
    shards = sorted(file.name for file in (tmp_path / "a" / "mlp_in").glob("c.*"))
    assert len(shards) == (6 if layout == "layer" else 2)
    manifest = mmcache.open(tmp_path / "b")._manifest
    spec = manifest.spec("mlp_in")
    for key in shards:
        slot, block = int(key.split(".")[1]), int(key.split(".")[2])
        part = rows[:, block * 1024 : (block + 1) * 1024].numpy().swapaxes(0, 1)
        part = part[:, slot] if layout == "layer" else part
        moments = Moments(spec.stat_layers, 5, spec.chunk_rows)
        # The first token of a sequence does not count.
        moments.add(part.reshape(len(part), -1, 5), np.arange(block * 1024, block * 1024 + len(part)) > 0)
        metadata = manifest.shard_metadata("mlp_in", block, slot)
        data = encode(spec, part, metadata, moments.arrays(block * 1024))
        assert (tmp_path / "b" / "mlp_in" / key).read_bytes() == data
        # The other store, which has a name of its own, differs in that alone.
        assert (tmp_path / "a" / "mlp_in" / key).read_bytes()[HEADER_BYTES:] == data[HEADER_BYTES:]


SPEC = ShardSpec("activations", BY_NAME["bfloat16"], (2, 6), 40, 10, 2)
GOOD = Layout(SPEC, 25)


def parse(head, size=GOOD.size, metadata=METADATA):
    return parse_header(SPEC, head, size, metadata, where="acts/mlp_in/c.0.0.0")


def header_with(change):
    """Write the header of GOOD with its JSON changed, as a writer that had it so would."""
    said = json.loads(GOOD.header(METADATA)[8:])
    text = json.dumps(change(said) or said, separators=(",", ":")).encode()
    return (4088).to_bytes(8, "little") + text.ljust(4088)


def with_tensor(name, **fields):
    return lambda said: said[name].update(fields)


def test_a_good_header_gives_its_layout():
    assert parse(GOOD.header(METADATA)) == GOOD
    assert header_with(lambda _: None) == GOOD.header(METADATA)  # so what is refused below is refused for its change


@pytest.mark.parametrize("rows", [True, 0, -1, 41, 1.0, "25", None, [25], 10**30])
def test_a_number_of_rows_that_cannot_be_is_refused(rows):
    head = header_with(with_tensor("activations", shape=[rows, 2, 6]))
    with pytest.raises(CorruptError, match="rows: expected 1 to 40"):
        parse(head)


BROKEN = {
    "another layout of the same rows": with_tensor("activations", shape=[25, 6, 2]),
    "rows that the file has not": with_tensor("activations", shape=[26, 2, 6]),
    "another dtype": with_tensor("activations", dtype="F16"),
    "data elsewhere": with_tensor("activations", data_offsets=[8, 8 + 600]),
    "a field too many": with_tensor("activations", note=1),
    "a tensor too many": lambda said: said.update(extra=said["fill"]),
    "a tensor too few": lambda said: said.pop("fill") and None,
    "another order": lambda said: dict(reversed(said.items())),
    "no metadata": lambda said: said.pop("__metadata__") and None,
    "metadata too many": lambda said: said["__metadata__"].update(note="x"),
    "another format version": lambda said: said["__metadata__"].update(format="mmcache/2"),
    "another store": lambda said: said["__metadata__"].update(store="1" * 32),
    "another site": lambda said: said["__metadata__"].update(array="mlp_out"),
    "another place": lambda said: said["__metadata__"].update(key="c.0.1.0"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_header_that_is_not_the_one_that_belongs_there_is_refused(change):
    with pytest.raises(CorruptError, match="its header is not the one that belongs there"):
        parse(header_with(change))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"5",
        b"null",
        b'"activations"',
        b"{}",
        b'{"activations":[]}',
        b'{"activations":{}}',
        b'{"activations":{"shape":5}}',
        b'{"activations":{"shape":[]}}',
        b'{"activations":{"shape":{"1":2}}}',
        b"[" * 4088,
        b'{"activations":{"shape":[' + b"9" * 4050 + b"]}}",
        b"\0" * 4088,
    ],
)
def test_a_header_that_is_no_json_of_ours_is_refused(text):
    with pytest.raises(CorruptError, match=r"its header names no tensor 'activations'|says it has"):
        parse((4088).to_bytes(8, "little") + text.ljust(4088))


@pytest.mark.parametrize("length", [0, 8, 4080, 4087, 4089, 4096, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(length):
    head = length.to_bytes(8, "little") + GOOD.header(METADATA)[8:]
    with pytest.raises(CorruptError, match="does not begin with a safetensors header of 4088 bytes"):
        parse(head)


@pytest.mark.parametrize("length", [0, 7, 8, 4095])
def test_a_file_shorter_than_a_header_is_refused(length):
    with pytest.raises(CorruptError, match="does not begin with a safetensors header"):
        parse(GOOD.header(METADATA)[:length], length)


@pytest.mark.parametrize(
    ("more", "what"), [(-1, "cut short"), (-4096, "cut short"), (1, "written to"), (4096, "written to")]
)
def test_a_file_of_another_size_is_refused(more, what):
    with pytest.raises(CorruptError, match=what):
        parse(GOOD.header(METADATA), GOOD.size + more)


@given(st.integers(0, 4095), st.integers(1, 255))
def test_every_damaged_byte_of_a_header_is_found(at, change):
    head = bytearray(GOOD.header(METADATA))
    head[at] ^= change
    with pytest.raises(CorruptError):
        parse(bytes(head))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=4088) | JSON.map(lambda said: json.dumps({"activations": {"shape": said}}).encode()))
def test_hostile_headers_are_refused_in_our_own_words(text):
    with pytest.raises(CorruptError):
        parse((4088).to_bytes(8, "little") + text[:4088].ljust(4088))


def test_a_header_that_outgrows_its_place_is_never_written():
    with pytest.raises(CorruptError, match=r"takes [0-9]+ bytes, more than the 4088 there are"):
        GOOD.header(METADATA | {"array": "x" * 4000})
