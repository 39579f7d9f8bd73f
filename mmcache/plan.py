"""The plan of an extraction: everything that is known before the first forward pass, written down first.

Tokens and sequences are stored, every array's shape is fixed, and from then on a shard's presence is its commit.
A plan may be gone on with (the same settings), grown (`max_tokens`), or given more sites; anything else that
differs is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mmcache.contexts import Contexts
from mmcache.dtypes import BY_NAME
from mmcache.errors import DiskFullError, PlanMismatchError, ReadOnlyError
from mmcache.files import FolderLock, free_bytes, list_names, make_folder, publish, remove_file, sync_folder
from mmcache.format import Layout
from mmcache.geometry import shard_rows
from mmcache.grown import claim
from mmcache.manifest import RESERVED, ROOT, Manifest, array_json, read_manifest
from mmcache.provenance import compare
from mmcache.shards import ShardFolder, missing_shards
from mmcache.tokenise import Tokenised, check_corpus, tokenise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from mmcache.corpus import Document

__all__ = ["Settings", "bytes_to_write", "check_room", "open_plan", "row_bytes"]

_REMEDY = "Give the settings of the store, or choose another path."
_ACCEPT = (
    "These may change the last bits of an activation. Set them as they were, or go on all the same with "
    "--accept-numerics (accept_numerics=True), which is recorded."
)


@dataclass(frozen=True)
class Settings:
    """What an extraction was asked for, its model and tokenizer already looked at.

    `identity`, `numerics` and `record` are as `provenance` says; the sites (`modules`: the modules of each) and the
    corpus belong to the identity too, and are compared apart. `vocabulary` is how many ids the model knows.
    """

    identity: dict[str, Any]
    modules: dict[str, list[str]]
    numerics: dict[str, Any]
    record: dict[str, Any]
    widths: dict[str, int]
    layers: tuple[int, ...]
    dtype: str
    layout: Literal["layer", "token"]
    shard_tokens: int | None
    context_length: int
    pack: bool
    max_tokens: int | None
    special_tokens: tuple[int, ...]
    vocabulary: int | None

    def contexts(self, tokenizer: Any) -> Contexts:
        """Give what cuts documents into contexts."""
        return Contexts(tokenizer, self.context_length, self.vocabulary, pack=self.pack)


def open_plan(
    path: Path,
    settings: Settings,
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    accept_numerics: bool,
    tokenised: Callable[[int], None],
) -> Manifest:
    """Give the plan at `path`: a new one, or the one that is there if it was made with the same settings.

    Args:
        path: the store.
        settings: what is asked for.
        tokenizer: a Hugging Face tokenizer.
        documents: the corpus; read once, to be tokenised or to be compared.
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
        shard_rows(list(_row_bytes(settings, settings.widths)), settings.shard_tokens, None)
    else:
        manifest = _known(path, settings)
        if manifest.n_tokens is not None and not _changes(manifest, settings):
            check_corpus(path, Tokenised.of(manifest), documents)
            return _with_numerics(path, manifest, settings, accept=accept_numerics)
    make_folder(path)
    lock = FolderLock(path)
    try:
        # Behind the lock the root may be another than before it.
        manifest = _known(path, settings) if ROOT in list_names(path) else _begun(path, settings)
        manifest = _with_numerics(path, manifest, settings, accept=accept_numerics)
        if manifest.n_tokens is None or _grows(manifest, settings):
            return _tokenised(path, manifest, settings, tokenizer, documents, tokenised)
        check_corpus(path, Tokenised.of(manifest), documents)
        return _with_sites(path, manifest, settings)
    finally:
        lock.release()


