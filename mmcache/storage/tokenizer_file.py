"""The tokenizer that a store keeps as JSON, so that its tokens can be decoded on any machine.

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
# Today's largest tokenizers take 35 MB.
_LIMIT = 1 << 28
# How to restore the file: in a store without a plan, and in a planned one.
_AGAIN = ("put back the file that was there", "run the same `mmcache extract` again, or restore it")


def tokenizer_text(tokenizer: Any) -> str | None:
    """A tokenizer's JSON; None for one implemented in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def tokenizer_digest(text: str, special: Sequence[int]) -> str:
    """Digest of a tokenizer's text and its special ids, in order."""
    return hashlib.sha256(f"{text}\n{json.dumps(list(special))}".encode()).hexdigest()


def tokenizer_identity(tokenizer: Any, special: Sequence[int]) -> str:
    """Digest of a tokenizer: its JSON, or its vocabulary if it has none; and the special ids."""
    text = tokenizer_text(tokenizer) or json.dumps(sorted(tokenizer.get_vocab().items()))
    return tokenizer_digest(text, special)


def tokenizer_source(text: str | None) -> dict[str, int]:
    """The entry of a store's `source` for its tokenizer file, from `tokenizer_text`; empty if there is none."""
    return {} if text is None else {"tokenizer_bytes": len(text.encode())}


def save_tokenizer(path: Path, text: str | None, *, durable: bool = True) -> None:
    """Write `tokenizer_text` into a store, if there is one; blocks until it is written and, if `durable`, synced."""
    if text is None:
        return
    make_folder(path, TOKENIZER_FOLDER)
    remove_drafts(path, TOKENIZER_FOLDER)
    publish(path, TOKENIZER, text.encode(), durable=durable)


def restore_tokenizer(path: Path, manifest: Manifest, tokenizer: Any) -> None:
    """Write a planned store's tokenizer file again if it is missing, as after a repair.

    The plan's identity ensures that the tokenizer is the same.
    """
    if "tokenizer_bytes" in manifest.source and Path(TOKENIZER).name not in list_names(path / TOKENIZER_FOLDER):
        save_tokenizer(path, tokenizer_text(tokenizer))


def read_tokenizer(path: Path, manifest: Manifest) -> str | None:
    """The JSON of a store's tokenizer, its digest compared; None if the store keeps none.

    Raises:
        StoreNotFoundError: the root names a tokenizer file, but it is missing.
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
