"""`FullActivationCache`: every layer of one sequence, pushed layer by layer; a store of one site."""

from __future__ import annotations

import secrets
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from mmcache.block import PageCachePolicy
from mmcache.dtypes import activation_dtype
from mmcache.errors import (
    ArgumentError,
    ClosedError,
    DtypeError,
    EmptyCacheError,
    OutOfRangeError,
    ReadOnlyError,
    ShapeError,
)
from mmcache.files import make_folder, remove_tree
from mmcache.geometry import shard_rows
from mmcache.grown import GrownStore, claim, close_after
from mmcache.manifest import Manifest, check_site_name
from mmcache.shards import ShardFolder
from mmcache.site_view import SiteView
from mmcache.staging import Seal, ShardWriter
from mmcache.store import open_store

if TYPE_CHECKING:
    import os

    from mmcache.site_view import Positions

__all__ = ["FullActivationCache"]


class _LayerWriter(GrownStore):
    """The writing half of a cache: a grown store without tokens, whose layers grow instead."""

    def __init__(self, path: Path, manifest: Manifest, asked: int | None, *, temporary: bool) -> None:
        super().__init__(path, durable=not temporary)
        self._site = next(iter(manifest.sites))
        self._asked, self._temporary = asked, temporary
        self._policy = PageCachePolicy()
        self._pushed: torch.dtype | None = None
        self._seals: list[list[Seal]] = []
        self._open: ShardWriter | None = None
        try:
            claim(path, (self._site,))
            self._commit_root(manifest, {})
        except BaseException:
            self._lock.release()
            raise
        self._begin()

    def __repr__(self) -> str:
        return f"FullActivationCache({str(self._path)!r})"

    @property
    def manifest(self) -> Manifest:
        """What was pushed so far, committed or not."""
        return self._manifest

    def push(self, tensor: torch.Tensor) -> None:
        """Stage one layer; see `FullActivationCache.push`."""
        self._check_open()
        self._check_layer(tensor)
        manifest = self._manifest
        slot = len(manifest.layers)
        if manifest.shard_tokens is None:
            manifest = self._first(tensor)
        manifest = replace(manifest, layers=(*manifest.layers, slot))
        spec = manifest.spec(self._site)
        pipeline, stager = self._start(spec.row_bytes)
        make_folder(self._path / self._site)
        seals = []
        with self._whole("push"):
            for block in range(spec.blocks(len(tensor))):
                first, rows = block * spec.shard_rows, spec.rows_in_block(block, len(tensor))
                shard = self._open = ShardWriter(
                    self._path / self._site / manifest.shard_key(self._site, block, slot),
                    spec,
                    manifest.shard_metadata(self._site, block, slot),
                    first,
                    rows=rows,
                    direct=self._policy.direct(rows * spec.row_bytes),
                    durable=self._durable,
                )
                stager.stage(shard, [tensor.detach()[first : first + rows]])
                stager.flush()
                seal = Seal([shard], durable=False)
                pipeline.submit(seal)
                self._open = None
                seals.append(seal)
        self._seals.append(seals)
        self._manifest, self._pushed, self._changed = manifest, tensor.dtype, True

    def _check_layer(self, tensor: torch.Tensor) -> None:
        number = len(self._manifest.layers)
        if not isinstance(tensor, torch.Tensor):
            raise DtypeError(f"layer {number} is a {type(tensor).__name__}: expected a torch tensor")
        if tensor.ndim != 2 or not tensor.numel():
            raise ShapeError(
                f"layer {number} has shape {list(tensor.shape)}: expected [seq_len, d_model], neither of them 0 "
                f"(a batch of one is squeezed with tensor[0])"
            )
        activation_dtype(tensor.dtype, what=f"layer {number}")
        if self._pushed is None:
            return
        expected = [self._manifest.n_tokens, self._manifest.sites[self._site]]
        if list(tensor.shape) != expected:
            raise ShapeError(
                f"layer {number} has shape {list(tensor.shape)}: expected {expected}, as the layers before it"
            )
        if tensor.dtype != self._pushed:
            raise DtypeError(f"layer {number} is {tensor.dtype}: expected {self._pushed}, as the layers before it")

    def _first(self, tensor: torch.Tensor) -> Manifest:
        """Fix the geometry, now that the first layer is known."""
        seq_len, width = tensor.shape
        dtype = activation_dtype(self._manifest.dtype or tensor.dtype)
        manifest = replace(self._manifest, dtype=dtype.name, sites={self._site: width}, n_tokens=seq_len, n_sequences=1)
        return manifest.with_geometry(shard_rows([width * dtype.size], self._asked, seq_len), seq_len)

    def wait(self, slot: int, _block: int) -> None:
        """Block until a layer's shards are in place; raises what failed behind the caller's back."""
        for seal in self._seals[slot]:
            seal.done.wait()
        if self._pipeline is not None:
            self._pipeline.check()

    def commit(self) -> None:
        """Make everything pushed durable, and count it."""
        self._check_open()
        self._commit()

    def _commit(self) -> None:
        if not self._changed or self._pipeline is None:
            return
        self._pipeline.drain()
        # `_commit_root` makes the folder's names durable together with the array's metadata.
        self._commit_root(self._manifest, {self._site: self._manifest.n_tokens or 0})
        self._changed = False

    def close(self) -> None:
        """Commit and let go; a temporary cache, which is about to be removed, is not committed."""
        self._changed = self._changed and not self._temporary
        super().close()

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.discard()