def _known(path: Path, settings: Settings) -> Manifest:
    """Read the plan that is there, and compare all but the corpus and the numerics."""
    manifest = read_manifest(path)
    if manifest.kind != "planned":
        raise ReadOnlyError(f"{path} holds a store that was not made by extract: choose another path")
    compare(path, "identity", manifest.source["identity"], settings.identity, _REMEDY)
    stored, asked = manifest.source["modules"], settings.modules
    shared = {name: stored[name] for name in stored if name in asked}
    compare(path, "modules", shared, {name: asked[name] for name in shared}, _REMEDY)
    if set(stored) != set(asked):
        complete = manifest.n_tokens is not None and not any(_missing(path, manifest).values())
        if not complete or set(asked) < set(stored):
            why = "More sites can be added once it is complete. " if not complete else ""
            compare(path, "identity", {"sites": sorted(stored)}, {"sites": sorted(asked)}, why + _REMEDY)
    most = manifest.source["max_tokens"]
    if most is not None and (settings.max_tokens or most) < most:
        remedy = "It may grow, not shrink. " + _REMEDY
        compare(path, "identity", {"max_tokens": most}, {"max_tokens": settings.max_tokens}, remedy)
    if most is None and settings.max_tokens is not None:
        compare(path, "identity", {"max_tokens": None}, {"max_tokens": settings.max_tokens}, _REMEDY)
    return manifest


def _grows(manifest: Manifest, settings: Settings) -> bool:
    more = manifest.source["max_tokens"] != settings.max_tokens
    return more and not Tokenised.of(manifest).whole


def _changes(manifest: Manifest, settings: Settings) -> bool:
    return _grows(manifest, settings) or bool(set(settings.modules) - set(manifest.sites))


def _with_numerics(path: Path, manifest: Manifest, settings: Settings, *, accept: bool) -> Manifest:
    source = manifest.source
    if settings.numerics in [source["numerics"], *source["accepted"]]:
        return manifest
    if not accept:
        compare(path, "numerics", source["numerics"], settings.numerics, _ACCEPT)
    manifest = replace(manifest, source={**source, "accepted": [*source["accepted"], settings.numerics]})
    publish(path / ROOT, manifest.to_json())
    return manifest


def _row_bytes(settings: Settings, widths: dict[str, int]) -> Iterable[int]:
    deep = len(settings.layers) if settings.layout == "token" else 1
    return (deep * width * BY_NAME[settings.dtype].size for width in widths.values())


def row_bytes(manifest: Manifest, *, stored: bool = False) -> int:
    """Give the bytes of the widest row of any site, or (`stored`) those that all sites take for a token."""
    sizes = [manifest.spec(site).row_bytes * (len(manifest.slots(site)) if stored else 1) for site in manifest.sites]
    return sum(sizes) if stored else max(sizes)


def _begun(path: Path, settings: Settings) -> Manifest:
    """Write down the settings, before anything else."""
    manifest = Manifest(
        kind="planned",
        # Not of the sites: a site that is added later has the very shards that it would have had at once.
        store=hashlib.sha256(json.dumps(settings.identity, sort_keys=True).encode()).hexdigest()[:32],
        layout=settings.layout,
        dtype=settings.dtype,
        sites=dict(settings.widths),
        layers=settings.layers,
        special_tokens=settings.special_tokens,
        source={
            "identity": settings.identity,
            "modules": settings.modules,
            "max_tokens": settings.max_tokens,
            "numerics": settings.numerics,
            "accepted": [],
            "record": settings.record,
        },
    )
    publish(path / ROOT, manifest.to_json())
    return manifest


def _tokenised(
    path: Path,
    manifest: Manifest,
    settings: Settings,
    tokenizer: Any,
    documents: Iterable[Document],
    tokenised: Callable[[int], None],
) -> Manifest:
    """Tokenise what is missing, and fix every shape; the root that says so is written last."""
    old = manifest

    def commit(state: Tokenised) -> None:
        nonlocal manifest
        manifest = replace(manifest, source={**manifest.source, "tokenised": state.to_json()})
        publish(path / ROOT, manifest.to_json())
        tokenised(state.tokens)

    state = tokenise(path, manifest, settings.contexts(tokenizer), documents, settings.max_tokens, commit)
    shard = shard_rows(list(_row_bytes(settings, settings.widths)), settings.shard_tokens, state.tokens)
    manifest = replace(manifest, n_tokens=state.tokens, n_sequences=state.sequences)
    source = {**manifest.source, "max_tokens": settings.max_tokens, "tokens": _first_tokens(path, manifest)}
    manifest = replace(manifest, source=source).with_geometry(shard, state.tokens)
    if old.n_tokens is not None:
        _drop_unfinished(path, old, manifest)
    return _published(path, manifest)


