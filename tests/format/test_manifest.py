import dataclasses
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.errors import ArgumentError, CorruptError, MmcacheError, StoreNotFoundError, VersionError
from mmcache.format.dtypes import ACTIVATION_DTYPES
from mmcache.format.manifest import Manifest, array_json, check_user_metadata, read_manifest
from mmcache.format.names import RESERVED, check_site_name, site_name_problem
from mmcache.format.signed_json import ROOT

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
KEPT_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
SITES = st.text(min_size=1, max_size=20).filter(lambda name: site_name_problem(name) is None)


@st.composite
def manifests(draw):
    """Any store as its writer may leave it: without rows, with a geometry, planned or grown."""
    sites = draw(st.dictionaries(SITES, st.integers(1, 9000), min_size=1, max_size=3))
    manifest = Manifest(
        kind=draw(st.sampled_from(["planned", "grown"])),
        store=draw(st.text("0123456789abcdef", min_size=32, max_size=32)),
        layout=draw(st.sampled_from(["layer", "token"])),
        dtype=draw(st.sampled_from(ACTIVATION_DTYPES)),
        sites=sites,
        layers=tuple(sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=8)))),
        n_tokens=draw(st.none() | st.just(0)),
        special_tokens=tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))),
        metadata=draw(st.dictionaries(st.text(max_size=10), KEPT_JSON, max_size=3)),
        uses=draw(st.sampled_from([(), ("first",)])),
    )
    if draw(st.booleans()):
        manifest = manifest.with_geometry(2048 * draw(st.integers(1, 64)), draw(st.none() | st.integers(1, 10**6)))
        counts = {"n_tokens": draw(st.integers(0, 2**40)), "n_sequences": draw(st.integers(0, 2**30))}
        manifest = dataclasses.replace(manifest, **counts)
    return manifest


def good():
    plain = Manifest("grown", "0123456789abcdef" * 2, "token", "bfloat16", {"mlp_in": 6, "mlp_out": 8}, (0, 1, 5))
    return dataclasses.replace(plain.with_geometry(2048, 100), n_tokens=100, n_sequences=3, metadata={"run": "a"})


def read(text):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ROOT).write_bytes(text)
        return read_manifest(Path(folder))


def signed(attributes):
    """A root with these attributes and the right digest: what a stranger can write who knows the format."""
    said = {"attributes": {"mmcache": {"digest": "0" * 64} | attributes}, "zarr_format": 3, "node_type": "group"}
    text = json.dumps(said).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def attributes_of(manifest):
    return json.loads(manifest.to_json())["attributes"]["mmcache"]


@given(manifests())
def test_a_manifest_survives_the_disk(manifest):
    assert read(manifest.to_json()) == manifest


@given(manifests())
@example(good())
def test_every_zarr_json_carries_the_digest_of_its_own_bytes(manifest):
    arrays = [*RESERVED, *manifest.sites] if manifest.shard_tokens else RESERVED
    for text in (manifest.to_json(), *(array_json(manifest, array, 10) for array in arrays)):
        digest = json.loads(text)["attributes"]["mmcache"]["digest"]
        blanked = text.replace(digest.encode(), b"0" * 64, 1)
        assert blanked != text
        assert hashlib.sha256(blanked).hexdigest() == digest


def test_every_flipped_byte_of_a_root_is_refused(tmp_path):
    text = good().to_json()
    rng = np.random.default_rng(0)
    for at in range(len(text)):
        (tmp_path / ROOT).write_bytes(text[:at] + bytes([text[at] ^ int(rng.integers(1, 256))]) + text[at + 1 :])
        with pytest.raises((CorruptError, VersionError)):
            read_manifest(tmp_path)


def test_a_root_that_was_cut_or_lengthened_is_refused():
    text = good().to_json()
    for damaged in (*(text[:length] for length in range(0, len(text), 7)), text + b" ", text + text, b"\n" + text):
        with pytest.raises(CorruptError):
            read(damaged)


def test_a_change_by_another_program_is_refused():
    # A zarr writer that adds an attribute writes the file anew.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ROOT).write_bytes(good().to_json())
        zarr.open_group(folder, mode="r+").attrs["note"] = "mine"
        with pytest.raises(CorruptError, match="does not match its own digest"):
            read_manifest(Path(folder))


