"""Export a store, or a part of it, as safetensors or npy files: a folder that appears atomically.

Shards are safetensors files already. A shard that is wanted as a whole becomes a hard link, which takes no time and no
room. FORMAT.md in the package describes its content; `index.json` says which file holds which site, layers and tokens.

Sources: the safetensors README, "Format" (https://github.com/huggingface/safetensors), and numpy's NEP 1.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from mmcache.errors import ArgumentError, DiskFullError, IncompleteError, OutOfRangeError
from mmcache.format.dtypes import BY_NAME, activation_dtype
from mmcache.format.shard import parse_header
from mmcache.read.store import Store, open_store
from mmcache.system.arguments import a_callable, a_folder, choice, layer_numbers, names, optional, public
from mmcache.system.atomic import publish
from mmcache.system.atomic_folder import AtomicFolder
from mmcache.system.files import free_bytes, make_folder, open_file, read_page
from mmcache.system.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mmcache.read.site_view import SiteView
    from mmcache.system.atomic import AtomicFile

__all__ = ["Exported", "Kind", "Selection", "bytes_of", "export", "npy_header", "safetensors_header"]

# How many bytes of rows are in memory at a time.
_PIECE_BYTES = 32 << 20


def bytes_of(rows: torch.Tensor) -> np.ndarray:
    """Contiguous rows in host memory as `[bytes]` uint8, without a copy."""
    found: np.ndarray = rows.reshape(-1).view(torch.uint8).numpy()
    return found


class Selection:
    """Some sites and layers of a store. None of their rows may be missing.

    Args:
        store: an open store.
        sites: the sites to take; None for all.
        layers: the layers to take, by the model's numbers, in this order; None for all.
        dtype: the dtype that rows are cast to; None for the storage dtype.

    Raises:
        UnknownSiteError, OutOfRangeError: there is no such site or layer.
        ArgumentError: nothing is selected, or a layer twice.
        DtypeError: activations cannot have this dtype.
        IncompleteError: shards of the selection are missing.
    """

    def __init__(
        self,
        store: Store,
        sites: Sequence[str] | None,
        layers: Sequence[int] | None,
        dtype: torch.dtype | str | None,
    ) -> None:
        self.store = store
        self.manifest = store._manifest  # noqa: SLF001 -- a store and its manifest are one thing
        self.views = {site: store[site] for site in (store.sites if sites is None else dict.fromkeys(sites))}
        self.layers = list(store.layers if layers is None else layers)
        unknown = [layer for layer in self.layers if layer not in store.layers]
        if unknown:
            raise OutOfRangeError(f"layer {unknown[0]} not in {store.where} (layers: {list(store.layers)})")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ArgumentError(f"layers are {self.layers}: expected at least one, and each once")
        if not self.views or not store.n_tokens:
            raise ArgumentError(f"nothing is selected: {len(self.views)} sites, {store.n_tokens} tokens")
        stored = BY_NAME[self.manifest.dtype or ""]
        self.dtype = stored if dtype is None else activation_dtype(dtype)
        # Whether the shards hold exactly the selection, so that they can be linked.
        self.whole = self.dtype == stored and (not self.deep or self.layers == list(store.layers))
        self._check_complete()

    @property
    def deep(self) -> bool:
        """Whether a shard's row holds all layers of a token."""
        return self.manifest.layout == "token"

    @property
    def n_tokens(self) -> int:
        """The number of tokens: always all of the store's."""
        return self.store.n_tokens

    @property
    def nbytes(self) -> int:
        """The bytes of all selected rows, after the cast."""
        return sum(view.d_model for view in self.views.values()) * len(self.layers) * self.dtype.size * self.n_tokens

    def groups(self) -> list[tuple[int, list[int]]]:
        """The layers that share a file, with their slot."""
        if self.deep:
            return [(0, self.layers)]
        return [(self.store.layers.index(layer), [layer]) for layer in self.layers]

    def _check_complete(self) -> None:
        wanted = [slot for slot, _ in self.groups()]
        for site in self.views:
            gone = int((~self.store.shards(site).present()[wanted]).sum())
            if gone:
                raise IncompleteError(
                    f"{self.store.where}: {gone} shards of {site} that are needed are not there yet. Run the same "
                    f"`mmcache extract` again, or select other sites or layers"
                )

    def pieces(
        self, view: SiteView, layers: list[int], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows from `start` to `stop` in pieces, not cast: first position and `[k, layers, d_model]`.

        Each piece is valid until the next one is asked for. Raises as `SiteView.gather`.
        """
        stop = self.n_tokens if stop is None else stop
        row = len(layers) * view.d_model
        step = max(1, _PIECE_BYTES // (row * view.dtype.itemsize))
        memory = torch.from_numpy(anonymous(min(step, stop - start) * row * view.dtype.itemsize)).view(view.dtype)
        for first in range(start, stop, step):
            count = min(step, stop - first)
            rows = memory[: count * row].view(count, len(layers), view.d_model)
            yield first, view.gather(range(first, first + count), layers=layers, out=rows)

    def columns(self, array: str) -> Iterator[np.ndarray]:
        """`tokens` or `flags` in pieces, as `[bytes]` uint8; checksums are checked."""
        folder = self.store.array(array)
        for start in range(0, self.n_tokens, folder.spec.shard_rows):
            yield bytes_of(folder.read(start, min(start + folder.spec.shard_rows, self.n_tokens)))


_PAGE = 4096


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]
) -> np.ndarray:
    """The header of consecutive tensors, padded so that the first one starts on a page: `[bytes]` uint8.

    Args:
        tensors: dtype code, shape and bytes of each, in the order of the file.
        metadata: the strings of `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (code, shape, size) in tensors.items():
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // _PAGE) * _PAGE - 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def npy_header(code: str, shape: tuple[int, ...]) -> np.ndarray:
    """The header of a C-ordered npy file; `code` is a dtype such as `"<f4"`: `[bytes]` uint8."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": code, "fortran_order": False, "shape": shape})
    return np.frombuffer(head.getvalue(), np.uint8)


Kind = Literal["safetensors", "npy"]
_INDEX = "index.json"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the folder, the number of files, and the bytes that were linked and written."""

    path: Path
    files: int
    linked_bytes: int
    written_bytes: int


@public(
    out=a_folder,
    to=choice("safetensors", "npy"),
    sites=optional(names),
    layers=optional(layer_numbers),
    progress=optional(a_callable),
)
def export(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Kind,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a store, or some of its sites and layers, as safetensors or npy files. Blocks until they are durable.

    `safetensors`: one file `<site>/….safetensors` per shard, with its rows in the tensor `activations`
    (`[tokens, d_model]` of one layer, or `[tokens, n_layers, d_model]`, according to the store's layout), and
    `tokens.safetensors` with `sequences` `[n, 3]`, `tokens` `[n]` and `flags` `[n]`. A shard that is wanted unchanged
    becomes a hard link, or a copy on another file system. **A link is the store's own file.** It is read-only; editing
    it would damage the store.

    `npy`: `<site>.npy`, `[n_layers, n_tokens, d_model]`, and `tokens.npy`, `flags.npy`, `sequences.npy`. numpy has no
    bfloat16, so such a site is `<site>.bf16.npy`, with the bits as uint16; read them with `.view(ml_dtypes.bfloat16)`.
    `dtype="float32"` writes exactly the same numbers, for numpy alone, in twice the room.

    `index.json` lists the files of each site with their layers and tokens, the names of the flag bits, and the source
    of the data. A cache has no tokens. The folder appears atomically, when everything is in it. If an export is killed,
    the next one to the same place removes what it left. It uses at most 256 MiB of memory. Checksums of activations are
    not checked.

    Args:
        store: an open store, or its path. It may be incomplete, if the selection is complete.
        out: the folder to make.
        to: `"safetensors"` or `"npy"`.
        sites: the sites to export; None for all.
        layers: the layers to export, by the model's numbers, in this order; None for all.
        dtype: the dtype to cast to; None for the storage dtype.
        progress: called with the bytes of rows done and the total.

    Raises:
        StoreExistsError: `out` exists.
        ArgumentError, DtypeError: an argument is invalid.
        UnknownSiteError, OutOfRangeError: there is no such site or layer.
        StoreNotFoundError, CorruptError: as `open`.
        IncompleteError: rows of the selection are missing.
        WriteError, DiskFullError: the write failed; nothing is left behind.
    """
    kinds: dict[str, type[_Export]] = {"safetensors": _Safetensors, "npy": _Npy}
    opened = store if isinstance(store, Store) else open_store(store, partial=True)
    selection = Selection(opened, sites, layers, dtype)
    folder = Path(out)
    # A loop of symbolic links does not raise here; making the folder reports it.
    real = Path(os.path.realpath(folder))
    if Path(os.path.realpath(opened.path)) in (real, *real.parents):
        raise ArgumentError(f"{folder} lies in the store {opened.path}: export to a folder outside of it")
    with AtomicFolder(folder) as box:
        job = kinds[to](selection, box, progress)
        job.check_room()
        job.run()
        publish(box.path, _INDEX, (json.dumps(job.index(), ensure_ascii=False) + "\n").encode())
        box.publish()
        return Exported(folder, box.files + 1, box.linked_bytes, box.written_bytes)


class _Export:
    """Base of both kinds of export: free space, progress, the index."""

    kind: Kind
    axes: tuple[str, ...]
    token_files: tuple[str, ...]

    def __init__(self, selection: Selection, box: AtomicFolder, progress: Callable[[int, int], None] | None) -> None:
        self.selection, self.box = selection, box
        self.files: dict[str, list[dict[str, object]]] = {site: [] for site in selection.views}
        self._done, self._progress = 0, progress

    def run(self) -> None:
        """Write everything but the index."""
        raise NotImplementedError

    def may_link(self) -> bool:
        """Whether shards will be linked instead of written."""
        return False

    def check_room(self) -> None:
        """Check that the disk has room for what will be written.

        Raises:
            DiskFullError: it has not; the error names the bytes needed and free.
        """
        chosen = self.selection
        needed = 5 * chosen.n_tokens + (0 if self.may_link() else chosen.nbytes)
        free = free_bytes(self.box.path)
        if needed > free:
            message = f"the export takes {needed} bytes, and {free} are free there: make room, or select less"
            raise DiskFullError(errno.ENOSPC, message, str(self.box.target))

    def advance(self, size: int) -> None:
        """Add to the bytes of rows done, and report them."""
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self.selection.nbytes)

    def index(self) -> dict[str, object]:
        """The content of `index.json`."""
        chosen, manifest = self.selection, self.selection.manifest
        return {
            "format": "mmcache-export/1",
            "to": self.kind,
            "store": manifest.store,
            "dtype": chosen.dtype.name,
            "axes": self.axes,
            "layers": chosen.layers,
            "n_tokens": chosen.n_tokens,
            "n_sequences": manifest.n_sequences,
            "tokens": self.token_files if manifest.has_tokens else (),
            "flags": manifest.flag_bits,
            "sites": {
                site: {"d_model": view.d_model, "files": self.files[site]} for site, view in chosen.views.items()
            },
            "metadata": manifest.metadata,
            "source": manifest.source,
        }


class _Safetensors(_Export):
    kind, token_files = "safetensors", ("tokens.safetensors",)

    @property
    def axes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("token", "layer", "d_model") if self.selection.deep else ("token", "d_model")

    def may_link(self) -> bool:
        devices = {path.stat().st_dev for path in (self.box.path, self.selection.store.path)}
        return self.selection.whole and len(devices) == 1

    def run(self) -> None:
        chosen = self.selection
        for site, view in chosen.views.items():
            spec = chosen.manifest.spec(site)
            make_folder(self.box.path, site)
            for slot, layers in chosen.groups():
                for block in range(spec.blocks(chosen.n_tokens)):
                    start = block * spec.shard_rows
                    stop = start + spec.rows_in_block(block, chosen.n_tokens)
                    name = f"{site}/{self._name(layers, start, stop)}"
                    if not (chosen.whole and self._take(site, slot, block, name)):
                        self._write(view, layers, (start, stop), name)
                    self.files[site].append({"file": name, "layers": layers, "tokens": [start, stop]})
        if chosen.manifest.has_tokens:
            self._write_tokens()

    def _name(self, layers: list[int], start: int, stop: int) -> str:
        digits = len(str(self.selection.n_tokens))
        layer = "" if self.selection.deep else f"layer-{layers[0]:03}."
        return f"{layer}tokens-{start:0{digits}}-{stop:0{digits}}.safetensors"

    def _take(self, site: str, slot: int, block: int, name: str) -> bool:
        """Link or copy a shard; False if it has more rows than count, as after a writer's crash."""
        store, manifest, box = self.selection.store, self.selection.manifest, self.box
        spec, key = manifest.spec(site), manifest.shard_key(site, block, slot)
        file = store.path / site / key
        # Check before linking, so that a file that is not a shard of this store gets no second name.
        fd, status = open_file(file, what=f"shard {key} of {site}")
        try:
            metadata = manifest.shard_metadata(site, block, slot)
            layout = parse_header(spec, read_page(fd), status.size, metadata, where=str(file))
            if layout.rows != spec.rows_in_block(block, store.n_tokens):
                return False
            linked = box.link(file, name)
            # The shard may have been replaced since it was opened.
            if linked and (box.path / name).lstat().st_ino != status.inode:
                box.unlink(name)
                linked = False
            if not linked:
                box.copy(fd, status.size, name)
        finally:
            os.close(fd)
        self.advance(layout.rows * spec.row_bytes)
        return True

    def _write(self, view: SiteView, layers: list[int], span: tuple[int, int], name: str) -> None:
        chosen = self.selection
        start, stop = span
        shape = [stop - start, *([len(layers)] if chosen.deep else []), view.d_model]
        size = math.prod(shape) * chosen.dtype.size
        said = {"store": chosen.manifest.store, "array": view.name, "layout": chosen.manifest.layout}
        said |= {"layers": ",".join(map(str, layers)), "first_token": str(start)}
        head = safetensors_header({"activations": (chosen.dtype.safetensors, shape, size)}, said)
        with self.box.draft(name, len(head) + size) as draft:
            draft.write(head, 0)
            at = len(head)
            for _, rows in chosen.pieces(view, layers, start, stop):
                data = bytes_of(rows.to(chosen.dtype.torch))
                draft.write(data, at, direct=True)
                at += len(data)
                self.advance(len(data))

    def _write_tokens(self) -> None:
        chosen = self.selection
        spans, total = chosen.store.sequences.numpy(), chosen.n_tokens
        # Widest element first, so that each tensor starts at a multiple of its element size.
        tensors = {"sequences": ("I64", list(spans.shape), spans.nbytes)}
        tensors |= {"tokens": ("I32", [total], total * 4), "flags": ("U8", [total], total)}
        head = safetensors_header(tensors, {"store": chosen.manifest.store})
        with self.box.draft(self.token_files[0], len(head) + spans.nbytes + total * 5) as draft:
            at = 0
            first = (head, spans.reshape(-1).view(np.uint8))
            for data in chain(first, chosen.columns("tokens"), chosen.columns("flags")):
                draft.write(data, at, direct=True)
                at += len(data)


class _Npy(_Export):
    kind, axes = "npy", ("layer", "token", "d_model")
    token_files = ("tokens.npy", "flags.npy", "sequences.npy")

    def run(self) -> None:
        chosen = self.selection
        bits = chosen.dtype.name == "bfloat16"
        code = "<u2" if bits else chosen.dtype.numpy.str
        for site, view in chosen.views.items():
            name = f"{site}.bf16.npy" if bits else f"{site}.npy"
            row = view.d_model * chosen.dtype.size
            with self._draft(name, code, (len(chosen.layers), chosen.n_tokens, view.d_model)) as (draft, begin):
                for _, group in chosen.groups():
                    # All layers of a piece of tokens at once, so that the store is read only once in either layout.
                    for start, rows in chosen.pieces(view, group):
                        for place, layer in enumerate(group):
                            data = bytes_of(rows[:, place].to(chosen.dtype.torch).contiguous())
                            at = chosen.layers.index(layer) * chosen.n_tokens + start
                            draft.write(data, begin + at * row, direct=True)
                            self.advance(len(data))
            self.files[site].append({"file": name, "layers": chosen.layers, "tokens": [0, chosen.n_tokens]})
        if chosen.manifest.has_tokens:
            self._write_tokens()

    @contextmanager
    def _draft(self, name: str, code: str, shape: tuple[int, ...]) -> Iterator[tuple[AtomicFile, int]]:
        """Begin a file with numpy's header: the draft, and the offset of the numbers."""
        head = npy_header(code, shape)
        with self.box.draft(name, len(head) + math.prod(shape) * np.dtype(code).itemsize) as draft:
            draft.write(head, 0)
            yield draft, len(head)

    def _write_tokens(self) -> None:
        chosen = self.selection
        spans = chosen.store.sequences.numpy()
        with self._draft("sequences.npy", "<i8", spans.shape) as (draft, begin):
            draft.write(spans.reshape(-1).view(np.uint8), begin)
        for array, code in (("tokens", "<i4"), ("flags", "|u1")):
            with self._draft(f"{array}.npy", code, (chosen.n_tokens,)) as (draft, begin):
                at = begin
                for data in chosen.columns(array):
                    draft.write(data, at, direct=True)
                    at += len(data)
