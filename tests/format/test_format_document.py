"""FORMAT.md is held to the code: its tables and numbers are read, and compared."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.errors import VersionError
from mmcache.format import dtypes, manifest, names, shard, signed_json
from mmcache.format.manifest import Manifest, array_json
from mmcache.format.shard import Layout
from mmcache.format.token_flags import BOS, FIRST, SPECIAL, known_flags
from mmcache.system import atomic

PAGE = (Path(mmcache.__file__).parent / "FORMAT.md").read_text()
PROSE = " ".join(PAGE.split())


def table(first, *columns):
    """The rows of the one table that has these headings, as dicts."""
    found = []
    for block in PAGE.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if block.startswith("|") and lines[0][0] == first and set(columns) <= set(lines[0]):
            assert all(set(cell) == {"-"} for cell in lines[1])
            assert all(len(line) == len(lines[0]) for line in lines), lines
            found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    (rows,) = found
    return rows


TENSORS = table("tensor", "dtype", "shape", "in")
FIELDS = table("field", "JSON", "default")
STRINGS = table("string", "in", "value")
DTYPES = {row["dtype"]: row for row in table("dtype", "safetensors", "fill bytes")}
ARRAYS = {row["array"]: row for row in table("array", "row shape", "key")}
FEATURES = {row["name"]: row for row in table("name", "state", "what it adds")}


def store_of(layout="token", **fields):
    plain = Manifest("planned", "f" * 32, layout, "float16", {"mlp_in": 10}, (3, 5, 8), **fields)
    return dataclasses.replace(plain.with_geometry(4096, 100), n_tokens=10_000, source={"tokens": "a" * 40})


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 155
    assert f"# The mmcache format, versions {' and '.join(map(str, shard.FORMAT_VERSIONS))}\n" in PAGE
    assert "MUST" in PAGE
    assert "MAY" in PAGE


def test_the_dtypes():
    assert {name: (row["safetensors"], bytes.fromhex(row["fill bytes"])) for name, row in DTYPES.items()} == {
        name: (entry.safetensors, entry.fill) for name, entry in dtypes.BY_NAME.items()
    }
    assert list(DTYPES)[:4] == list(dtypes.ACTIVATION_DTYPES)


def test_the_fields_of_the_root():
    fields = dataclasses.fields(Manifest)
    assert [row["field"] for row in FIELDS] == ["format", "digest", *(field.name for field in fields)]
    said = json.loads(store_of(uses=manifest.NEW_STORES).to_json())["attributes"]["mmcache"]
    assert list(said) == [row["field"] for row in FIELDS]
    assert list(json.loads(store_of().to_json())["attributes"]["mmcache"]) == list(said)[:-1]
    kinds = {int: "integer", str: "string", bool: "boolean", dict: "object", list: "array", type(None): "null"}
    for row, field in zip(FIELDS[2:], fields, strict=True):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = (
            None if required else field.default_factory() if field.default is dataclasses.MISSING else field.default
        )
        assert row["default"] == ("" if required else json.dumps(default)), row
        value = said[field.name]
        assert kinds[type(value)] in row["JSON"] or json.dumps(value) in row["JSON"].split(", "), row
    assert FIELDS[0]["JSON"].split(", ") == [str(version) for version in shard.FORMAT_VERSIONS]


@pytest.mark.parametrize("row", [row for row in FIELDS[2:-1] if row["default"]], ids=lambda row: row["field"])
def test_what_has_a_default_may_be_left_out(row):
    grown = Manifest("grown", "f" * 32, "token", "float16", {"mlp_in": 10}, (0,))
    fields = json.loads(grown.to_json())["attributes"]["mmcache"]
    del fields[row["field"]]
    assert Manifest.from_attributes(fields, Path("acts")) == grown


def test_the_limits_that_the_page_gives():
    limits = {
        "below 2^48": 2**48,
        "below 2^31": 2**31,
        "larger than 16 MiB": manifest.ROOT_LIMIT,
        "within 256 MiB": shard.SHARD_BYTES,
        "within 4 MiB": shard.CHUNK_BYTES,
        "header of 4096": shard.HEADER_BYTES,
        "pages of 4096": shard.PAGE,
        "always 4088": shard._JSON_BYTES,
        "with 64 zeros": len(signed_json._BLANK),
    }
    for words, value in limits.items():
        assert words in PROSE
        number, unit = re.search(r"(\d+(?:\^\d+)?)( MiB)?", words).groups()
        base, _, power = number.partition("^")
        assert value == int(base) ** int(power or 1) * (1 << 20 if unit else 1), words
    for name, limit in (("n_tokens", 2**48), ("layers", 2**31)):
        for value, fine in ((limit - 1, True), (limit, False)):
            said = dataclasses.replace(store_of(), **{name: (value,) if name == "layers" else value})
            assert (said._problem() is None) == fine, (name, value)


def test_the_names_that_the_page_gives():
    said = PROSE.partition("not be one of ")[2].partition(" Names that begin")[0]
    for name in (*names.RESERVED, names.STATISTICS_FOLDER, names.TOKENIZER_FOLDER, signed_json.ROOT):
        assert f"`{name}`" in said
        assert names.site_name_problem(name, 1) is not None
    assert f"in version 2 `{names.DOCUMENTS_FOLDER}`" in said
    assert [names.site_name_problem(names.DOCUMENTS_FOLDER, version) is None for version in (1, 2)] == [True, False]
    assert "at most 200 bytes" in PROSE
    assert names.site_name_problem("x" * 200) is None
    assert names.site_name_problem("x" * 201) is not None
    assert f"1 BOS, 2 special, in a store that uses `{manifest.FIRST_TOKENS}` (see *Version 2*) 4 first" in PROSE
    assert (BOS, SPECIAL, FIRST) == (1, 2, 4)
    assert known_flags(first=False) == {"bos": 1, "special": 2}
    assert known_flags(first=True) == {"bos": 1, "special": 2, "first": 4}
    assert f"drafts `.*{atomic._DRAFT}`" in PROSE


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_the_tensors_of_a_shard(layout):
    store = store_of(layout)
    for array in ("mlp_in", *names.RESERVED):
        spec = store.spec(array)
        # 70 rows: the last inner chunk is not full, so nothing is left out.
        found = Layout(spec, 70)
        site = array == "mlp_in"
        values = {"R": 70, "D": 10, "L": spec.stat_layers, "C": found.chunks, "I": spec.chunks_per_shard}
        expected = []
        for row in TENSORS:
            either = row["tensor"].split(", ")
            if row["in"] == "all" or (row["in"] == "sites" and site) or (row["in"] == "that array" and array in either):
                shapes = row["shape"].split(" or ")
                if len(shapes) == 2:
                    shapes = [shapes[len(spec.row_shape) - (1 if site else 0)]]
                name = array if array in either else row["tensor"]
                code = spec.dtype.safetensors if row["dtype"] == "`dtype`" else row["dtype"]
                expected.append((name, code, shapes[0]))
        assert [(name, code) for name, (code, *_) in found.tensors.items()] == [row[:2] for row in expected]
        for name, _, shape in expected:
            real = found.tensors[name][1]
            if shape != "[to a page]":
                said = [cell.strip() for cell in shape.strip("[]").split(",")]
                said = [16 * values["I"] + 4 if cell == "16·I + 4" else values.get(cell) or int(cell) for cell in said]
                assert list(real) == said, (name, shape)
    assert [row["tensor"] for row in TENSORS if row["tensor"] in shard.STATISTICS] == list(shard.STATISTICS)


def test_the_columns_of_the_norms():
    said = re.search(r"over the Euclidean norms of rows that count: (.*?) \(NaN", PROSE)[1]
    assert tuple(re.findall(r"`(\w+)`", said)) == shard.NORM_COLUMNS
    assert [row["shape"] for row in TENSORS if row["tensor"] == "norms"] == [f"[C, L, {len(shard.NORM_COLUMNS)}]"]


@pytest.mark.parametrize("array", ["mlp_in", *names.RESERVED])
def test_the_strings_of_a_header(array):
    store = store_of("layer")
    site = array == "mlp_in"
    found = store.shard_metadata(array, 2, 1 if site else 0, "b" * 32)
    assert list(found) == [row["string"] for row in STRINGS if row["in"] == "all" or site]
    assert [f"mmcache/{version} " in f"{STRINGS[0]['value']},".replace(",", " ") for version in (1, 2)] == [True, True]
    assert dataclasses.replace(store, uses=("first",)).shard_metadata(array, 2)["format"] == "mmcache/2"
    expected = {
        "format": "mmcache/1",
        "store": store.store,
        "array": array,
        "key": store.shard_key(array, 2, 1),
    }
    if site:
        rest = {"tokens": "a" * 32, "layout": "layer", "layers": "5", "first_token": str(2 * 4096), "ids": "b" * 32}
        assert dataclasses.replace(store, layout="token").shard_metadata(array, 2)["layers"] == "3,5,8"
        assert "ids" not in store.shard_metadata(array, 2)
        assert "tokens" not in dataclasses.replace(store, source={}).shard_metadata(array, 2)
        expected |= rest
    assert found == expected


@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("array", ["a site", *names.RESERVED])
def test_the_arrays(array, layout):
    store, row = store_of(layout), ARRAYS[array]
    name = "mlp_in" if array == "a site" else array
    spec, said = store.spec(name), json.loads(array_json(store, name, 777))
    if array != "a site":
        assert (row["dtype"], row["row shape"]) == (spec.dtype.name, json.dumps(list(spec.row_shape)))
        assert (int(row["shard rows"]), int(row["inner rows"])) == (spec.shard_rows, spec.chunk_rows)
    assert said["data_type"] == spec.dtype.name
    assert row["fill"] == str(said["fill_value"])
    fill = np.frombuffer(spec.dtype.fill, spec.dtype.numpy)[0]
    assert np.array_equal(fill, np.float64(said["fill_value"]).astype(spec.dtype.numpy), equal_nan=array == "a site")
    assert row["dimension names"].split(", ") == said["dimension_names"]
    assert row["key"].replace("SLOT", "2").replace("BLOCK", "7") == store.shard_key(name, 7, 2)
    assert said["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    (codec,) = said["codecs"]
    assert codec["name"] == "sharding_indexed"
    inside = [one["name"] for one in codec["configuration"]["codecs"]]
    assert inside == (["transpose", "bytes"] if array == "a site" and layout == "token" else ["bytes"])
    if inside[0] == "transpose":
        assert f"order `{codec['configuration']['codecs'][0]['configuration']['order']}`" in PROSE
    assert [one["name"] for one in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert codec["configuration"]["index_location"] == "end"
    found = list(said["attributes"]["mmcache"])
    assert found == ["format", "digest", "layers"] if array == "a site" else ["format", "digest"]


def test_the_features_of_version_2():
    assert sorted(name for name, row in FEATURES.items() if not row["state"]) == sorted(manifest.IMPLEMENTED)
    reserved = [name for name, row in FEATURES.items() if row["state"]]
    assert all(row["state"] in ("", "reserved") for row in FEATURES.values())
    assert reserved == ["documents", "flag_names", "scales", "site_layers", "zones"]
    said = json.loads(store_of(uses=("first",)).to_json())["attributes"]["mmcache"]
    assert Manifest.from_attributes(said, "acts").uses == ("first",)
    for name in (*reserved, "what comes later"):
        with pytest.raises(VersionError, match=f"acts uses '{name}' of format version 2, which this library does not"):
            Manifest.from_attributes(said | {"uses": sorted(["first", name]), "more": 1}, "acts")


@pytest.mark.parametrize("version", shard.FORMAT_VERSIONS)
def test_every_file_says_the_version(version):
    store = store_of(uses=("first",) if version == 2 else ())
    texts = [store.to_json(), *(array_json(store, array, 100) for array in ("mlp_in", *names.RESERVED))]
    assert {json.loads(text)["attributes"]["mmcache"]["format"] for text in texts} == {version}
    assert store.shard_metadata("mlp_in", 0)["format"] == f"mmcache/{version}"
