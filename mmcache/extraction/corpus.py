"""`read_texts`: read documents from text, JSON lines, Parquet, Hugging Face datasets, and arrays of token ids.

A document is a text, or a one-dimensional array of token ids, which is not tokenised.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zarr

from mmcache.errors import CorpusError
from mmcache.system.arguments import shown
from mmcache.system.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["HEAD", "Document", "check_kind", "check_size", "check_sources", "read_texts"]

# Bytes at the start of a file by which its kind is recognised.
HEAD = 4096

_UNPACK = "unpack it first"
_TEXT = 'write its texts one a line as .jsonl, {"text": …}'
_TABLE = "save it as Parquet, such as by `pandas.read_csv(path).to_parquet(…)`, and name the column of texts by --field"
_IDS = "read it with its dtype and save it as .npy: numpy.save('ids.npy', numpy.fromfile(path, 'uint16'))"

_TENSORS = "save token ids as .npy, texts as .jsonl"
_JSON = "write it as .jsonl, one object a line, such as by `jq -c '.[]'`; rename it if that is what it is"
_ARROW = "give the folder that Dataset.save_to_disk made, or save it as Parquet"

# Suffixes of files that are no plain text: what they are, and what to do.
_NAMES: dict[str, tuple[str, str]] = {
    suffix: (what, remedy)
    for suffixes, what, remedy in (
        (".json .geojson .ipynb", "a JSON document", _JSON),
        (".csv .tsv .tab .psv", "a table", _TABLE),
        (".xls .xlsx .ods", "a table", _TABLE.replace("read_csv", "read_excel")),
        (".arrow .feather .ipc", "an Arrow file", _ARROW),
        (".bin .idx .memmap", "binary", _IDS),
        (".npz", "several arrays", "save the one with the token ids by itself, with numpy.save"),
        (".gz .tgz .zst .zstd .xz .bz2 .lz4 .lzma .br .zip .7z .rar .tar", "an archive or compressed", _UNPACK),
        (".pt .pth .ckpt .pkl .pickle .joblib .safetensors .gguf .onnx", "a file of tensors or objects", _TENSORS),
        (".h5 .hdf5 .msgpack .mat", "a file of arrays", _TENSORS),
        (".db .sqlite .sqlite3 .lmdb .tfrecord .mds", "a database", _TEXT),
        (".pdf .doc .docx .odt .rtf .epub", "a formatted document", "save it as plain text"),
    )
    for suffix in suffixes.split()
}

# First bytes (regular expressions) of files that are no text: what they are, and what to do.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\x1f\x8b", "gzip", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "Zstandard", _UNPACK),
    (rb"\xfd7zXZ\x00", "xz", _UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2", _UNPACK),
    (rb"\x04\x22\x4d\x18", "LZ4", _UNPACK),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive, as torch.save and numpy.savez write too", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"PAR[1E][\x00-\x08\x0e-\x1f\x80-\xff]", "Parquet", "name it .parquet"),
    (rb"ARROW1\x00", "an Arrow file", _ARROW),
    (rb"\x93NUMPY", "a numpy array", "name it .npy"),
    (rb"\x89HDF\r\n", "HDF5", _TENSORS),
    (rb".{4}\x00{4}\{\"", "safetensors", "save token ids as .npy"),
    (rb"\x80[\x02-\x05]", "a pickle", _TENSORS),
    (rb"SQLite format 3\x00", "a database", _TEXT),
    (rb"%PDF-", "PDF", "save it as plain text"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32", "convert it to UTF-8, such as by `iconv -f UTF-32 -t UTF-8`"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it to UTF-8, such as by `iconv -f UTF-16 -t UTF-8`"),
    (rb"(?:[^\x00]\x00){4}", "UTF-16, or 16-bit token ids", f"convert text to UTF-8; of token ids, {_IDS}"),
    (rb"(?:\x00[^\x00]){4}", "UTF-16", "convert it to UTF-8, such as by `iconv -f UTF-16BE -t UTF-8`"),
)
# Control characters other than white space, backspace and escape: text has hardly any.
_CONTROLS = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")


def check_kind(path: Path, head: bytes, wanted: str | None = None) -> None:
    """Refuse a file that is of another kind than it would be read as.

    Args:
        path: The file.
        head: Its first HEAD bytes, or all if there are fewer.
        wanted: The kind by its name; None for text, unless its name says otherwise.

    Raises:
        CorpusError: It is of another kind; says which, and what to do.
    """
    if wanted is None and path.suffix.lower() in _NAMES:
        what, remedy = _NAMES[path.suffix.lower()]
        raise CorpusError(f"{path} is {what} by its name, and is not read as plain text: {remedy}")
    wanted = wanted or "text"
    for beginning, what, remedy in _BEGINNINGS:
        if re.match(beginning, head, re.DOTALL):
            raise CorpusError(f"{path} is {what} by its first bytes, not {wanted}: {remedy}")
    found = _CONTROLS.findall(head)
    if b"\0" in found or len(found) > len(head) / 20:
        raise CorpusError(
            f"{path} is binary, not {wanted}: {len(found)} of its first {len(head)} bytes are control characters. "
            f"If these are token ids, {_IDS}"
        )


Document: TypeAlias = "str | np.ndarray"

_JSON_LINES = (".jsonl", ".ndjson")
# Suffixes of files that are not read as text: their kind, and their first bytes.
_KINDS = {
    **dict.fromkeys(_JSON_LINES, ("JSON lines", b"")),
    ".parquet": ("Parquet", b"PAR"),
    ".npy": ("a numpy array", b"\x93NUMPY"),
}
# Memory that a tokenizer needs per byte of one text: measured, 60 to 270 for text of all kinds, 450 for blanks.
_TOKENIZING = 320
_SPLIT = 'put its texts one a line into a .jsonl, as {"text": …}, or cut the file, such as by `split -C 16M`'


def read_texts(sources: Iterable[str | os.PathLike[str]], *, field: str = "text") -> Iterator[Document]:
    """Read documents, source by source in the order given, in bounded memory.

    Args:
        sources: files and folders, or names of datasets on the Hugging Face hub:
            `.jsonl` one document per line, under `field`; `.parquet` one per row, in the column `field`;
            `.npy` token ids: `[n]` one document, `[n, length]` one document per row; a folder that
            `Dataset.save_to_disk` made; a one-dimensional zarr array of token ids; any other file is one document of
            plain text in UTF-8; anything that is no path is a hub dataset, `name` or `name:split`, streamed.
        field: the key of the text in JSON lines, Parquet and datasets.

    Raises:
        CorpusError: a source does not exist, is not what its name says, or is of a kind that is not read (a table, a
            JSON document, an archive, …), or memory does not suffice for a document; names source and line or row.
    """
    for name, path in _named(sources):
        with _explained(path):
            if path.is_dir():
                yield from _read_folder(path, field)
            elif _is_there(name, path):
                yield from _read_file(path, field)
            else:
                yield from _read_hub(name, field)


def check_sources(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse files that do not exist or are of a kind that is not read; a quick check before a model is loaded.

    Raises:
        CorpusError: As `read_texts`.
    """
    for name, path in _named(sources):
        with _explained(path):
            if _is_there(name, path) and path.is_file():
                with path.open("rb") as file:
                    _check_file(path, file.peek(HEAD)[:HEAD])


