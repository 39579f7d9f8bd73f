"""Make, resume or extend the plan of an extraction: all that is known before the first forward pass.

The plan stores tokens and sequences and fixes every array's shape; from then on a shard's presence is its commit.
A plan may be resumed (with the same settings), grown (`max_tokens`), or given more sites; any other difference
is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmcache.errors import CorpusError, LockedError, PlanMismatchError, StoreExistsError
from mmcache.extraction.fingerprint import with_sites
from mmcache.extraction.missing_shards import check_room, shards_from
from mmcache.extraction.plan_comparison import changes, grows, is_recorded, known_plan, with_recorded
from mmcache.extraction.staging_claims import claimed
from mmcache.extraction.tokenization import Tokenised, check_corpus, tokenise
from mmcache.format.manifest import NEW_STORES, Manifest, array_json, is_store, read_manifest
from mmcache.format.names import RESERVED, check_no_links
from mmcache.format.shard import ids_digest, shard_rows
from mmcache.format.signed_json import ROOT
from mmcache.storage.listing import in_order
from mmcache.storage.shard_folder import ShardFolder
from mmcache.storage.tokenizer_file import restore_tokenizer, save_tokenizer, tokenizer_source, tokenizer_text
from mmcache.system.atomic import publish, publish_all, remove_drafts
from mmcache.system.files import list_names, make_folder, read_file, remove_file, sync_folder
from mmcache.system.locks import FolderLock
from mmcache.write.base_writer import claim
from mmcache.write.new_store import check_new, row_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.settings import Settings

__all__ = ["join_plan", "open_plan"]


def open_plan(
    path: Path,
    settings: Settings,
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    accept_numerics: bool,
    tokenised: Callable[[int], None],
    waiting: Callable[[], None],
) -> Manifest:
    """The plan at `path`: a new one, or the existing one if it has the same settings, grown or extended if asked.

    Blocks while another process plans there.

    Args:
        path: the store.
        settings: those of the job.
        tokenizer: a Hugging Face tokenizer.
        documents: the corpus; read once, to be tokenised or compared.
        accept_numerics: continue although numerics differ, and record them.
        tokenised: called repeatedly with the number of tokens so far.
        waiting: called repeatedly while another worker plans.

    Raises:
        PlanMismatchError: the store was planned with other settings, which are listed.
        StoreExistsError, ReadOnlyError: the path has content that is no extraction.
        LockedError: it is to grow while others fill it. LinkError: a file or folder of it is a symbolic link.
        CorpusError: the corpus cannot be read, or has no tokens.
    """
    check_no_links(path, settings.widths)
    manifest = None
    if is_store(path) or not _claimed(path, settings):
        manifest = known_plan(path, settings, accept=accept_numerics)
    for folder in ("", *settings.widths, *RESERVED):
        remove_drafts(path, folder)
    if manifest is not None:
        restore_tokenizer(path, manifest, tokenizer)
    if manifest is None or changes(manifest, settings):
        make_folder(path)
        # If workers start together, one plans; the others wait, and find the plan.
        lock = FolderLock.wait(path, waiting)
        try:
            there = is_store(path)
            manifest = known_plan(path, settings, accept=accept_numerics) if there else _kept(path, _new(settings))
            if changes(manifest, settings):
                manifest = with_recorded(path, manifest, settings)
                if manifest.n_tokens is None or grows(manifest, settings):
                    with contextlib.nullcontext() if there else _begun(path):
                        return _tokenised(path, manifest, settings, tokenizer, documents, tokenised)
                check_corpus(path, Tokenised.of(manifest), documents)
                return _with_sites(path, manifest, settings)
        finally:
            lock.release()
    check_corpus(path, Tokenised.of(manifest), documents)
    if is_recorded(manifest, settings):
        return manifest
    # Under the lock: another worker may be growing the plan at this moment.
    lock = FolderLock.wait(path, waiting)
    try:
        return with_recorded(path, known_plan(path, settings, accept=accept_numerics), settings)
    finally:
        lock.release()


@contextlib.contextmanager
def _begun(path: Path) -> Iterator[None]:
    """Remove the root again if a new plan fails before any of the corpus is stored."""
    try:
        yield
    except CorpusError:
        # A failure to remove it would hide the cause.
        with contextlib.suppress(OSError):
            if "tokenised" not in read_manifest(path).source:
                remove_file(path, ROOT)
        raise


def join_plan(path: Path, settings: Settings, *, accept_numerics: bool) -> Manifest:
    """The existing plan, compared as in `open_plan`, except for the corpus, which the planner compares."""
    return with_recorded(path, known_plan(path, settings, accept=accept_numerics), settings)


def _claimed(path: Path, settings: Settings) -> bool:
    """Check that a store may be made at `path`; False if another worker has just begun one. Errors as `claim`."""
    try:
        claim(path, tuple(settings.widths))
    except StoreExistsError:
        if is_store(path):
            return False
        raise
    new = _new(settings)
    check_new(new.with_geometry(shard_rows(row_sizes(new), settings.shard_tokens, None), None))
    return True


def _new(settings: Settings) -> Manifest:
    """The first root of a new plan."""
    return Manifest(
        kind="planned",
        # Without the sites, so that a site that is added later has the same shards as one from the beginning.
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
            "fingerprint": settings.fingerprint,
            "equal_lengths": settings.equal_lengths,
            "record": settings.record,
        },
        uses=NEW_STORES,
    )


def _kept(path: Path, manifest: Manifest) -> Manifest:
    """Write the root; returns `manifest`."""
    publish(path, ROOT, manifest.to_json())
    return manifest


def _tokenised(
    path: Path,
    manifest: Manifest,
    settings: Settings,
    tokenizer: Any,
    documents: Iterable[Document],
    tokenised: Callable[[int], None],
) -> Manifest:
    """Tokenise the rest of the corpus and fix every shape; the root with the shapes is written last."""
    old = manifest

    def commit(state: Tokenised) -> None:
        nonlocal manifest
        manifest = replace(manifest, source={**manifest.source, "tokenised": state.to_json()})
        publish(path, ROOT, manifest.to_json())
        tokenised(state.tokens)

    # Format version 1 puts special tokens around texts that already have them: its plans continue so.
    contexts = settings.contexts(tokenizer, doubled=manifest.version == 1)
    state = tokenise(path, manifest, contexts, documents, settings.max_tokens, commit)
    tokenised(state.tokens)
    shard = shard_rows(settings.row_bytes(settings.widths), settings.shard_tokens, state.tokens)
    manifest = replace(manifest, n_tokens=state.tokens, n_sequences=state.sequences)
    source = {**manifest.source, "tokenised": state.to_json(), "max_tokens": settings.max_tokens}
    text = tokenizer_text(tokenizer)
    source |= {"tokens": _first_tokens(path, manifest), **tokenizer_source(text)}
    save_tokenizer(path, text)
    manifest = replace(manifest, source=source).with_geometry(shard, state.tokens)
    if old.n_tokens is not None:
        _check_idle(path, old)
        first = _first_unfinished(path, old, manifest)
        # Before anything is removed, so that a refusal leaves the store unchanged.
        check_room(path, manifest, replacing=(old, first))
        _drop(path, old, first)
    return _published(path, manifest)


def _check_idle(path: Path, manifest: Manifest) -> None:
    """Refuse to replace shards while another process is making some."""
    held = [f"{site}/{name}" for site in manifest.sites for name in remove_drafts(path, site)] + claimed(path)
    if held:
        raise LockedError(
            errno.EWOULDBLOCK,
            f"other processes are making shards of this store ({held[0]}): let them finish before it grows",
            str(path),
        )


def _first_tokens(path: Path, manifest: Manifest) -> str:
    """The digest of the first sequence: it ties shards to their corpus, and does not change when the plan grows."""
    spans = ShardFolder(path, manifest, "sequences", manifest.n_sequences).read(0, 1)
    ids = ShardFolder(path, manifest, "tokens", manifest.n_tokens or 0).read(0, int(spans[0, 1]))
    return ids_digest(ids.numpy())


def _published(path: Path, manifest: Manifest) -> Manifest:
    """Write the metadata of every array, then the root; returns `manifest`."""
    arrays = (*manifest.sites, *RESERVED)
    publish_all(path, {f"{array}/{ROOT}": array_json(manifest, array, manifest.rows(array)) for array in arrays})
    return _kept(path, manifest)


def _first_unfinished(path: Path, old: Manifest, new: Manifest) -> int:
    """The first block that differs in a longer plan: that of the last, incomplete batch or shard."""
    if (old.shard_tokens, old.inner_tokens) != (new.shard_tokens, new.inner_tokens):
        return 0
    shard = old.shard_tokens or 1
    first = (old.n_tokens or 0) // shard
    for numerics in (old.source["numerics"], *old.source["accepted"]):
        whole = old.n_sequences // numerics["batch_size"] * numerics["batch_size"]
        if whole < old.n_sequences:
            span = ShardFolder(path, old, "sequences", old.n_sequences).read(whole, whole + 1)
            first = min(first, int(span[0, 0]) // shard)
    return first


def _drop(path: Path, old: Manifest, first: int) -> None:
    """Remove the shards from block `first` on. Before the longer plan is written, so that a crash only loses them."""
    for site, there in shards_from(path, old, first).items():
        for slot, block in in_order(there):
            remove_file(path, f"{site}/{old.shard_key(site, block, slot)}")
        sync_folder(path / site)


def _with_sites(path: Path, manifest: Manifest, settings: Settings) -> Manifest:
    """Add sites to a complete store; its shards stay unchanged."""
    fresh = {site: width for site, width in settings.widths.items() if site not in manifest.sites}
    total, shard = manifest.n_tokens or 0, manifest.shard_tokens or 1
    shard_rows(settings.row_bytes(fresh), shard, total)
    source = {**manifest.source, "modules": {**manifest.source["modules"], **settings.modules}}
    source["fingerprint"] = with_sites(source["fingerprint"], settings.fingerprint)
    grown = replace(manifest, sites={**manifest.sites, **fresh}, source=source).with_geometry(shard, total)
    grown = replace(grown, inner_tokens={**grown.inner_tokens, **manifest.inner_tokens})
    taken = [site for site in set(list_names(path)).intersection(fresh) if not _interrupted(path, grown, site)]
    if taken:
        raise PlanMismatchError(f"{path} already holds {', '.join(taken)}, which is no site of it: move it away")
    check_room(path, grown)
    return _published(path, grown)


def _interrupted(path: Path, grown: Manifest, site: str) -> bool:
    """Whether a site's folder has only the remains of an addition that was interrupted before the root was written."""
    folder, metadata = path / site, array_json(grown, site, grown.n_tokens or 0)
    names = list_names(folder) if folder.is_dir() else [site]
    return not names or (names == [ROOT] and read_file(folder / ROOT, 1 << 20) == metadata)
