"""Where documents come from: text, JSON lines, Parquet, Hugging Face datasets, and token ids made elsewhere.

A document is a text, or a one-dimensional array of token ids, which is taken as it is.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zarr

from mmcache.errors import CorpusError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

__all__ = ["Document", "read_texts"]

Document: TypeAlias = "str | np.ndarray"

_JSON_LINES = (".jsonl", ".ndjson")


def read_texts(sources: Iterable[str | os.PathLike[str]], *, field: str = "text") -> Iterator[Document]:
    """Read documents, source by source in the order given, in bounded memory.

    Args:
        sources: files and folders, or names of datasets on the Hugging Face hub:
            `.jsonl` one document a line, under `field`; `.parquet` one document a row, in the column `field`;
            `.npy` token ids: `[n]` one document, `[n, length]` one document a row; a folder that
            `Dataset.save_to_disk` made; a one-dimensional zarr array of token ids; any other file is one
            document in UTF-8; what is no path is a hub dataset, `name` or `name:split`, streamed.
        field: the key of the text in JSON lines, Parquet and datasets.

    Raises:
        CorpusError: a source that is not there or cannot be read as said; source and line (or row) are named.
    """
    if isinstance(sources, str | PurePath):
        raise CorpusError(f"sources is one path, {str(sources)!r}: give a sequence of them, [{str(sources)!r}]")
    for source in sources:
        path = Path(source)
        try:
            if path.is_dir():
                yield from _read_folder(path, field)
            elif path.exists():
                yield from _read_file(path, field)
            elif path.suffix or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
                raise CorpusError(f"{path} is not there: give files, folders or the name of a dataset on the hub")
            else:
                yield from _read_hub(str(source), field)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from error
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_file(path: Path, field: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        yield from _read_json_lines(path, field)
    elif suffix == ".parquet":
        yield from _read_parquet(path, field)
    elif suffix == ".npy":
        yield from _read_npy(path)
    else:
        yield path.read_text(encoding="utf-8")


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8-sig"))[field]
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path}, line {number}: not UTF-8 at its byte {error.start}: convert it") from error
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CorpusError(
                    f"{path}, line {number}: no document under {field!r} ({error!r}); choose the key with --field"
                ) from error
            yield _text(text, f"{path}, line {number}", field)


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {field!r} is a {type(value).__name__}: expected text")
    return value


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise CorpusError(f"{path}: reading Parquet needs pyarrow: pip install 'mmcache[extract]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise CorpusError(f"{path} has no column {field!r} (columns: {', '.join(file.schema_arrow.names)})")
            row = 0
            for batch in file.iter_batches(columns=[field], batch_size=256):
                for value in batch.column(0).to_pylist():
                    yield _text(value, f"{path}, row {row}", field)
                    row += 1
    except ArrowInvalid as error:
        raise CorpusError(f"{path} is no Parquet file: {error}") from error


def _ids(array: Any, where: str) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CorpusError(f"{where} is {array.dtype} {list(array.shape)}: expected integers [n] or [n, length]")
    return np.asarray(array)


def _read_npy(path: Path) -> Iterator[np.ndarray]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        # Only the first sentence: numpy goes on to advise loading pickles.
        raise CorpusError(f"{path} is no array of numbers: {str(error).partition('. ')[0]}") from error
    if not isinstance(array, np.ndarray):
        raise CorpusError(f"{path} holds several arrays (it is an .npz): save the one with the token ids by itself")
    for row in array if array.ndim == 2 else [array]:
        yield _ids(row, str(path))


def _read_folder(path: Path, field: str) -> Iterator[Document]:
    if (path / "zarr.json").is_file():
        yield _read_zarr(path)
        return
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        raise CorpusError(f"{path} is a folder, but no dataset (save_to_disk) and no zarr array: give its files")
    datasets = _datasets(str(path))
    dataset = datasets.load_from_disk(str(path))
    if not hasattr(dataset, "column_names") or isinstance(dataset, dict):
        raise CorpusError(f"{path} holds the splits {', '.join(dataset)}: give the folder of one of them")
    yield from _rows(dataset, str(path), field)


def _read_zarr(path: Path) -> np.ndarray:
    try:
        node = zarr.open(path, mode="r")
        ids = None
        if isinstance(node, zarr.Array) and node.ndim == 1 and node.dtype.kind in "iu":
            ids = np.asarray(node[:])
    except Exception as error:  # zarr and its codecs say in many ways that an array is damaged
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
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(f"{name} is no path here, and could not be had from the hub: {error}") from error
    yield from _rows(rows, name, field)


def _rows(dataset: Any, where: str, field: str) -> Iterator[str]:
    names = dataset.column_names
    if names is not None and field not in names:
        raise CorpusError(f"{where} has no column {field!r} (columns: {', '.join(names)}); choose it with --field")
    for number, row in enumerate(dataset):
        yield _text(row[field], f"{where}, row {number}", field)