@pytest.mark.parametrize("version", [0, 3, "1", "2", None, [1], True, 1.0, 10**20])
def test_another_format_version_is_named(version):
    with pytest.raises(VersionError, match=r"is of format version .* this library reads 1 and 2: "):
        read(signed(attributes_of(good()) | {"format": version, "digest": "0" * 64, "more": "fields"}))


def version_2(uses):
    return signed(attributes_of(good()) | {"format": 2, "uses": uses, "digest": "0" * 64})


def test_a_store_keeps_what_it_uses():
    assert (good().version, good().uses) == (1, ())
    assert "uses" not in attributes_of(good())
    found = read(version_2(["first"]))
    assert (found.version, found.uses, read(found.to_json())) == (2, ("first",), found)


@pytest.mark.parametrize("uses", [["zones"], ["first", "zones"], ["a", "first"], ["first", ""]])
def test_a_feature_that_is_not_known_is_named(uses):
    with pytest.raises(VersionError, match=rf"uses '{'|'.join({*uses} - {'first'})}' of format version 2, which"):
        read(version_2(uses))


@pytest.mark.parametrize("uses", [[], None, "first", {"first": 1}, ["first", "first"], [1], [["first"]]])
def test_uses_that_are_no_names_are_refused(uses):
    with pytest.raises(CorruptError, match="does not describe a store: `uses` is"):
        read(version_2(uses))


def test_a_store_of_version_1_uses_nothing_of_version_2():
    with pytest.raises(CorruptError, match="does not describe a store: version 1 has no field `uses`"):
        read(signed(attributes_of(good()) | {"uses": ["first"], "digest": "0" * 64}))
    # What version 2 reserves as a name is a site's in version 1.
    fields = attributes_of(good()) | {"sites": {"documents": 6}, "inner_tokens": {"documents": 2048}}
    assert list(read(signed(fields | {"digest": "0" * 64})).sites) == ["documents"]
    with pytest.raises(CorruptError, match="does not describe a store: bad sites"):
        read(signed(fields | {"format": 2, "uses": ["first"], "digest": "0" * 64}))


BAD_FIELDS = [
    ("kind", "frozen"),
    ("store", 5),
    ("store", "x" * 65),
    ("layout", "row"),
    ("dtype", "int32"),
    ("dtype", ["bfloat16"]),
    ("sites", {}),
    ("sites", []),
    ("sites", {"tokens": 6}),
    ("sites", {"../up": 6}),
    ("sites", {"mlp_in": 0}),
    ("sites", {"mlp_in": -6}),
    ("sites", {"mlp_in": 6.0}),
    ("sites", {"mlp_in": True}),
    ("sites", {"mlp_in": 2**48}),
    ("sites", {"mlp_in": None}),
    ("sites", {"mlp_in": 6, "other": 6}),
    ("layers", [1, 0]),
    ("layers", [0, 0]),
    ("layers", [-1]),
    ("layers", [0.0]),
    ("layers", "01"),
    ("layers", 2),
    ("layers", None),
    ("shard_tokens", 0),
    ("shard_tokens", 2049),
    ("shard_tokens", None),
    ("inner_tokens", {}),
    ("inner_tokens", {"mlp_in": 3, "mlp_out": 3}),
    ("inner_tokens", {"mlp_in": "2048", "mlp_out": 2048}),
    ("inner_tokens", [2048]),
    ("n_tokens", -1),
    ("n_tokens", "100"),
    ("n_tokens", 2**48),
    ("n_sequences", None),
    ("n_sequences", -1),
    ("has_tokens", 1),
    ("special_tokens", ["a"]),
    ("special_tokens", None),
    ("metadata", []),
    ("source", None),
    ("colour", "red"),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f"{name}={value!r:.30}" for name, value in BAD_FIELDS])
