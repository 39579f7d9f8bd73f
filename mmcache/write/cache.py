"""`FullActivationCache`: every layer of one sequence, pushed layer by layer, as a store of one site."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from mmcache.errors import (
    ArgumentError,
    ClosedError,
    DtypeError,
    EmptyCacheError,
    MmcacheError,
    OutOfRangeError,
    ReadOnlyError,
    ShapeError,
)
from mmcache.format.dtypes import activation_dtype
from mmcache.format.manifest import Manifest
from mmcache.format.names import check_site_name
from mmcache.format.shard import MOST_ROWS, shard_rows
from mmcache.read.describe import cache_html
from mmcache.read.site_view import SiteView
from mmcache.read.store import open_store
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.arguments import a_folder, a_name, a_path, count, optional, public
from mmcache.system.devices import check_dense
from mmcache.system.files import make_folder, remove_tree
from mmcache.write.base_writer import BaseWriter, claim, close_after
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.shard_writer import Seal, ShardWriter

if TYPE_CHECKING:
    import os

    import torch

    from mmcache.read.site_view import Positions

__all__ = ["FullActivationCache", "LayerWriter"]


class LayerWriter(BaseWriter):
    """The writing half of a cache: a grown store without tokens, to which layers are added."""

    def __init__(self, path: Path, manifest: Manifest, asked: int | None, *, temporary: bool) -> None:
        super().__init__(path, durable=not temporary)
        self._site = next(iter(manifest.sites))
        self._asked, self._temporary = asked, temporary
        self._policy = PageCachePolicy()
        self._pushed: torch.dtype | None = None
        self._seals: list[list[Seal]] = []
        self._open: ShardWriter | None = None
        try:
            self._create(manifest, {})
        except BaseException:
            self._lock.release()
            raise
        self._begin()

    def __repr__(self) -> str:
        return f"FullActivationCache({str(self._path)!r})"

    @property
    def manifest(self) -> Manifest:
        """The metadata of what was pushed so far, committed or not."""
        return self._manifest

    def push(self, tensor: torch.Tensor) -> None:
        """Stage one layer; see `FullActivationCache.push`."""
        self._check_open()
        self._check_layer(tensor)
        manifest = self._manifest
        slot = len(manifest.layers)
        if manifest.shard_tokens is None:
            manifest = self._first(tensor)
            make_folder(self._path, self._site)
        manifest = replace(manifest, layers=(*manifest.layers, slot))
        spec = manifest.spec(self._site)
        pipeline, stager = self._start(spec.row_bytes)
        seals = []
        self._torn = "a push"
        for block in range(spec.blocks(len(tensor))):
            first, rows = block * spec.shard_rows, spec.rows_in_block(block, len(tensor))
            shard = self._open = ShardWriter(
                self._path,
                f"{self._site}/{manifest.shard_key(self._site, block, slot)}",
                spec,
                manifest.shard_metadata(self._site, block, slot),
                first,
                rows=rows,
                policy=self._policy,
                durable=self._durable,
                later=True,
            )
            stager.stage(shard, [tensor.detach()[first : first + rows]])
            stager.flush()
            seal = Seal([shard], durable=False)
            pipeline.submit(seal)
            self._open = None
            seals.append(seal)
        self._seals.append(seals)
        self._manifest, self._pushed, self._changed = manifest, tensor.dtype, True
        self._torn = None

    def _check_layer(self, tensor: torch.Tensor) -> None:
        number = len(self._manifest.layers)
        check_dense(tensor, f"layer {number}")
        if tensor.ndim != 2 or not tensor.numel():
            raise ShapeError(
                f"layer {number} has shape {list(tensor.shape)}: expected [seq_len, d_model], neither of them 0 "
                f"(a batch of one is squeezed with tensor[0])"
            )
        if self._pushed is None:
            activation_dtype(tensor.dtype, what=f"layer {number}")
            return
        expected = [self._manifest.n_tokens, self._manifest.sites[self._site]]
        if list(tensor.shape) != expected:
            raise ShapeError(
                f"layer {number} has shape {list(tensor.shape)}: expected {expected}, as the layers before it"
            )
        if tensor.dtype != self._pushed:
            activation_dtype(tensor.dtype, what=f"layer {number}")
            raise DtypeError(f"layer {number} is {tensor.dtype}: expected {self._pushed}, as the layers before it")

    def _first(self, tensor: torch.Tensor) -> Manifest:
        """The manifest, with the geometry that the first layer determines."""
        seq_len, width = tensor.shape
        dtype = activation_dtype(self._manifest.dtype or tensor.dtype)
        manifest = replace(self._manifest, dtype=dtype.name, sites={self._site: width}, n_tokens=seq_len, n_sequences=1)
        return manifest.with_geometry(shard_rows([width * dtype.size], self._asked, seq_len), seq_len)

    def wait(self, slot: int, _block: int) -> None:
        """Block until a layer's shards are in place. Raises what failed in the background."""
        for seal in self._seals[slot]:
            if not (self.ours or seal.done.is_set()):
                raise ClosedError(f"{self._path} belongs to the process that fills it: open it again to read from here")
            seal.done.wait()
        if self._pipeline is not None:
            self._pipeline.check()

    def commit(self) -> None:
        """Make everything pushed durable, and commit it."""
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
        """Commit and release; a temporary cache, which is about to be removed, is not committed."""
        self._changed = self._changed and not self._temporary
        super().close()

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.discard()


