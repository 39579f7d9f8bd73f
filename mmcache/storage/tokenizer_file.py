"""The tokenizer, kept in a store as its own JSON: a store explains itself wherever it is.

`tokenizer/tokenizer.json` is what Hugging Face's `tokenizers` reads. Its bytes are pinned by the tokenizer's digest,
which is in the root, in the store's identity.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcache.errors import CorruptError
from mmcache.format.names import TOKENIZER_FOLDER
from mmcache.system.atomic import publish, remove_drafts
from mmcache.system.files import list_names, make_folder, read_file
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.format.manifest import Manifest

__all__ = [
    "TOKENIZER",
    "read_tokenizer",
    "restore_tokenizer",
    "save_tokenizer",
    "tokenizer_digest",
    "tokenizer_identity",
    "tokenizer_source",
    "tokenizer_text",
]

TOKENIZER = f"{TOKENIZER_FOLDER}/tokenizer.json"
# The largest vocabularies of today take 35 MB.
_LIMIT = 1 << 28
# How it comes back, where no plan makes it and where one does.
_AGAIN = ("put back the file that was there", "run the same `mmcache extract` again, or restore it")


def tokenizer_text(tokenizer: Any) -> str | None:
    """Give a tokenizer's own JSON; None for one that is Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def tokenizer_digest(text: str, special: Sequence[int]) -> str:
    """Hash what a tokenizer does, and which of its ids are special, in order."""
    return hashlib.sha256(f"{text}\n{json.dumps(list(special))}".encode()).hexdigest()


def tokenizer_identity(tokenizer: Any, special: Sequence[int]) -> str:
    """Hash of what a tokenizer does: its own JSON where it has one, its vocabulary otherwise; and the special ids."""
    text = tokenizer_text(tokenizer) or json.dumps(sorted(tokenizer.get_vocab().items()))
    return tokenizer_digest(text, special)


def tokenizer_source(tokenizer: Any) -> dict[str, int]:
    """What a store's `source` says of the file that keeps its tokenizer; empty where `save_tokenizer` writes none."""
    text = tokenizer_text(tokenizer)
    return {} if text is None else {"tokenizer_bytes": len(text.encode())}


def save_tokenizer(path: Path, tokenizer: Any, *, durable: bool = True) -> None:
    """Keep a tokenizer in a store, if it has a JSON; blocks until it is written, and durable where that is asked."""
    text = tokenizer_text(tokenizer)
    if text is None:
        return
    make_folder(path, TOKENIZER_FOLDER)
    remove_drafts(path, TOKENIZER_FOLDER)
    publish(path, TOKENIZER, text.encode(), durable=durable)


def restore_tokenizer(path: Path, manifest: Manifest, tokenizer: Any) -> None:
    """Keep it again where it is gone, as after a repair; the plan's identity says that it is the same one."""
    if "tokenizer_bytes" in manifest.source and Path(TOKENIZER).name not in list_names(path / TOKENIZER_FOLDER):
        save_tokenizer(path, tokenizer)


def read_tokenizer(path: Path, manifest: Manifest) -> str | None:
    """Read the tokenizer that a store keeps, its digest compared; None if it keeps none.

    Raises:
        StoreNotFoundError: the store says that it keeps one, and it is not there.
        CorruptError: it is damaged.
    """
    size, identity = manifest.source.get("tokenizer_bytes"), manifest.source.get("identity")
    if size is None:
        return None
    if type(size) is not int or not 0 < size <= _LIMIT or not isinstance(identity, dict):
        raise CorruptError(f"{path} says that its tokenizer has {size!r} bytes: expected 1 to {_LIMIT}, or none")
    check_path(path, TOKENIZER_FOLDER)
    data = read_file(path / TOKENIZER, size)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if tokenizer_digest(text, manifest.special_tokens) != identity.get("tokenizer"):
        raise CorruptError(
            f"{path / TOKENIZER} is not the tokenizer that the store was made with: set it aside, as `mmcache repair` "
            f"does, and {_AGAIN[manifest.kind == 'planned']}"
        )
    return text