def test_a_field_that_cannot_be_is_refused(name, value):
    with pytest.raises(CorruptError, match="does not describe a store"):
        read(signed(attributes_of(good()) | {name: value, "digest": "0" * 64}))


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in dataclasses.fields(Manifest)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ],
)
def test_a_field_that_is_missing_is_refused(name):
    attributes = attributes_of(good()) | {"digest": "0" * 64}
    del attributes[name]
    with pytest.raises(CorruptError, match="does not describe a store"):
        read(signed(attributes))


def read_or_refuse(text):
    try:
        manifest = read(text)
    except MmcacheError:
        return
    # What is believed can be worked with.
    if manifest.shard_tokens is not None:
        for site in manifest.sites:
            assert manifest.spec(site).chunks_per_shard > 0
            assert len(manifest.slots(site)) <= max(1, len(manifest.layers))


FIELDS = [field.name for field in dataclasses.fields(Manifest)]


@given(st.dictionaries(st.sampled_from([*FIELDS, "format", "digest"]), JSON, max_size=4))
@example({"digest": "\ud800" * 64})
@example({"digest": "A" * 64})
def test_hostile_fields_are_refused_in_our_own_words(changes):
    read_or_refuse(signed(attributes_of(good()) | {"digest": "0" * 64} | changes))


@given(st.binary(max_size=200) | JSON.map(lambda said: json.dumps(said).encode()))
@example(b"[" * 100_000)
@example(b'{"attributes":{"mmcache":[]}}')
@example(b'{"attributes":{"mmcache":{"digest":5}}}')
@example(b'{"attributes":{"mmcache":"digest"}}')
@example(('{"attributes":{"mmcache":{"format":1,"digest":"' + "0" * 64 + '"}}}').encode("utf-16"))
@example(b'{"attributes":{"mmcache":{"digest":' + b"9" * 5000 + b"}}}")
def test_hostile_roots_are_refused_in_our_own_words(text):
    with pytest.raises(CorruptError):
        read(text)


def test_a_root_that_is_no_file_of_ours_is_refused(tmp_path):
    with pytest.raises(StoreNotFoundError, match="no mmcache store there"):
        read_manifest(tmp_path)
    with pytest.raises(StoreNotFoundError, match="no mmcache store there"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / ROOT).mkdir()
    with pytest.raises(CorruptError, match="is a folder"):
        read_manifest(tmp_path)
    (tmp_path / ROOT).rmdir()
    os.mkfifo(tmp_path / ROOT)
    with pytest.raises(CorruptError):
        read_manifest(tmp_path)


def test_a_root_of_any_size_is_not_read_into_memory(tmp_path):
    with (tmp_path / ROOT).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="is larger than the 16777216 bytes"):
        read_manifest(tmp_path)


def test_zarr_opens_the_root_as_a_group(tmp_path):
    (tmp_path / ROOT).write_bytes(good().to_json())
    assert zarr.open_group(tmp_path, mode="r").attrs["mmcache"]["layers"] == [0, 1, 5]


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_zarr_opens_every_array(layout, tmp_path):
    manifest = dataclasses.replace(good(), layout=layout).with_geometry(2048, 100)
    expected = {
        "mlp_in": ((3, 100, 6), (3 if layout == "token" else 1, 2048, 6), "bfloat16", ("layer", "token", "d_model")),
        "tokens": ((100,), (1 << 20,), "int32", ("token",)),
        "flags": ((100,), (1 << 20,), "uint8", ("token",)),
        "sequences": ((100, 3), (1 << 20, 3), "int64", ("sequence", "start_stop_document")),
    }
    for array, (shape, shards, dtype, names) in expected.items():
        (tmp_path / array).mkdir()
        (tmp_path / array / ROOT).write_bytes(array_json(manifest, array, 100))
        opened = zarr.open_array(tmp_path / array, mode="r")
        assert (opened.shape, opened.shards, opened.dtype.name) == (shape, shards, dtype)
        assert opened.metadata.dimension_names == names
        assert opened.chunks[-2 if len(shape) > 1 else 0] == manifest.spec(array).chunk_rows
        fill = RESERVED[array][2] if array in RESERVED else np.nan
        assert np.array_equal(opened[...].astype(np.float64), np.full(shape, float(fill)), equal_nan=True)
        # The shards' names are those that zarr looks for.
        key = opened.metadata.encode_chunk_key(
            (2 if array == "mlp_in" else 1, *([3, 0] if len(shape) == 3 else [0] * (len(shape) - 1)))
        )
        assert key == (manifest.shard_key(array, 3, 2) if array == "mlp_in" else manifest.shard_key(array, 1))


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".hidden", "__private", "a/b", "/a", "a\\b", "a\0b", "a\nb", "a\x7f", "\ud800", "x" * 201,
        "é" * 101, "tokens", "flags", "sequences", "statistics", "zarr.json", 5, None, b"mlp_in",
    ],
)  # fmt: skip
def test_names_that_cannot_be_a_folder_of_the_store_are_refused(name):
    with pytest.raises(ArgumentError, match=r"cannot be a site: (it is|a site is|the store keeps)"):
        check_site_name(name)