def _named(sources: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, Path]]:
    if isinstance(sources, str | bytes | PurePath):
        raise CorpusError(f"sources is one path, {str(sources)!r}: give a sequence of them, [{str(sources)!r}]")
    try:
        found = iter(sources)
    except TypeError as error:
        raise CorpusError(f"sources is {shown(sources)}: expected a list of files, folders or datasets") from error
    for source in found:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
        if not isinstance(name, str) or not name or "\0" in name:
            raise CorpusError(f"{source!r} is no source of texts: give files, folders or names of datasets on the hub")
        yield name, Path(name)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_there(name: str, path: Path) -> bool:
    """Whether the file or folder exists. If not, refuse a name that cannot be a dataset on the hub."""
    there = path.exists()
    if not there and (path.suffix or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise CorpusError(f"{path} is not there: give files, folders or the name of a dataset on the hub")
    return there


def check_size(size: int, where: str, remedy: str) -> None:
    """Refuse a text of `size` bytes if there is not enough memory to tokenise it.

    Raises:
        CorpusError: with its size, the memory needed and the memory free.
    """
    free = available_memory()
    if size * _TOKENIZING > free:
        raise CorpusError(
            f"{where} is one text of {size / 1e6:,.1f} MB, which takes about {size * _TOKENIZING / 1e9:,.1f} GB to "
            f"tokenise, and {free / 1e9:,.1f} GB are free: {remedy}"
        )


def _check_file(path: Path, head: bytes) -> None:
    """Refuse a file that is not what its name says, or of a kind that is not read."""
    wanted, magic = _KINDS.get(path.suffix.lower(), (None, b""))
    if not (magic and head.startswith(magic)):
        check_kind(path, head, wanted)


def _read_file(path: Path, field: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if path.is_block_device() or path.is_char_device():
        raise CorpusError(f"{path} is a device: give a file")
    with path.open("rb") as file:
        # A pipe can be read only once: `peek` leaves the bytes in the buffer.
        _check_file(path, file.peek(HEAD)[:HEAD])
        if suffix in _JSON_LINES:
            yield from _read_json_lines(file, path, field)
        elif suffix == ".parquet":
            yield from _read_parquet(path, field)
        elif suffix == ".npy":
            yield from _read_npy(path)
        else:
            yield _read_text(file, path)


def _read_text(file: IO[bytes], path: Path) -> str:
    check_size(os.fstat(file.fileno()).st_size, str(path), _SPLIT)
    # A pipe has no size, and a file may grow.
    most = available_memory() // _TOKENIZING
    data = file.read(most + 1)
    check_size(len(data), str(path), _SPLIT)
    if (at := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path} is binary, not text: it has a zero at byte {at}")
    # Line endings as in Python's text mode.
    return _decoded(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")


def _decoded(data: bytes, where: str, encoding: str = "utf-8") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where} is not UTF-8 at byte {error.start}: convert it first") from error


def _read_json_lines(file: IO[bytes], path: Path, field: str) -> Iterator[str]:
    number = 0
    while line := file.readline(most := available_memory() // _TOKENIZING + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) == most:
            check_size(most, where, "cut its text into several documents")
        if line.strip():
            yield _text(_value(_decoded(line, where, "utf-8-sig"), where, field, first=number == 1), where, field)


def _value(line: str, where: str, field: str, *, first: bool) -> object:
    """The value of the key `field` in a line of JSON."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        whole = "; if the file is one JSON document, write it one object a line, such as by `jq -c '.[]'`"
        raise CorpusError(f"{where}: not a line of JSON ({error!r}){whole if first else ''}") from error
    if not isinstance(found, dict):
        raise CorpusError(f"{where}: a {type(found).__name__}: expected an object with the key {field!r} on each line")
    if field not in found:
        keys = ", ".join(map(repr, found))
        raise CorpusError(f"{where}: no document under {field!r} (keys: {keys[:200]}); choose the key with --field")
    return found[field]


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {field!r} is a {type(value).__name__}: expected text")
    return value


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise CorpusError(f"{path}: reading Parquet needs pyarrow: pip install 'mmcache[extract]'") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise CorpusError(f"{path} has no column {field!r} (columns: {', '.join(file.schema_arrow.names)})")
            for batch in file.iter_batches(columns=[field], batch_size=256):
                for value in batch.column(0):
                    yield _text(value.as_py(), f"{path}, row {row}", field)
                    row += 1
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, row {row}: not UTF-8 at byte {error.start}: convert it first") from error
    except (ArrowException, OSError) as error:
        raise CorpusError(f"{path} is no Parquet file, or damaged at row {row} or later: {error}") from error


def _ids(array: Any, where: str) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CorpusError(f"{where} is {array.dtype} {list(array.shape)}: expected integers [n] or [n, length]")
    return np.asarray(array)


def _read_npy(path: Path) -> Iterator[np.ndarray]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy and Python's parser raise many kinds of errors for a damaged header
        # Only the first sentence: the next ones advise loading pickles.
        raise CorpusError(f"{path} is no array of numbers: {str(error).partition('. ')[0]}") from error
    for row in array if array.ndim == 2 else [array]:
        yield _ids(row, str(path))


def _read_folder(path: Path, field: str) -> Iterator[Document]:
    if (path / "zarr.json").is_file():
        yield _read_zarr(path)
        return
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        raise CorpusError(f"{path} is a folder, but no dataset (save_to_disk) and no zarr array: give its files")
    datasets = _datasets(str(path))
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds of errors for a damaged folder
        raise CorpusError(f"{path} cannot be read as a dataset of save_to_disk: {error!r}") from error
    if not hasattr(dataset, "column_names") or isinstance(dataset, dict):
        raise CorpusError(f"{path} holds the splits {', '.join(dataset)}: give the folder of one of them")
    yield from _rows(dataset, str(path), field)


def _check_ids(size: int, path: Path) -> None:
    # Reading, checking and cutting them needs about three copies.
    if 3 * size > available_memory():
        raise CorpusError(
            f"{path} is one document of {size / 1e9:,.1f} GB of token ids, and {available_memory() / 1e9:,.1f} GB of "
            f"memory are free: save them as .npy, [n, length], which is read in place"
        )


def _read_zarr(path: Path) -> np.ndarray:
    try:
        node = zarr.open(path, mode="r")
        ids = None
        if isinstance(node, zarr.Array) and node.ndim == 1 and node.dtype.kind in "iu":
            _check_ids(node.size * node.dtype.itemsize, path)
            ids = np.asarray(node[:])
    except CorpusError:
        raise
    except Exception as error:  # zarr and its codecs raise many kinds of errors for a damaged array
        raise CorpusError(f"{path} cannot be read as a zarr array: {error!r}") from error
    if not isinstance(node, zarr.Array):
        raise CorpusError(f"{path} is a zarr group: give one of its arrays, such as {path / 'tokens'}")
    if ids is None:
        raise CorpusError(f"{path} is {node.dtype} {list(node.shape)}: expected integers [n]")
    return ids


def _datasets(where: str) -> Any:
    try:
        import datasets  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise CorpusError(f"{where}: datasets are read with `pip install 'mmcache[extract]'`") from error
    return datasets


def _read_hub(name: str, field: str) -> Iterator[str]:
    datasets = _datasets(f"{name} is not a path here; as a dataset on the hub")
    repository, _, split = name.partition(":")
    try:
        # Releases before 4 would ask on the terminal whether to run the dataset's own code.
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True, trust_remote_code=False)
    except Exception as error:  # datasets, its readers and the hub's client raise many kinds of errors
        raise CorpusError(f"{name} is no path here, and could not be had from the hub: {error}") from error
    yield from _rows(rows, name, field)


def _rows(dataset: Any, where: str, field: str) -> Iterator[str]:
    names = dataset.column_names
    if names is not None and field not in names:
        raise CorpusError(f"{where} has no column {field!r} (columns: {', '.join(names)}); choose it with --field")
    number = 0
    try:
        for row in dataset:
            yield _text(row.get(field), f"{where}, row {number}", field)
            number += 1
    except CorpusError:
        raise
    except Exception as error:  # as above, also for lost connections
        raise CorpusError(f"{where}, row {number}: cannot be read: {error!r}") from error
