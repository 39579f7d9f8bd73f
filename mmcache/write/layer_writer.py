"""The writing half of a cache: layers of one sequence, streamed one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmcache.errors import ClosedError, DtypeError, ShapeError
from mmcache.format.dtypes import activation_dtype
from mmcache.format.shard import shard_rows
from mmcache.system.devices import check_dense
from mmcache.system.files import make_folder
from mmcache.write.base_writer import GrownStore
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.shard_writer import Seal, ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mmcache.format.manifest import Manifest

__all__ = ["LayerWriter"]


class LayerWriter(GrownStore):
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
            self._create(manifest, {})
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
        """Fix the geometry, now that the first layer is known."""
        seq_len, width = tensor.shape
        dtype = activation_dtype(self._manifest.dtype or tensor.dtype)
        manifest = replace(self._manifest, dtype=dtype.name, sites={self._site: width}, n_tokens=seq_len, n_sequences=1)
        return manifest.with_geometry(shard_rows([width * dtype.size], self._asked, seq_len), seq_len)

    def wait(self, slot: int, _block: int) -> None:
        """Block until a layer's shards are in place; raises what failed behind the caller's back."""
        for seal in self._seals[slot]:
            if not (self.ours or seal.done.is_set()):
                raise ClosedError(f"{self._path} belongs to the process that fills it: open it again to read from here")
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