@pytest.mark.parametrize(
    "name", ["mlp_in", "model.layers.*.mlp:out", "blocks.3.hook_resid_post", "層", "x" * 200, "a b"]
)
def test_names_of_sites_that_people_use_are_taken(name):
    check_site_name(name)


@given(st.text(max_size=12) | st.sampled_from(["..", "a/..", "c.0.0.0", "é" * 100]))
def test_a_name_that_is_taken_is_one_folder_in_the_store(name):
    if site_name_problem(name) is None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).mkdir()
            assert [path.name for path in Path(folder).iterdir()] == [name]


@given(st.dictionaries(st.text(max_size=10), KEPT_JSON, max_size=4))
def test_user_metadata_is_kept_as_it_is(metadata):
    kept = check_user_metadata("metadata", metadata)
    assert kept == metadata
    assert kept is not metadata
    assert read(dataclasses.replace(good(), metadata=kept).to_json()).metadata == metadata


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"in": found}
    return found


@pytest.mark.parametrize(
    "metadata",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": {1, 2}},
        {"x": b"bytes"},
        {"x": np.float32(1)},
        {1: "x"},
        {"x": (1, 2)},
        [1],
        nested(100_000),
    ],
    ids=lambda metadata: repr(metadata)[:30] if not isinstance(metadata, dict) or "in" not in metadata else "deep",
)
def test_metadata_that_json_changes_or_refuses_is_refused(metadata):
    with pytest.raises(ArgumentError, match=r"metadata (cannot be kept|changes when kept) as JSON"):
        check_user_metadata("metadata", metadata)


@pytest.mark.parametrize("metadata", [{"x": "a" * (9 << 20)}, {"x": [[[[1]]]] * 90_000}])
def test_metadata_that_would_outgrow_the_root_is_refused(metadata):
    with pytest.raises(ArgumentError, match="keep it in a file of its own"):
        check_user_metadata("metadata", metadata)


def test_metadata_of_any_size_that_is_taken_can_be_read_again():
    metadata = check_user_metadata("metadata", {"x": list(range(300_000))})
    assert read(dataclasses.replace(good(), metadata=metadata).to_json()).metadata == metadata


def test_none_is_no_metadata():
    assert check_user_metadata("metadata", None) == {}


@pytest.mark.parametrize(
    ("layout", "slot", "layers", "key"), [("layer", 2, "5", "c.2.7.0"), ("token", 0, "0,1,5", "c.0.7.0")]
)
def test_a_shard_says_where_it_belongs(layout, slot, layers, key):
    manifest = dataclasses.replace(good(), layout=layout, source={"tokens": "f" * 64})
    assert manifest.shard_metadata("mlp_in", 7, slot) == {
        "format": "mmcache/1",
        "store": "0123456789abcdef" * 2,
        "array": "mlp_in",
        "key": key,
        "tokens": "f" * 32,
        "layout": layout,
        "layers": layers,
        "first_token": str(7 * 2048),
    }
    assert set(manifest.shard_metadata("sequences", 1)) == {"format", "store", "array", "key"}
    assert re.fullmatch(r"c\.1\.0", manifest.shard_key("sequences", 1))
    assert list(manifest.slots("mlp_in")) == ([0, 1, 2] if layout == "layer" else [0])
    assert list(manifest.slots("tokens")) == [0]
