"""Writing many sequences into one store: `create`, `append` and `Writer`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

from mmcache.errors import ArgumentError, DtypeError, ReadOnlyError, ShapeError, UnknownSiteError
from mmcache.format.dtypes import activation_dtype
from mmcache.format.manifest import NEW_STORES, Manifest, check_user_metadata, read_manifest
from mmcache.format.names import RESERVED, check_no_links
from mmcache.format.shard import shard_rows
from mmcache.format.token_flags import FIRST, counted, flagged
from mmcache.read.store import open_store
from mmcache.storage.shard_folder import ShardFolder
from mmcache.storage.tokenizer_file import tokenizer_identity, tokenizer_source, tokenizer_text
from mmcache.system.arguments import a_folder, a_switch, a_tokenizer, choice, count, optional, public, token_ids
from mmcache.system.atomic import remove_drafts
from mmcache.system.devices import check_dense
from mmcache.write.base_writer import BaseWriter, claim
from mmcache.write.new_store import MOST_LAYERS, check_new, row_sizes, site_widths
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.shard_writer import BlockWriter
from mmcache.write.token_columns import Column, publish_columns

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from mmcache.write.pipeline import Pipeline
    from mmcache.write.shard_writer import Run
    from mmcache.write.staging import Stager

__all__ = ["Activations", "Ids", "SequenceRows", "Writer", "append", "check_batch", "create", "runs_by_block"]

Ids: TypeAlias = "torch.Tensor | np.ndarray | Sequence[Any]"
Activations: TypeAlias = "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]"


@dataclass
class SequenceRows:
    """One sequence: `tokens` int64 and `flags` uint8 `[n]`, and for each site a `[n, d_model]` tensor per layer."""

    tokens: np.ndarray
    flags: np.ndarray
    activations: dict[str, list[torch.Tensor]]


def _whole_numbers(values: Ids, what: str, low: int, high: int) -> np.ndarray:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{what} are rows of different lengths: pad them, and say where in attention_mask") from error
    if array.size and array.dtype.kind not in "iub":
        raise DtypeError(f"{what} are {array.dtype}: expected integers")
    if array.size and not (low <= array.min() and array.max() <= high):
        raise ArgumentError(f"{what} range from {array.min()} to {array.max()}: expected {low} to {high}")
    return array.astype(np.int64)


def _layers_of(
    given: torch.Tensor | Sequence[torch.Tensor], site: str, manifest: Manifest, shape: tuple[int, ...]
) -> list[torch.Tensor]:
    """Check the activations of a site; returns one `[batch, seq, d_model]` tensor per layer."""
    n_layers, width = len(manifest.layers), manifest.sites[site]
    expected = (*shape, width)
    if isinstance(given, torch.Tensor) and given.ndim == 0:
        raise ShapeError(f"activations of {site!r} are one number: expected {(n_layers, *expected)}")
    layers = list(given.unbind(0)) if isinstance(given, torch.Tensor) else list(given)
    if len(layers) != n_layers:
        raise ShapeError(
            f"activations of {site!r} have {len(layers)} layers: expected {n_layers}, each {list(expected)}"
        )
    for number, layer in enumerate(layers):
        check_dense(layer, f"layer {number} of {site!r}")
        if tuple(layer.shape) != expected:
            raise ShapeError(
                f"layer {number} of {site!r} has shape {list(layer.shape)}: expected {list(expected)} "
                f"(the shape of tokens, then d_model)"
            )
        activation_dtype(layer.dtype, what=f"layer {number} of {site!r}")
    return [layer.detach().reshape(-1, layer.shape[-1]) if layer.ndim == 2 else layer.detach() for layer in layers]


def check_batch(
    manifest: Manifest,
    tokens: Ids,
    activations: Activations,
    attention_mask: Ids | None,
    flags: Ids | None,
) -> list[SequenceRows]:
    """Check the arguments of `append` against the store and each other, and cut them into sequences.

    Where the ones of a sequence's mask are contiguous, its activations are views of the caller's tensors.

    Raises:
        ShapeError, DtypeError, UnknownSiteError, ArgumentError: say what was found and what was expected.
    """
    ids = _whole_numbers(tokens, "tokens", -1, 2**31 - 1)
    if ids.ndim not in (1, 2):
        raise ShapeError(f"tokens have shape {list(ids.shape)}: expected [n] or [batch, seq]")
    columns = {"attention_mask": (attention_mask, 1), "flags": (flags, 255)}
    checked: dict[str, np.ndarray] = {}
    for name, (values, high) in columns.items():
        full = np.full(ids.shape, int(name == "attention_mask"), np.int64)
        checked[name] = full if values is None else _whole_numbers(values, name, 0, high)
        if checked[name].shape != ids.shape:
            raise ShapeError(f"{name} has shape {list(checked[name].shape)}: expected {list(ids.shape)}, as tokens")
    if flags is not None and manifest.flags_first and (checked["flags"] & FIRST).any():
        raise ArgumentError(
            f"flags have bit {FIRST}, which marks the first token of a sequence and is set by the store itself: "
            f"expected 1 (BOS), 2 (special) and bits of your own, 8 to 128"
        )
    if not isinstance(activations, Mapping):
        raise DtypeError(f"activations are a {type(activations).__name__}: expected a dict of site to layers")
    if set(activations) != set(manifest.sites):
        raise UnknownSiteError(
            f"activations have the sites {sorted(activations)}: expected exactly {sorted(manifest.sites)}"
        )
    sites = {site: _layers_of(activations[site], site, manifest, ids.shape) for site in manifest.sites}
    if ids.ndim == 1:
        ids = ids[None]
        checked = {name: values[None] for name, values in checked.items()}
        sites = {site: [layer[None] for layer in layers] for site, layers in sites.items()}
    return _cut(ids, checked["attention_mask"].astype(bool), checked["flags"].astype(np.uint8), sites)


def _cut(
    ids: np.ndarray, mask: np.ndarray, flags: np.ndarray, sites: dict[str, list[torch.Tensor]]
) -> list[SequenceRows]:
    found = []
    for row in range(len(ids)):
        kept = np.flatnonzero(mask[row])
        if not len(kept):
            if ids.shape[1]:
                raise ArgumentError(f"row {row} of attention_mask is all zeros: leave the sequence out instead")
            raise ArgumentError("a sequence without tokens cannot be appended")
        first, last = int(kept[0]), int(kept[-1]) + 1
        run = slice(first, last)
        whole = last - first == len(kept)
        rows = {
            site: [layer[row, run] if whole else layer[row, torch.from_numpy(kept)] for layer in layers]
            for site, layers in sites.items()
        }
        found.append(SequenceRows(ids[row, kept], flags[row, kept], rows))
    return found


def runs_by_block(
    batch: list[SequenceRows], keeps: Iterable[np.ndarray], at: int, shard_tokens: int
) -> Iterator[list[Run]]:
    """Split sequences into the runs of each block, from token `at` of the store on.

    Args:
        batch: the sequences.
        keeps: for each, which rows count in the statistics: `[n]` bool.
        at: the position of the first token.
        shard_tokens: tokens per block.
    """
    runs: list[Run] = []
    for item, keep in zip(batch, keeps, strict=True):
        done, total = 0, len(item.tokens)
        while done < total:
            some = min(total - done, shard_tokens - at % shard_tokens)
            span = slice(done, done + some)
            rows = {site: [layer[span] for layer in layers] for site, layers in item.activations.items()}
            runs.append((rows, keep[span]))
            done, at = done + some, at + some
            if not at % shard_tokens:
                yield runs
                runs = []
    if runs:
        yield runs


class Writer(BaseWriter):
    """Appends sequences to a store. Made by `mmcache.create` and `mmcache.append`.

    Appended tokens count once `commit` or `close` has returned; a crash before that loses only these. Used by one
    thread at a time.
    """

    def __init__(self, path: Path, manifest: Manifest | None, tokenizer: str | None = None) -> None:
        super().__init__(path)
        try:
            if manifest is None:
                # Read with the lock held: another writer may have committed until now.
                manifest = read_manifest(path)
            else:
                self._create(manifest, dict.fromkeys(RESERVED, 0), tokenizer)
            self._load(manifest)
        except BaseException:
            self._lock.release()
            raise
        self._begin()

    def _load(self, manifest: Manifest) -> None:
        """Set the state as of the last commit."""
        self._manifest = manifest
        self._policy = PageCachePolicy()
        self._block: BlockWriter | None = None
        self._n_tokens = manifest.n_tokens or 0
        self._special = np.array(manifest.special_tokens, np.int64)
        self._flags_first, self._left_out = manifest.flags_first, manifest.left_out
        totals = {"tokens": self._n_tokens, "flags": self._n_tokens, "sequences": manifest.n_sequences}
        self._columns = {array: Column(self._path, manifest, array, total) for array, total in totals.items()}
        if manifest.n_sequences:
            # After a crash, the last one may extend past the committed tokens.
            self._columns["sequences"].last()[1] = self._n_tokens
        for site in manifest.sites:
            remove_drafts(self._path, site)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"n_tokens={self.n_tokens}, n_sequences={self.n_sequences}"
        return f"Writer({str(self._path)!r}, {state})"

    @property
    def n_tokens(self) -> int:
        """Tokens appended so far, committed or not."""
        return self._n_tokens

    @property
    def n_sequences(self) -> int:
        """Sequences appended so far, committed or not."""
        return len(self._columns["sequences"])

    @public(continues=a_switch)
    def append(
        self,
        tokens: Ids,
        activations: Activations,
        attention_mask: Ids | None = None,
        flags: Ids | None = None,
        continues: bool = False,
    ) -> None:
        """Append one sequence, or a batch of them; the write happens in the background.

        Args:
            tokens: ids, `[n]` for one sequence or `[batch, seq]`: a tensor, an array or lists.
            activations: for each site of the store `[n_layers, *tokens.shape, d_model]`, or a list of
                `n_layers` tensors `[*tokens.shape, d_model]`, on any device, in any float dtype; cast to the
                store's. Read before this returns (on CUDA: before later work on the current stream).
            attention_mask: as `tokens`; 0 marks padding, which is not stored.
            flags: as `tokens`, 0 to 255: 1 is BOS, 2 special, 8 to 128 your own. 4 is set by the store for the first
                token of each sequence (in a store without that flag, 4 is your own too). Tokens in the store's
                `special_tokens` are flagged special, and also BOS if they begin a sequence.
            continues: continue the last sequence (chunked prefill) instead of beginning another.

        Blocks only while all of the staging ring (64 MiB) waits for the disk.

        Raises:
            ShapeError, DtypeError, UnknownSiteError, ArgumentError: the arguments do not fit; nothing is stored.
            WriteError: an earlier write failed in the background.
            ClosedError: the writer is closed.
        """
        self._check_open()
        batch = check_batch(self._manifest, tokens, activations, attention_mask, flags)
        if continues and not (self.n_sequences and len(batch) == 1):
            raise ArgumentError(
                f"continues=True goes on with the last sequence: expected one to go on with and one sequence "
                f"of tokens, found {self.n_sequences} in the store and {len(batch)} in the call"
            )
        if not batch:
            return
        if not self._n_tokens:
            # The size of the inner chunks is chosen with the first rows.
            known = sum(len(item.tokens) for item in batch)
            self._manifest = self._manifest.with_geometry(self._manifest.shard_tokens or 1, known)
        self._append_batch(batch, continues=continues)

    def _append_batch(self, batch: list[SequenceRows], *, continues: bool) -> None:
        named = partial(flagged, special_tokens=self._special, begins=not continues, first=self._flags_first)
        flags = [item.flags | named(item.tokens) for item in batch]
        at, shard_tokens = self._n_tokens, self._manifest.shard_tokens or 1
        keeps = [counted(its_flags, self._left_out) for its_flags in flags]
        for runs in runs_by_block(batch, keeps, at, shard_tokens):
            block = self._open_block(at)
            self._torn, self._block = "an append", block
            block.append(self._started()[1], runs)
            at = block.first + block.rows
            if block.rows == shard_tokens:
                self._send()
                # Not counted yet, as after a crash: if the next block cannot be begun, nothing was appended.
                self._torn = None
        self._torn = "an append"
        self._note(batch, flags, continues=continues)
        self._started()[1].settle()
        self._torn = None

    def _note(self, batch: list[SequenceRows], flags: list[np.ndarray], *, continues: bool) -> None:
        """Record tokens, flags and sequences whose rows are staged."""
        self._changed = True
        for item, its_flags in zip(batch, flags, strict=True):
            start, stop = self._n_tokens, self._n_tokens + len(item.tokens)
            self._columns["tokens"].extend(item.tokens)
            self._columns["flags"].extend(its_flags)
            if continues:
                self._columns["sequences"].last()[1] = stop
            else:
                self._columns["sequences"].extend(np.array([[start, stop, self.n_sequences]]))
            self._n_tokens = stop

    def _open_block(self, at: int) -> BlockWriter:
        """The block of token `at`, begun if necessary; if that fails, nothing is changed.

        A block that is partly on disk begins with its rows from there.
        """
        if self._block is not None and self._block.sealed:
            self._send()
        if self._block is not None:
            return self._block
        manifest = self._manifest
        number, rows = divmod(at, manifest.shard_tokens or 1)
        block = BlockWriter(self._path, manifest, number, self._policy)
        try:
            if rows:
                self._started()[0].drain()
                # Not from disk: a commit may have failed before it wrote its flags.
                keep = counted(self._columns["flags"].read(at - rows, at), self._left_out)
                block.resume({site: ShardFolder(self._path, manifest, site, at) for site in manifest.sites}, keep)
        except BaseException:
            block.discard()
            raise
        return block

    def _send(self) -> None:
        """Submit the open block, also again after an interrupt."""
        if self._block is not None:
            self._block.seal(*self._started())
            self._block = None

    def _started(self) -> tuple[Pipeline, Stager]:
        return self._start(self._manifest.widest_row())

    def commit(self) -> None:
        """Commit everything appended so far; blocks until it is durable.

        A partly filled last shard is rewritten when more is appended: commit every few thousand tokens, not every few.

        Raises:
            WriteError: something could not be written; the store is as of its last commit.
            ClosedError: the writer is closed.
        """
        self._check_open()
        self._commit()

    def _commit(self) -> None:
        if not self._changed:
            return
        self._send()
        self._started()[0].drain()
        publish_columns(self._path, self._columns.values())
        manifest = replace(self._manifest, n_tokens=self._n_tokens, n_sequences=self.n_sequences)
        rows = dict.fromkeys((*manifest.sites, "tokens", "flags"), self._n_tokens)
        self._commit_root(manifest, {**rows, "sequences": self.n_sequences})
        self._changed = False

    def _abandon(self) -> None:
        if self._block is not None:
            self._block.discard()


@public(
    path=a_folder,
    sites=site_widths,
    n_layers=count(1, MOST_LAYERS),
    layout=choice("layer", "token"),
    special_tokens=optional(token_ids),
    tokenizer=optional(a_tokenizer),
    metadata=check_user_metadata,
)
def create(
    path: str | os.PathLike[str],
    *,
    sites: Mapping[str, int],
    n_layers: int,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: Literal["layer", "token"] = "token",
    shard_tokens: int | None = None,
    special_tokens: Iterable[int] | None = None,
    tokenizer: Any = None,
    metadata: dict[str, Any] | None = None,
) -> Writer:
    """Make a store for many sequences, and return its writer.

    Args:
        path: a folder that does not exist, or holds no store.
        sites: each site's `d_model`.
        n_layers: the number of layers of every site, numbered from 0.
        dtype: the storage dtype, to which activations are cast.
        layout: `"token"` (all layers of a token side by side, for training) or `"layer"` (each layer apart).
        shard_tokens: tokens per shard; None for shards of up to 256 MiB at the widest site.
        special_tokens: ids that are flagged as special, and left out of the statistics. A sequence's first token is
            flagged BOS too if it is one of them.
        tokenizer: a Hugging Face tokenizer, which is stored (`Store.tokenizer_json`) if it has a JSON form. Its
            special ids are added to `special_tokens`, so that the BOS is flagged.
        metadata: anything that JSON can hold, for the user's own use.

    Raises:
        StoreExistsError: the path is taken. LockedError: another writer is making it.
        ArgumentError, DtypeError: another argument is invalid.
    """
    special = set(special_tokens or ())
    source: dict[str, Any] = {}
    text: str | None = None
    if tokenizer is not None:
        text = tokenizer_text(tokenizer)
        special |= set(tokenizer.all_special_ids)
        source = {"identity": {"tokenizer": tokenizer_identity(tokenizer, sorted(special))}}
        source |= tokenizer_source(text)
    manifest = Manifest(
        kind="grown",
        store=secrets.token_hex(16),
        layout=layout,
        dtype=activation_dtype(dtype).name,
        sites=dict(sites),
        layers=tuple(range(n_layers)),
        n_tokens=0,
        special_tokens=tuple(sorted(special)),
        source=source,
        metadata=metadata or {},
        uses=NEW_STORES,
    )
    manifest = manifest.with_geometry(shard_rows(row_sizes(manifest), shard_tokens, None), None)
    check_new(manifest)
    return Writer(claim(path, tuple(sites)), manifest, text)


@public(path=a_folder)
def append(path: str | os.PathLike[str]) -> Writer:
    """A writer that continues a store made by `create`, from its last commit.

    Raises:
        StoreNotFoundError: there is no store. CorruptError: it is damaged. LockedError: another writer has it.
        ReadOnlyError: the store was not made by `create`. LinkError: a file or folder of it is a symbolic link.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.kind != "grown" or not manifest.has_tokens:
        made_by = "extract" if manifest.kind == "planned" else "a FullActivationCache"
        raise ReadOnlyError(f"{folder} was made by {made_by}: only stores made by mmcache.create can be appended to")
    check_no_links(folder, manifest.sites)
    # Check that it is complete as of its last commit before anything is added.
    open_store(folder).close()
    return Writer(folder, None)