def _all(start: int, stop: int) -> np.ndarray:
    """Tell which tokens count in the statistics: no token of a cache is known to be special."""
    return np.ones(stop - start, bool)


class FullActivationCache:
    """Every layer's activations of one sequence, on disk: candle-mi's cache of the same name.

    Made by `with_capacity` to be filled, or by `open` to be read. Layers are numbered in the order in which
    they are pushed. What is returned is the caller's own memory: writing to it never reaches the file.
    Filling is for one thread at a time; reading is safe from several.
    """

    def __init__(self, writer: _LayerWriter | None, view: SiteView | None, path: Path) -> None:
        self._writer, self._view, self._path = writer, view, path
        self._closed = False
        self._remove: weakref.finalize[[Path], FullActivationCache] | None = None

    @classmethod
    def with_capacity(
        cls,
        n_layers: int,
        path: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        site: str = "resid_post",
        shard_tokens: int | None = None,
    ) -> Self:
        """Make an empty cache.

        Args:
            n_layers: how many layers are expected; a hint, more may be pushed.
            path: its folder, which must not hold a store; None for a temporary one (where `tempfile` keeps
                them: set TMPDIR to move it off a small or in-memory /tmp), which is removed on close.
            dtype: the storage dtype, to which layers are cast; None for the first layer's.
            site: what the activations are, in the names of DESIGN: `resid_post`, `mlp_in`, ….
            shard_tokens: tokens a shard where the default (256 MiB) does not fit.

        Raises:
            StoreExistsError: the path already holds a store. LockedError: another writer has it.
            ArgumentError, DtypeError: the other arguments make no sense.
        """
        if not isinstance(n_layers, int) or n_layers < 0:
            raise ArgumentError(f"n_layers is {n_layers!r}: expected a number of layers, 0 or more")
        if shard_tokens is not None and shard_tokens < 1:
            raise ArgumentError(f"shard_tokens is {shard_tokens}: expected a positive number of tokens")
        check_site_name(site)
        manifest = Manifest(
            kind="grown",
            store=secrets.token_hex(16),
            layout="layer",
            dtype=None if dtype is None else activation_dtype(dtype).name,
            sites={site: None},
            layers=(),
            n_tokens=0,
            has_tokens=False,
        )
        temporary = path is None
        folder = Path(tempfile.mkdtemp(prefix="mmcache-")) if path is None else claim(path, (site,))
        cache = cls(_LayerWriter(folder, manifest, shard_tokens, temporary=temporary), None, folder)
        if temporary:
            cache._remove = weakref.finalize(cache, remove_tree, folder)
        return cache

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a cache for reading, as of its last flush or close.

        Raises:
            StoreNotFoundError, CorruptError, VersionError: as `mmcache.open`.
            ArgumentError: the store holds many sequences.
        """
        store = open_store(path)
        if store.has_tokens:
            raise ArgumentError(f"{store.path} holds {store.n_sequences} sequences: open it with mmcache.open")
        view = store[store.sites[0]] if store.n_layers else None
        return cls(None, view, store.path)

    def push(self, tensor: torch.Tensor) -> None:
        """Add the next layer: `[seq_len, d_model]`, any device, any strides, with or without grad.

        The layer is copied into staging buffers (64 MiB at most, whatever its size) and written behind this
        call, which blocks only while the disk is behind by all of them. On CUDA a side stream copies it
        behind the work that is queued, the forward pass goes on, and the tensor is kept alive until then: do
        not write to it in place. It is durable after `flush` or `close`.

        Raises:
            ShapeError: not 2-D, empty, or another shape than the first layer's.
            DtypeError: another dtype than the first layer's, or one that cannot be stored.
            ArgumentError: `shard_tokens` does not fit the first layer.
            ClosedError, ReadOnlyError: the cache is closed, or was opened for reading.
            WriteError: the disk refused, now or for an earlier layer.
        """
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError(f"the cache {self._path} was opened for reading: make one with with_capacity")
        self._writer.push(tensor)
        manifest = self._writer.manifest
        site = next(iter(manifest.sites))
        folder = ShardFolder(self._path, manifest, site, manifest.n_tokens or 0, wait=self._writer.wait)
        self._view = SiteView(
            site, folder, "layer", manifest.layers, lambda _: (0, self.seq_len), _all, length="seq_len"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the cache {self._path} is closed: open it with FullActivationCache.open")

    def _known(self, what: str) -> SiteView:
        self._check_open()
        if self._view is None:
            raise EmptyCacheError(f"the cache {self._path} is empty: it has no {what} before the first push")
        return self._view

    def get_layer(self, layer: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Read a layer: `[seq_len, d_model]`, or None where it is not cached.

        Right after its push this blocks until the layer is written. Errors as `get_position`.
        """
        self._check_open()
        return None if self._view is None else self._view.get_layer(layer, device)

    def get_position(self, layer: int, position: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one row: `[d_model]`; negative positions count from the end.

        Right after its push this blocks until the layer is written.

        Raises:
            OutOfRangeError: the layer or the position is not in the cache.
            CorruptError: its shard is not what belongs there.
            WriteError: writing it failed. ClosedError: the cache is closed.
        """
        view = self._view
        if view is None:
            raise self._no_layer(layer)
        return view.get_position(layer, position, device)

    def get_positions(self, layer: int, positions: Positions, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read rows of one layer, in the order asked, repeats and negatives included: `[k, d_model]`.

        Errors as `get_position`; `positions` that are not a list of integers raise ShapeError or DtypeError.
        """
        view = self._view
        if view is None:
            raise self._no_layer(layer)
        return view.get_positions(layer, positions, device)

    def _no_layer(self, layer: int) -> OutOfRangeError:
        self._check_open()
        return OutOfRangeError(f"layer {layer} not in cache (n_layers=0)")

    @property
    def n_layers(self) -> int:
        """Layers pushed so far."""
        return 0 if self._view is None else len(self._view)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been pushed."""
        return self.n_layers == 0

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence. Raises EmptyCacheError before the first push."""
        return self._known("seq_len").shape[1]

    @property
    def d_model(self) -> int:
        """Numbers a row. Raises EmptyCacheError before the first push."""
        return self._known("d_model").d_model

    @property
    def dtype(self) -> torch.dtype:
        """The storage dtype. Raises EmptyCacheError before the first push."""
        return self._known("dtype").dtype

    @property
    def path(self) -> Path:
        """The cache's folder."""
        return self._path

    def __len__(self) -> int:
        return self.n_layers

    def __repr__(self) -> str:
        if self._closed:
            return f"FullActivationCache({str(self._path)!r}, closed)"
        if self._view is None:
            return f"FullActivationCache({str(self._path)!r}, empty)"
        return (
            f"FullActivationCache({str(self._path)!r}, site={self._view.name!r}, n_layers={self.n_layers}, "
            f"seq_len={self.seq_len}, d_model={self.d_model}, dtype={self.dtype})"
        )

    def flush(self) -> None:
        """Return when everything pushed so far is durable, and counts after a crash.

        Raises:
            WriteError: something could not be written; the cache is as of its last flush.
            ClosedError: the cache is closed.
        """
        self._check_open()
        if self._writer is not None:
            self._writer.commit()

    def close(self) -> None:
        """Flush, and let the cache go; a temporary one is removed. Safe to call twice. Errors as `flush`."""
        if self._closed:
            return
        self._closed, self._view = True, None
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._remove is not None:
                self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        close_after(self, error)
