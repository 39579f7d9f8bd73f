"""Documents from every kind of source, and every way in which a source is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr

import mmcache
from mmcache.errors import CorpusError
from mmcache.extraction.corpus import read_texts

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["first\n", "", "zweites: äöü €\n", "third\u2028 one 🦆"]


def read(*sources, **options):
    return list(read_texts(sources, **options))


def refused(message, *sources, **options):
    with pytest.raises(CorpusError, match=message):
        read(*sources, **options)


def write_lines(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def same_ids(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_text_file_is_one_document_and_files_come_in_the_order_given(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    assert read(*(tmp_path / f"{number}.txt" for number in (2, 0, 3, 1))) == [TEXTS[number] for number in (2, 0, 3, 1)]
    # No suffix says what a file is: it is text, and so is a name as a string.
    (tmp_path / "README").write_text("plain")
    assert read(str(tmp_path / "README")) == ["plain"]


def test_text_that_is_not_utf8_is_located(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"x" * 10_000 + "ü".encode("latin-1"))
    refused(r"latin\.txt is not UTF-8 at byte 10000", tmp_path / "latin.txt")


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": text, "title": f"t{n}"}, ensure_ascii=n % 2 == 0) for n, text in enumerate(TEXTS)]
    # Blank lines, Windows line ends and no line end at all behind the last line.
    path = write_lines(tmp_path / "a.jsonl", [lines[0] + "\r", "", lines[1], "   ", *lines[2:]])
    assert read(path) == TEXTS
    assert read(path, field="title") == ["t0", "t1", "t2", "t3"]
    path.rename(tmp_path / "a.NDJSON")
    assert read(tmp_path / "a.NDJSON") == TEXTS


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path):
    assert read(write_lines(tmp_path / "a.jsonl", [b'\xef\xbb\xbf{"text": "x"}'])) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not a line of JSON"),
        ('{"body": "x"}', r"no document under 'text' \(keys: 'body'\); choose the key with --field"),
        ('["x"]', "a list: expected an object with the key 'text' on each line"),
        ('"x"', "a str: expected an object"),
        ("3", "a int: expected an object"),
        ("9" * 5000, "not a line of JSON"),
        ('{"text":' + "[" * 100_000, "not a line of JSON"),
        ('{"text": 3}', "'text' is a int: expected text"),
        ('{"text": null}', "'text' is a NoneType: expected text"),
        (b'{"text": "\xff"}', r"is not UTF-8 at byte 10"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    # Many lines before it, because a decoder that reads ahead counts from its own buffer.
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "fine"}'] * 2000 + [line])
    refused(rf"a\.jsonl, line 2001:? {message}", path)


def test_json_lines_are_read_as_they_are_asked_for(tmp_path):
    documents = read_texts([write_lines(tmp_path / "a.jsonl", ['{"text": "one"}', "broken"])])
    assert next(documents) == "one"
    with pytest.raises(CorpusError, match="line 2"):
        next(documents)


def test_parquet(tmp_path):
    table = pyarrow.table({"text": TEXTS * 200, "body": ["b"] * 800, "n": range(800)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert read(tmp_path / "a.parquet") == TEXTS * 200
    assert read(tmp_path / "a.parquet", field="body") == ["b"] * 800
    refused(r"a\.parquet has no column 'title' \(columns: text, body, n\)", tmp_path / "a.parquet", field="title")
    refused(r"a\.parquet, row 0: 'n' is a int: expected text", tmp_path / "a.parquet", field="n")
    parquet.write_table(pyarrow.table({"text": ["x"] * 300 + [None]}), tmp_path / "null.parquet")
    refused(r"null\.parquet, row 300: 'text' is a NoneType", tmp_path / "null.parquet")
    (tmp_path / "no.parquet").write_bytes(b"not parquet at all")
    refused(r"no\.parquet is no Parquet file", tmp_path / "no.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"needs pyarrow: pip install 'mmcache\[extract\]'", tmp_path / "a.parquet")


def test_npy_holds_one_document_or_one_a_row(tmp_path):
    ids = np.arange(12, dtype=np.uint16)
    np.save(tmp_path / "one.npy", ids)
    same_ids(read(tmp_path / "one.npy"), [ids])
    np.save(tmp_path / "rows.npy", ids.reshape(3, 4).astype(">i4"))
    same_ids(read(tmp_path / "rows.npy"), ids.reshape(3, 4))
    np.save(tmp_path / "none.npy", ids[:0])
    same_ids(read(tmp_path / "none.npy"), [ids[:0]])


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 3, 4), np.int64), np.int64(3), np.ones(3, np.bool_)])
def test_npy_that_is_no_row_of_integers_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    refused(r"a\.npy is .*: expected integers \[n\] or \[n, length\]", tmp_path / "a.npy")


def test_npy_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    refused(r"a\.npy is no array of numbers", tmp_path / "a.npy")


def test_damaged_npy_is_refused(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(1000))
    whole, path = (tmp_path / "whole.npy").read_bytes(), tmp_path / "a.npy"
    for data in (b"", whole[:5], whole[:60], whole[:-8], b"no numpy file" * 20):
        path.write_bytes(data)
        refused(r"a\.npy is no array of numbers", path)
    np.savez(tmp_path / "a.npz", ids=np.arange(3))
    (tmp_path / "a.npz").rename(path)
    refused(r"a\.npy is a zip archive", path)


def test_a_zarr_array_of_ids(tmp_path):
    array = zarr.create_array(tmp_path / "ids", shape=(50,), chunks=(8,), dtype="int32")
    array[:] = np.arange(50)
    same_ids(read(tmp_path / "ids"), [np.arange(50)])


def test_the_tokens_of_another_store(tmp_path):
    with mmcache.create(tmp_path / "store", sites={"x": 4}, n_layers=1, dtype=torch.float32) as writer:
        writer.append([3, 1, 4, 1, 5], {"x": torch.zeros(1, 5, 4)})
        writer.append([9, 2], {"x": torch.zeros(1, 2, 4)})
    same_ids(read(tmp_path / "store" / "tokens"), [[3, 1, 4, 1, 5, 9, 2]])
    refused(r"is a zarr group: give one of its arrays, such as .*store/tokens", tmp_path / "store")
    refused(r"x is float32 \[1, 7, 4\]: expected integers", tmp_path / "store" / "x")


def test_zarr_arrays_of_anything_else_are_refused(tmp_path):
    zarr.create_array(tmp_path / "wide", shape=(2, 3), dtype="int32")
    refused(r"wide is int32 \[2, 3\]: expected integers \[n\]", tmp_path / "wide")
    zarr.create_array(tmp_path / "floats", shape=(2,), dtype="float32")
    refused(r"floats is float32 \[2\]: expected integers \[n\]", tmp_path / "floats")


@pytest.mark.parametrize("said", ["", "no json", "[]", '{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_zarr_metadata_is_refused(tmp_path, said):
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "zarr.json").write_text(said)
    refused("ids cannot be read as a zarr array", tmp_path / "ids")


def test_a_damaged_zarr_chunk_is_refused(tmp_path):
    array = zarr.create_array(tmp_path / "ids", shape=(8,), dtype="int32")
    array[:] = 1
    (tmp_path / "ids" / "c" / "0").write_bytes(b"no chunk")
    refused("ids cannot be read as a zarr array", tmp_path / "ids")


def test_a_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": TEXTS, "body": ["b"] * 4, "n": range(4)}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    assert read(tmp_path / "set") == TEXTS
    assert read(tmp_path / "set", field="body") == ["b"] * 4
    refused(
        r"set has no column 'title' \(columns: text, body, n\); choose it with --field", tmp_path / "set", field="title"
    )
    refused(r"set, row 0: 'n' is a int: expected text", tmp_path / "set", field="n")
    datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("train", "test")}).save_to_disk(
        tmp_path / "splits"
    )
    refused(r"splits holds the splits train, test: give the folder of one of them", tmp_path / "splits")
    assert read(tmp_path / "splits" / "test") == TEXTS


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []

    class Rows(list):
        column_names = None  # as of a stream whose features are not known

    def load_dataset(name, *, split, streaming, trust_remote_code):
        asked.append((name, split, streaming, trust_remote_code))
        return Rows([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("someone/pile:validation", "wikitext") == ["a", "b", "a", "b"]
    assert asked == [("someone/pile", "validation", True, False), ("wikitext", "train", True, False)]


def test_a_dataset_that_the_hub_does_not_have(monkeypatch):
    def load_dataset(name, **_):
        raise FileNotFoundError(f"no dataset {name}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    refused("wikitxt is no path here, and could not be had from the hub: no dataset wikitxt", "wikitxt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"wikitxt is not a path here; .* `pip install 'mmcache\[extract\]'`", "wikitxt")


@pytest.mark.parametrize("name", ["gone.txt", "a/b/gone", "/gone", "./gone", "~/gone"])
def test_what_looks_like_a_path_and_is_not_there_is_no_dataset_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused("gone.* is not there: give files, folders or the name of a dataset on the hub", name)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("x")
    refused("set is a folder, but no dataset .* give its files", tmp_path / "set")


def test_a_file_that_the_system_refuses_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    refused(r"a\.txt cannot be read: Permission denied", tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["corpus.txt", None])
def test_one_path_in_place_of_several_is_refused(tmp_path, source):
    # A string is a sequence too, of one-letter names.
    with pytest.raises(CorpusError, match=r"sources is one path, '.*': give a sequence of them"):
        list(read_texts(source or tmp_path))
