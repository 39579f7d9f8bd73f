"""What kind of file this is, by its name and by its first bytes: so that none is read as the text that it is not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mmcache.errors import CorpusError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HEAD", "check_kind"]

# Bytes at the beginning of a file that say what it is.
HEAD = 4096

_UNPACK = "unpack it first"
_TEXT = 'write its texts one a line as .jsonl, {"text": …}'
_TABLE = "save it as Parquet, such as by `pandas.read_csv(path).to_parquet(…)`, and name the column of texts by --field"
_IDS = "read it with its dtype and save it as .npy: numpy.save('ids.npy', numpy.fromfile(path, 'uint16'))"

_TENSORS = "save token ids as .npy, texts as .jsonl"
_JSON = "write it as .jsonl, one object a line, such as by `jq -c '.[]'`; rename it if that is what it is"
_ARROW = "give the folder that Dataset.save_to_disk made, or save it as Parquet"

# Kinds that are known by name and are no plain text: what they are, and what to do.
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

# What files begin with that are no text, and what to do.
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
# Below 32 and no white space, backspace or escape: text has hardly any.
_CONTROLS = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")


def check_kind(path: Path, head: bytes, wanted: str | None = None) -> None:
    """Refuse a file that is of another kind than it is read as.

    Args:
        path: The file.
        head: Its first bytes, HEAD of them or all there are.
        wanted: What its name says that it is; None for text, unless its name says otherwise.

    Raises:
        CorpusError: What it is, and what to do.
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