def _remove(writer: LayerWriter, folder: Path) -> None:
    """Close and remove a temporary cache, but not in a fork of the process that made it."""
    if not writer.ours:
        return
    dropped = not writer.closed
    with contextlib.suppress(MmcacheError):
        writer.close()
    remove_tree(folder)
    if dropped:
        warnings.warn(f"{writer!r}, a temporary cache, was never closed", ResourceWarning, stacklevel=2)


def _all(start: int, stop: int) -> np.ndarray:
    """Which tokens count in the statistics: all, since no token of a cache is known to be special."""
    return np.ones(stop - start, bool)


class FullActivationCache:
    """Every layer's activations of one sequence, on disk, like candle-mi's class of the same name.

    Made by `with_capacity` to be filled, or by `open` to be read. Layers are numbered in the order in which
    they are pushed. What is returned is the caller's own memory: writing to it never reaches the file.
    Pushing is for one thread at a time; reading is safe from several.
    """

    def __init__(self, writer: LayerWriter | None, view: SiteView | None, path: Path) -> None:
        self._writer, self._read, self._path = writer, view, path
        # The manifest that `_read` was made of, in a cache that is being filled.
        self._shown: Manifest | None = None
        self._closed = False
        self._remove: weakref.finalize[[LayerWriter, Path], FullActivationCache] | None = None

    @classmethod
    @public(n_layers=count(0), path=optional(a_folder), site=a_name, shard_tokens=optional(count(1, MOST_ROWS)))
    def with_capacity(
        cls,
        n_layers: int,  # noqa: ARG003 -- a hint, which nothing needs yet
        path: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        site: str = "resid_post",
        shard_tokens: int | None = None,
    ) -> Self:
        """Make an empty cache.

        Args:
            n_layers: the expected number of layers; a hint, more may be pushed.
            path: its folder, which must not hold a store. None for a temporary folder, which is removed on close (in
                `tempfile`'s directory: set TMPDIR if /tmp is small or in memory).
            dtype: the storage dtype, to which layers are cast; None for the first layer's.
            site: the name of the site, such as `resid_post` or `mlp_in`.
            shard_tokens: tokens per shard; None for shards of up to 256 MiB.

        Raises:
            StoreExistsError: the path already holds a store. LockedError: another writer has it.
            ArgumentError, DtypeError: another argument is invalid.
        """
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
        try:
            writer = LayerWriter(folder, manifest, shard_tokens, temporary=temporary)
        except BaseException:
            if temporary:
                remove_tree(folder)
            raise
        cache = cls(writer, None, folder)
        if temporary:
            cache._remove = weakref.finalize(cache, _remove, writer, folder)
        return cache

    @classmethod
    @public(path=a_path)
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

        The layer is copied into staging buffers (64 MiB at most, whatever its size) and written in the background.
        This call blocks only while all buffers wait for the disk. From CUDA, a side stream copies the layer to the
        host while the forward pass continues; later work of the current stream may overwrite the tensor at once.
        The layer is durable after `flush` or `close`.

        Raises:
            ShapeError: not 2-D, empty, or of another shape than the first layer.
            DtypeError: of another dtype than the first layer, or of one that cannot be stored.
            ArgumentError: `shard_tokens` does not fit the first layer.
            ClosedError, ReadOnlyError: the cache is closed, or was opened for reading.
            WriteError: writing this or an earlier layer failed.
        """
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError(f"the cache {self._path} was opened for reading: make one with with_capacity")
        self._writer.push(tensor)

    @property
    def _view(self) -> SiteView | None:
        """A view of the layers so far; None if there are none. Made on demand, so that pushing takes no time for it."""
        if self._writer is None or self._closed:
            return self._read
        manifest = self._writer.manifest
        if manifest.layers and manifest is not self._shown:
            site, seq_len = next(iter(manifest.sites)), manifest.n_tokens or 0
            folder = ShardFolder(self._path, manifest, site, seq_len, wait=self._writer.wait)
            # Nothing here refers to the cache: a temporary one is removed with its last reference.
            self._read = SiteView(
                site, folder, "layer", manifest.layers, lambda _: (0, seq_len), _all, length="seq_len"
            )
            self._shown = manifest
        return self._read

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the cache {self._path} is closed: open it with FullActivationCache.open")

    def _known(self, what: str) -> SiteView:
        self._check_open()
        view = self._view
        if view is None:
            raise EmptyCacheError(f"the cache {self._path} is empty: it has no {what} before the first push")
        return view

    def get_layer(self, layer: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Read a layer: `[seq_len, d_model]`, or None if it is not cached.

        Right after its push this blocks until the layer is written. Errors as `get_position`.
        """
        self._check_open()
        return None if self._view is None else self._view.get_layer(layer, device)

    def get_position(self, layer: int, position: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one row: `[d_model]`; negative positions count from the end.

        Right after its push this blocks until the layer is written.

        Raises:
            OutOfRangeError: the layer or the position is not in the cache.
            CorruptError: its shard is damaged, or not the one that belongs there.
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
        """The number of layers pushed so far."""
        self._check_open()
        return 0 if self._view is None else len(self._view)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been pushed."""
        return self.n_layers == 0

    @property
    def seq_len(self) -> int:
        """The number of tokens of the sequence. Raises EmptyCacheError before the first push."""
        return self._known("seq_len").shape[1]

    @property
    def d_model(self) -> int:
        """Values per row. Raises EmptyCacheError before the first push."""
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

    def _repr_html_(self) -> str:
        state = "closed" if self._closed else "open for reading" if self._writer is None else "being filled"
        return cache_html(self._path, state, self._view)

    def flush(self) -> None:
        """Commit everything pushed so far; blocks until it is durable.

        Raises:
            WriteError: something could not be written; the cache on disk is as of its last flush.
            ClosedError: the cache is closed.
        """
        self._check_open()
        if self._writer is not None:
            self._writer.commit()

    def close(self) -> None:
        """Flush, and release the cache; a temporary one is removed instead. Safe to call twice. Errors as `flush`."""
        if self._closed and (self._writer is None or self._writer.closed):
            return
        self._closed, self._read = True, None
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
