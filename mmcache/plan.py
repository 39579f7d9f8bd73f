"""The plan of an extraction: everything that is known before the first forward pass, written down first.

Tokens and sequences are stored, every array's shape is fixed, and from then on a shard's presence is its commit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmcache.columns import BOS, SPECIAL, Column
from mmcache.corpus import Contexts
from mmcache.dtypes import BY_NAME
from mmcache.errors import CorpusError, DiskFullError, ReadOnlyError
from mmcache.files import FolderLock, free_bytes, list_names, make_folder, publish
from mmcache.format import Layout
from mmcache.geometry import shard_rows
from mmcache.grown import claim
from mmcache.manifest import RESERVED, ROOT, Manifest, array_json, read_manifest
from mmcache.provenance import compare
from mmcache.shards import missing_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from mmcache.corpus import Context

__all__ = ["Settings", "bytes_to_write", "check_room", "open_plan"]

# Tokens between two writes of the columns while planning: 64 MiB of ids.
_TOKENS_A_WRITE = 1 << 24


@dataclass(frozen=True)
class Settings:
    """What an extraction was asked for, its model and tokenizer already looked at.

    `identity`, `numerics` and `record` are as `provenance` says; `identity` gains the corpus once it was read.
    """

    identity: dict[str, Any]
    numerics: dict[str, Any]
    record: dict[str, Any]
    widths: dict[str, int]
    layers: tuple[int, ...]
    dtype: str
    layout: Literal["layer", "token"]
    shard_tokens: int | None
    context_length: int
    max_tokens: int | None
    special_tokens: tuple[int, ...]


def open_plan(
    path: Path,
    settings: Settings,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    accept_numerics: bool,
    tokenised: Callable[[int], None],
) -> Manifest:
    """Give the plan at `path`: a new one, or the one that is there if it was made with the same settings.

    Args:
        path: the store.
        settings: what is asked for.
        tokenizer: a Hugging Face tokenizer.
        texts: the documents; read once, to be tokenised or to be compared.
        accept_numerics: go on although numerics differ, and record it.
        tokenised: called now and then with the tokens so far.

    Raises:
        PlanMismatchError: the store was planned with other settings, which are listed.
        StoreExistsError, ReadOnlyError: the path is taken by something that is no extraction.
        LockedError: another process is planning it at the moment.
        CorpusError: the corpus cannot be read, or has no tokens.
    """
    if ROOT not in list_names(path):
        claim(path, tuple(settings.widths))
    else:
        manifest = _known(path, settings)
        if manifest.n_tokens is not None:
            return _resumed(path, manifest, settings, texts, accept_numerics=accept_numerics)
    make_folder(path)
    lock = FolderLock(path)
    try:
        if ROOT in list_names(path) and _known(path, settings).n_tokens is not None:
            # Planned by another worker while this one waited for nothing: the texts are not read yet.
            return _resumed(path, read_manifest(path), settings, texts, accept_numerics=accept_numerics)
        return _planned(path, settings, tokenizer, texts, tokenised)
    finally:
        lock.release()


def _known(path: Path, settings: Settings) -> Manifest:
    """Read the plan that is there, and compare what is known before the corpus is read."""
    manifest = read_manifest(path)
    if manifest.kind != "planned":
        raise ReadOnlyError(f"{path} holds a store that was not made by extract: choose another path")
    stored = {name: value for name, value in manifest.source["identity"].items() if name != "corpus"}
    compare(path, "identity", stored, settings.identity, "Give the settings of the store, or choose another path.")
    return manifest


def _resumed(
    path: Path, manifest: Manifest, settings: Settings, texts: Iterable[str], *, accept_numerics: bool
) -> Manifest:
    source = manifest.source
    corpus = source["identity"]["corpus"]
    digest, read = hashlib.sha256(), 0
    documents = iter(texts)
    for text in itertools.islice(documents, corpus["documents"]):
        body = text.encode("utf-8", "surrogatepass")
        digest.update(len(body).to_bytes(8, "little") + body)
        read += 1
    longer = settings.max_tokens is None and next(documents, None) is not None
    found = {"documents": read + longer, "sha256": digest.hexdigest()}
    compare(path, "corpus", corpus, found, "Give the corpus of the store, or choose another path.")
    known = [source["numerics"], *source["accepted"]]
    if settings.numerics not in known:
        if not accept_numerics:
            compare(
                path,
                "numerics",
                source["numerics"],
                settings.numerics,
                "These may change the last bits. Set them as they were, or go on with --accept-numerics "
                "(accept_numerics=True), which is recorded.",
            )
        manifest = replace(manifest, source={**source, "accepted": [*source["accepted"], settings.numerics]})
        publish(path / ROOT, manifest.to_json())
    return manifest


def _planned(
    path: Path, settings: Settings, tokenizer: Any, texts: Iterable[str], tokenised: Callable[[int], None]
) -> Manifest:
    """Tokenise, store tokens and sequences, fix every shape; the root that says so is written last."""
    said = {"identity": settings.identity, "numerics": settings.numerics, "record": settings.record, "accepted": []}
    manifest = Manifest(
        kind="planned",
        store=hashlib.sha256(json.dumps(settings.identity, sort_keys=True).encode()).hexdigest()[:32],
        layout=settings.layout,
        dtype=settings.dtype,
        sites=dict(settings.widths),
        layers=settings.layers,
        special_tokens=settings.special_tokens,
        source=said,
    )
    row_bytes = []
    for site in manifest.sites:
        row = BY_NAME[settings.dtype].size
        for extent in manifest.row_shape(site):
            row *= extent
        row_bytes.append(row)
    shard_rows(row_bytes, settings.shard_tokens, None)
    publish(path / ROOT, manifest.to_json())
    contexts = Contexts(tokenizer, settings.context_length, settings.max_tokens)
    columns = {array: Column(path, manifest, array, 0) for array in RESERVED}
    pinned = _fill_columns(columns, contexts.cut(texts), settings.special_tokens, tokenised)
    total = len(columns["tokens"])
    if not total:
        raise CorpusError(_no_tokens(contexts, settings.max_tokens))
    corpus = {"documents": contexts.documents, "sha256": contexts.digest.hexdigest()}
    said = {**said, "identity": {**settings.identity, "corpus": corpus}, "tokens": pinned}
    tokens = shard_rows(row_bytes, settings.shard_tokens, total)
    manifest = replace(manifest, n_tokens=total, n_sequences=len(columns["sequences"]), source=said)
    manifest = manifest.with_geometry(tokens, total)
    for array in (*manifest.sites, *RESERVED):
        make_folder(path / array)
        rows = manifest.n_sequences if array == "sequences" else total
        publish(path / array / ROOT, array_json(manifest, array, rows))
    publish(path / ROOT, manifest.to_json())
    return manifest


def _no_tokens(contexts: Contexts, max_tokens: int | None) -> str:
    if contexts.documents and max_tokens is not None:
        return f"max_tokens={max_tokens} has no room for the first context: raise it, or lower context_length"
    return f"the corpus has no tokens ({contexts.documents} documents): give files with text in them"


def _fill_columns(
    columns: dict[str, Column],
    contexts: Iterable[Context],
    special_tokens: tuple[int, ...],
    tokenised: Callable[[int], None],
) -> str:
    """Store tokens, flags and sequences as they come, in bounded memory; give a hash of all token ids."""
    special_ids = np.array(special_tokens, np.int64)
    hashed = hashlib.sha256()
    written = total = 0
    for context in contexts:
        ids = context.tokens
        special = np.isin(ids, special_ids)
        flags = np.where(special, np.uint8(SPECIAL), np.uint8(0))
        if special[0]:
            flags[0] |= BOS
        columns["tokens"].extend(ids)
        columns["flags"].extend(flags)
        columns["sequences"].extend(np.array([[total, total + len(ids), context.document]]))
        hashed.update(ids.astype("<i4").tobytes())
        total += len(ids)
        if total - written >= _TOKENS_A_WRITE:
            for column in columns.values():
                column.publish()
            written = total
            tokenised(total)
    for column in columns.values():
        column.publish()
    tokenised(total)
    return hashed.hexdigest()


def bytes_to_write(manifest: Manifest, missing: dict[str, list[tuple[int, int]]]) -> int:
    """Add up the sizes of the shards that are missing."""
    total = manifest.n_tokens or 0
    needed = 0
    for site, shards in missing.items():
        spec = manifest.spec(site)
        sizes: dict[int, int] = {}
        for _, block in shards:
            rows = spec.rows_in_block(block, total)
            if rows not in sizes:
                sizes[rows] = Layout(spec, rows).size
            needed += sizes[rows]
    return needed


def check_room(path: Path, manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """List the missing shards of each site, and refuse if the disk has no room for them.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    total = manifest.n_tokens or 0
    missing = {site: missing_shards(path, manifest, site, total) for site in manifest.sites}
    needed, free = bytes_to_write(manifest, missing), free_bytes(path)
    if needed > free:
        raise DiskFullError(
            f"{path}: the shards that are missing take {needed} bytes ({needed / 2**30:.1f} GiB), and "
            f"{free} ({free / 2**30:.1f} GiB) are free: make room, or choose fewer sites, layers or tokens"
        )
    return missing