def _first_tokens(path: Path, manifest: Manifest) -> str:
    """Hash the first sequence: it pins shards to their corpus, and stays the same when the plan grows."""
    spans = ShardFolder(path, manifest, "sequences", manifest.n_sequences).read(0, 1)
    ids = ShardFolder(path, manifest, "tokens", manifest.n_tokens or 0).read(0, int(spans[0, 1]))
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32]


def _published(path: Path, manifest: Manifest) -> Manifest:
    """Write the metadata of every array, then the root."""
    for array in (*manifest.sites, *RESERVED):
        make_folder(path / array)
        rows = manifest.n_sequences if array == "sequences" else manifest.n_tokens
        publish(path / array / ROOT, array_json(manifest, array, rows or 0))
    publish(path / ROOT, manifest.to_json())
    return manifest


def _drop_unfinished(path: Path, old: Manifest, new: Manifest) -> None:
    """Remove the shards that a longer plan makes otherwise: of the last, partly filled batch and all behind it.

    Done before the longer plan is written: whatever happens between, the shards are missing, and made again.
    """
    total = old.n_tokens or 0
    first = total // (old.shard_tokens or 1)
    if (old.shard_tokens, old.inner_tokens) != (new.shard_tokens, new.inner_tokens):
        first = 0
    for numerics in (old.source["numerics"], *old.source["accepted"]):
        whole = old.n_sequences // numerics["batch_size"] * numerics["batch_size"]
        if whole < old.n_sequences:
            span = ShardFolder(path, old, "sequences", old.n_sequences).read(whole, whole + 1)
            first = min(first, int(span[0, 0]) // (old.shard_tokens or 1))
    for site in old.sites:
        for block in range(first, old.spec(site).blocks(total)):
            for slot in old.slots(site):
                remove_file(path / site / old.shard_key(site, block, slot))
        sync_folder(path / site)


def _with_sites(path: Path, manifest: Manifest, settings: Settings) -> Manifest:
    """Add the sites that a complete store does not have yet; its own shards stay as they are."""
    fresh = {site: width for site, width in settings.widths.items() if site not in manifest.sites}
    taken = sorted(set(fresh) & set(list_names(path)))
    if taken:
        raise PlanMismatchError(f"{path} already holds {', '.join(taken)}, which is no site of it: move it away")
    total, shard = manifest.n_tokens or 0, manifest.shard_tokens or 1
    shard_rows(list(_row_bytes(settings, fresh)), shard, total)
    grown = replace(
        manifest,
        sites={**manifest.sites, **fresh},
        source={**manifest.source, "modules": {**manifest.source["modules"], **settings.modules}},
    ).with_geometry(shard, total)
    grown = replace(grown, inner_tokens={**grown.inner_tokens, **manifest.inner_tokens})
    return _published(path, grown)


def _missing(path: Path, manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    return {site: missing_shards(path, manifest, site, manifest.n_tokens or 0) for site in manifest.sites}


def bytes_to_write(manifest: Manifest, missing: dict[str, list[tuple[int, int]]]) -> int:
    """Add up the sizes of the files of shards that are missing."""
    needed = 0
    for site, shards in missing.items():
        spec = manifest.spec(site)
        rows = [spec.rows_in_block(block, manifest.n_tokens or 0) for _, block in shards]
        needed += sum(Layout(spec, some).size * rows.count(some) for some in set(rows))
    return needed


def check_room(path: Path, manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """List the missing shards of each site, as (slot, block), and refuse if the disk has no room for them.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    missing = _missing(path, manifest)
    needed, free = bytes_to_write(manifest, missing), free_bytes(path)
    if needed > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"the shards that are missing take {needed} bytes ({needed / 2**30:.1f} GiB), and {free} "
            f"({free / 2**30:.1f} GiB) are free: make room, or choose fewer sites, layers or tokens",
            str(path),
        )
    return missing
