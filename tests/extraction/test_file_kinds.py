"""Files that are not what they are read as: by name and by content; and honest text under any name, which is read."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mmcache.cli import extract, main
from mmcache.errors import CorpusError
from mmcache.extraction import corpus
from mmcache.extraction.corpus import read_texts
from stores_and_processes import widened

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

_PROSE = "Honest prose, with äöü and \x1b[1mcolour\x1b[0m,\tand\fpages.\n"


def in_memory(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def database():
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table texts (text)")
        return connection.serialize()


TABLE = pyarrow.table({"text": ["a", "b"]})
# What there is, what it is called where it is refused, and its bytes.
BINARY = {
    "gzip": ("gzip", gzip.compress(b"text")),
    "bzip2": ("bzip2", bz2.compress(b"text")),
    "empty bzip2": ("bzip2", bz2.compress(b"")),
    "xz": ("xz", lzma.compress(b"text")),
    "zstd": ("Zstandard", pyarrow.compress(b"text" * 9, codec="zstd", asbytes=True)),
    "lz4": ("LZ4", b"\x04\x22\x4d\x18" + b"abcdefgh"),
    "zip": ("a zip archive", in_memory(zipped)),
    "7z": ("an archive", b"7z\xbc\xaf\x27\x1c\0\4"),
    "tar": ("a tar archive", in_memory(tarred)),
    "parquet": ("Parquet", in_memory(lambda file: parquet.write_table(TABLE, file))),
    "numpy": ("a numpy array", in_memory(lambda file: np.save(file, np.arange(3)))),
    "npz": ("a zip archive", in_memory(lambda file: np.savez(file, a=np.arange(3)))),
    "torch": ("a zip archive", in_memory(lambda file: torch.save(torch.ones(2), file))),
    "pickle": ("a pickle", pickle.dumps({"text": "a"})),
    "safetensors": ("safetensors", struct.pack("<Q", 16) + b'{"a":{}}        '),
    "arrow": ("an Arrow file", b"ARROW1\0\0" + bytes(8)),
    "hdf5": ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(8)),
    "sqlite": ("a database", database()),
    "pdf": ("PDF", b"%PDF-1.7\n1 0 obj\n"),
    "utf-16": ("UTF-16", "text of two bytes a letter".encode("utf-16")),
    "utf-16-le": ("UTF-16", "text".encode("utf-16-le")),
    "utf-16-be": ("UTF-16", "text".encode("utf-16-be")),
    "utf-32": ("UTF-32", "text".encode("utf-32")),
    "ids of 16 bits": ("binary", np.arange(50, dtype=np.uint16).tobytes()),
    "ids of 8 bits": ("binary", np.arange(1, 60, dtype=np.uint8).tobytes()),
    "ids of 32 bits": ("binary", np.arange(100, 400, dtype=np.int32).tobytes()),
    "png": ("binary", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "program": ("binary", b"\x7fELF\2\1\1\0"),
}
WANTED = {".txt": "text", "": "text", ".md": "text", ".jsonl": "JSON lines", ".parquet": "Parquet", ".npy": "a numpy"}


@pytest.mark.parametrize("suffix", WANTED)
@pytest.mark.parametrize("kind", BINARY)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix, kind):
    if (suffix, kind) in {(".parquet", "parquet"), (".npy", "numpy")}:
        return
    what, data = BINARY[kind]
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"corpus{suffix} is {what}.*not {WANTED[suffix]}.*: "):
        list(read_texts([path]))


@pytest.mark.parametrize(
    "suffix",
    [".json", ".JSON", ".csv", ".tsv", ".bin", ".npz", ".jsonl.gz", ".txt.zst", ".zip", ".pt", ".safetensors", ".pkl"],
)
def test_some_names_say_that_a_file_is_no_plain_text(tmp_path, suffix):
    # Whatever is in it: a list of texts is not one text with brackets, and a table has columns.
    path = tmp_path / f"corpus{suffix}"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(CorpusError, match=r"corpus\.\S+ is .* by its name, and is not read as plain text: \w+"):
        list(read_texts([path]))


@pytest.mark.parametrize(
    "name", ["README", "a.txt", "a.md", "a.py", "a.unknown", "a.text.1", ".hidden", "a.html", "BZhello"]
)
@pytest.mark.parametrize(
    "text", [_PROSE, "BZh9 is how bzip2 begins", "PAR1 and PK and ARROW1", "", "{}", "a" * 5000, "\x00"[:0]]
)
def test_honest_text_is_read_under_any_other_name(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(read_texts([tmp_path / name])) == [text]


def test_a_zero_far_into_a_text_is_located(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\0")
    with pytest.raises(CorpusError, match=r"a\.txt is binary, not text: it has a zero at byte 100000"):
        list(read_texts([tmp_path / "a.txt"]))


def test_line_ends_are_those_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\rthree\n\rfour\u2028\u0085".encode())
    assert list(read_texts([tmp_path / "a.txt"])) == [(tmp_path / "a.txt").read_text(encoding="utf-8")]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("whole", [[{"text": "a"}], {"data": [{"text": "a"}]}])
def test_a_json_document_called_jsonl_is_refused(tmp_path, whole, indent):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(whole, indent=indent))
    with pytest.raises(
        CorpusError, match=r"a\.jsonl, line 1: (not a line of JSON .* `jq -c|a list: expected|no document)"
    ):
        list(read_texts([path]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_that_memory_does_not_suffice_for_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "available_memory", lambda: 320 * 1000)
    path = tmp_path / name
    path.write_text(json.dumps({"text": "x" * 900}))
    assert len(list(read_texts([path]))) == 1
    path.write_text('{"text": "fine"}\n' + json.dumps({"text": "x" * 1000}))
    with pytest.raises(
        CorpusError, match=rf"{name}(, line 2)? is one text of .* MB, which takes about .* GB .* are free: "
    ):
        list(read_texts([path]))


def test_a_text_larger_than_memory_is_refused_unread(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"text" * 2000)
        file.truncate(1 << 40)  # no blocks are taken
    with pytest.raises(
        CorpusError, match=r"is one text of 1,099,511\.6 MB, which takes about 351,843\.7 GB to tokenise"
    ):
        list(read_texts([tmp_path / "a.txt"]))


def test_a_pipe_is_read_like_a_file(tmp_path):
    # As of a shell's `<(zcat corpus.txt.gz)`.
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(_PROSE * 10_000, encoding="utf-8"))
    thread.start()
    assert list(read_texts([tmp_path / "pipe"])) == [_PROSE * 10_000]
    thread.join()


@pytest.mark.parametrize("source", [3, None, b"a.txt", "", "a\0.txt", 1.5, ["a.txt"]])
def test_what_is_no_name_is_refused(source):
    with pytest.raises(CorpusError, match="is no source of texts: give files, folders or names of datasets"):
        list(read_texts([source]))


@pytest.mark.parametrize("source", ["/dev/zero", "x" * 300, "/" + "x/" * 4000])
def test_what_cannot_be_read_is_named(source):
    with pytest.raises(CorpusError, match=r"is a device: give a file|cannot be read: File name too long"):
        list(read_texts([source]))


def test_the_command_line_says_it_in_one_line_before_it_loads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "a.csv").write_text("text\nhello\n")
    for source, message in (
        ("a.csv", "is a table by its name"),
        ("gone.txt", "is not there"),
        ("a.csv/b", "is not there"),
    ):
        arguments = ["extract", "demo", str(tmp_path / source), "--out", str(tmp_path / "store")]
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert f"{source} {message}" in done.stderr
    assert not (tmp_path / "store").exists()


def outcome(path):
    """The documents of a source, or how it was refused."""
    try:
        return list(read_texts([path]))
    except CorpusError as error:
        return str(error)


def _damaged(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, size = rng.integers(len(data)), rng.integers(1, 40)
        match rng.integers(3):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                del data[at : at + size]
            case _:
                data[at:at] = rng.bytes(size)
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl", ".txt"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, request, suffix):
    whole = {
        ".npy": BINARY["numpy"][1],
        ".parquet": in_memory(lambda file: parquet.write_table(pyarrow.table({"text": ["ä" * 50] * 9}), file)),
        ".jsonl": b'{"text": "\\u00e4", "n": 1}\n' * 9,
        ".txt": _PROSE.encode() * 3,
    }[suffix]
    rng, path = np.random.default_rng(0), tmp_path / f"a{suffix}"
    for _ in range(widened(request, (150, 5000))):
        path.write_bytes(_damaged(whole, rng))
        found = outcome(path)
        assert isinstance(found, list) or str(path) in found


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_of_save_to_disk_is_read_or_refused_by_name(tmp_path, request):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["ä" * 50] * 9}).save_to_disk(tmp_path / "set")
    rng = np.random.default_rng(0)
    for file in sorted((tmp_path / "set").iterdir()):
        whole = file.read_bytes()
        for _ in range(widened(request, (6, 300))):
            file.write_bytes(_damaged(whole, rng))
            found = outcome(tmp_path / "set")
            assert isinstance(found, list) or str(tmp_path / "set") in found
        file.write_bytes(whole)
