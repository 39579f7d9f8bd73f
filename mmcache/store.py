"""A store, read: its sites, its tokens, its sequences."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from mmcache.dtypes import BY_NAME
from mmcache.errors import CorruptError, IncompleteError, OutOfRangeError, UnknownSiteError
from mmcache.flags import counted
from mmcache.html import store_html
from mmcache.listing import count_shards
from mmcache.manifest import Manifest, read_manifest
from mmcache.sequences import Location, Sequences
from mmcache.shards import MANY, ShardFolder
from mmcache.site_view import MAX_MAPS, SiteView
from mmcache.summary import load_summary
from mmcache.tokenizer_file import read_tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import xarray

__all__ = ["Store", "open_store"]


class Store:
    """Activations of several sites, with their tokens and sequences. Made by `mmcache.open`.

    Reading only, and safe from several threads. `tokens` and `flags` are read once and then shared by all who
    ask; writing to them never reaches the file. Everything else that is returned is the caller's own.
    """

    def __init__(self, path: Path, manifest: Manifest, *, check: bool = False) -> None:
        self.path, self._check = path, check
        self._manifest = manifest
        self._views: dict[str, SiteView] = {}
        self._tokens: torch.Tensor | None = None
        self._flags: torch.Tensor | None = None
        self._sequences: Sequences | None = None

    @property
    def check(self) -> bool:
        """Whether rows are read without maps, and their checksums compared."""
        return self._check

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself."""
        return self._manifest

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(self._manifest.sites)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own numbers of the layers that are there, ascending; the same for every site."""
        return self._manifest.layers

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self._manifest.layers)

    @property
    def n_tokens(self) -> int:
        """How many tokens count."""
        return self._manifest.n_tokens or 0

    @property
    def n_sequences(self) -> int:
        """How many sequences count."""
        return self._manifest.n_sequences

    @property
    def dtype(self) -> torch.dtype | None:
        """The storage dtype of all sites; None for a cache that nothing was pushed to."""
        return None if self._manifest.dtype is None else BY_NAME[self._manifest.dtype].torch

    @property
    def layout(self) -> str:
        """`"layer"` or `"token"`."""
        return self._manifest.layout

    @property
    def shard_tokens(self) -> int | None:
        """How many tokens a shard holds; None for a cache that nothing was pushed to."""
        return self._manifest.shard_tokens

    @property
    def kind(self) -> str:
        """`"planned"` (made by `extract`) or `"grown"` (made by `create`, or a cache)."""
        return self._manifest.kind

    @property
    def has_tokens(self) -> bool:
        """Whether token ids, flags and sequences were stored; a cache has none."""
        return self._manifest.has_tokens

    @property
    def metadata(self) -> dict[str, Any]:
        """What the user gave to `create`, in a copy."""
        return deepcopy(self._manifest.metadata)

    @property
    def source(self) -> dict[str, Any]:
        """Where the data came from (identity, numerics, record), as `extract` wrote it down, in a copy."""
        return deepcopy(self._manifest.source)

    def tokenizer_json(self) -> str | None:
        """Read the tokenizer that `extract` kept, in the JSON of Hugging Face's `tokenizers`; None where there is none.

        Raises:
            CorruptError, StoreNotFoundError: it is damaged, or gone.
        """
        return read_tokenizer(self.path, self._manifest)

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids: `[n_tokens]` int32; -1 where they are not known, as in a cache."""
        if self._tokens is None:
            self._tokens = self._column("tokens", -1)
        return self._tokens

    @property
    def flags(self) -> torch.Tensor:
        """The flags of each token: `[n_tokens]` uint8; bit 0 is BOS, bit 1 special, the others the user's own."""
        if self._flags is None:
            self._flags = self._column("flags", 0)
        return self._flags

    def read_tokens(self, start: int, stop: int) -> torch.Tensor:
        """Read the ids of the tokens from `start` to before `stop`, which are there, and no others: as `tokens`."""
        return self._piece(self._tokens, "tokens", -1, start, stop)

    def read_flags(self, start: int, stop: int) -> torch.Tensor:
        """Read the flags of the tokens from `start` to before `stop`, which are there, and no others: as `flags`."""
        return self._piece(self._flags, "flags", 0, start, stop)

    def _piece(self, whole: torch.Tensor | None, array: str, unknown: int, start: int, stop: int) -> torch.Tensor:
        if whole is not None:
            return whole[start:stop]
        if not self._manifest.has_tokens:
            return torch.full((stop - start,), unknown, dtype=self._manifest.spec(array).dtype.torch)
        return ShardFolder(self.path, self._manifest, array, self.n_tokens).read(start, stop)

    def shards(self, site: str) -> ShardFolder:
        """Give the files of a site, for those who look at them rather than at rows. Raises UnknownSiteError."""
        if self.d_model(site) is None or self._manifest.shard_tokens is None:
            raise IncompleteError(f"site {site!r} of {self.path} has no rows yet")
        return ShardFolder(self.path, self._manifest, site, self.n_tokens)

    def _column(self, array: str, unknown: int) -> torch.Tensor:
        if not self._manifest.has_tokens:
            # Of a small cache, some shards may be lost.
            if self.n_tokens >= MANY:
                ShardFolder(self.path, self._manifest, self.sites[0], self.n_tokens).believe_rows(0, self.n_tokens)
            return torch.full((self.n_tokens,), unknown, dtype=self._manifest.spec(array).dtype.torch)
        return ShardFolder(self.path, self._manifest, array, self.n_tokens).read(0, self.n_tokens)

    @property
    def sequences(self) -> Sequences:
        """The contexts that the model saw, in order; together they are all the tokens."""
        if self._sequences is None:
            if self._manifest.has_tokens:
                folder = ShardFolder(self.path, self._manifest, "sequences", self.n_sequences)
                spans = folder.read(0, self.n_sequences).numpy()
                if len(spans) and self._manifest.kind == "grown":
                    # A crash may leave the last one continued further than what counts.
                    spans[-1, 1] = min(spans[-1, 1], self.n_tokens)
            else:
                spans = np.array([[0, self.n_tokens, 0]][: self.n_sequences], np.int64).reshape(-1, 3)
            edges = np.append(spans[:, 0], self.n_tokens)
            if (edges[0] if len(spans) else self.n_tokens) or (spans[:, 1] != edges[1:]).any():
                raise CorruptError(f"{self.path}: its sequences do not follow each other up to {self.n_tokens} tokens")
            self._sequences = Sequences(spans)
        return self._sequences

    def locate(self, position: int) -> Location:
        """Say in which sequence a position lies, how far in, and which token it is.

        Raises:
            OutOfRangeError: there is no such position.
        """
        if not -self.n_tokens <= position < self.n_tokens:
            raise OutOfRangeError(f"position {position} not in store (n_tokens={self.n_tokens})")
        position %= self.n_tokens
        number = self.sequences.find(position)
        return Location(
            number, position - self.sequences[number].start, int(self.read_tokens(position, position + 1)[0])
        )

    def __getitem__(self, site: str) -> SiteView:
        view = self._views.get(site)
        if view is None:
            view = SiteView(
                site,
                self.shards(site),
                self.layout,
                self.layers,
                lambda index: self.sequences[index][:2],
                self.counted,
                length="n_tokens" if self.has_tokens else "seq_len",
                max_maps=max(1, MAX_MAPS // len(self.sites)),
                check=self._check,
                summary=lambda: load_summary(self.path, self._manifest, site),
            )
            self._views[site] = view
        return view

    def counted(self, start: int, stop: int) -> np.ndarray:
        """Tell which tokens count in the statistics, being neither BOS nor special: `[stop - start]` bool."""
        return counted(self.read_flags(start, stop).numpy())

    def __contains__(self, site: object) -> bool:
        return site in self._manifest.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.sites)

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path)!r}, sites={list(self.sites)}, n_layers={self.n_layers}, "
            f"n_tokens={self.n_tokens}, n_sequences={self.n_sequences}, dtype={self.dtype}, layout={self.layout!r})"
        )

    _repr_html_ = store_html

    def to_xarray(self, *, dtype: torch.dtype | str | None = None) -> xarray.Dataset:
        """Give a lazy dataset, sites read as `dtype` (None: as stored). All about it: `xarray_view.as_dataset`."""
        from mmcache.xarray_view import as_dataset  # noqa: PLC0415 -- an extra, and slow to import

        views = {site: self[site] for site in self.sites}
        return as_dataset(self.path, self._manifest, views, lambda: np.asarray(self.sequences)[:, 0], dtype)

    def missing(self, site: str) -> int:
        """Count the shards of a site that have not been written yet, from one listing of its folder."""
        if self._manifest.shard_tokens is None:
            return 0
        return self.n_shards(site) - count_shards(self.path, self._manifest, site, self.n_tokens)

    def d_model(self, site: str) -> int | None:
        """Give the width of a site; None for a cache that nothing was pushed to.

        Raises:
            UnknownSiteError: the store has no such site.
        """
        if site not in self._manifest.sites:
            raise UnknownSiteError(f"site {site!r} not in {self.path} (sites: {', '.join(self.sites)})")
        return self._manifest.sites[site]

    def site_bytes(self, site: str) -> int:
        """Give the bytes that a site takes when it is complete, headers, padding and statistics included."""
        return self._manifest.array_bytes(site)

    def n_shards(self, site: str) -> int:
        """Count the shards that a site has when it is complete."""
        return self._manifest.n_shards(site)

    def close(self) -> None:
        """Let go of every map. Reading again brings them back."""
        for view in self._views.values():
            view._forget()  # noqa: SLF001 -- a store and its views are one thing to users

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Path, Manifest]]:
        # As of now: a grown store that is opened elsewhere later may count more.
        return partial(Store, check=self._check), (self.path, self._manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(path: str | os.PathLike[str], *, partial: bool = False, check: bool = False) -> Store:
    """Open a store for reading, from its metadata and one listing a site alone.

    Args:
        path: the store's folder.
        partial: open a store of which shards are missing; reading rows that are not there then raises
            `IncompleteError`.
        check: read rows without mapping them, and compare the checksum of every inner chunk (of up to 4 MiB) that
            they lie in. Far slower where rows are scattered. Without it, a file that is cut short in the course of a
            read ends the process (SIGBUS), and checksums of rows are for `verify` to compare.

    Raises:
        StoreNotFoundError: there is no store.
        IncompleteError: shards are missing, and `partial` is false.
        CorruptError: the metadata is damaged, or shards that were committed are gone and `partial` is false.
        VersionError: a format version that this library does not read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    store = Store(folder, manifest, check=check)
    if manifest.kind == "planned" and manifest.n_tokens is None:
        raise IncompleteError(f"{folder} is still being planned: run the same `mmcache extract` again")
    for site in () if partial else store.sites:
        if not (gone := store.missing(site)):
            continue
        all_of_them = store.n_shards(site)
        if manifest.kind == "grown":
            raise CorruptError(
                f"{folder}: {gone} of {all_of_them} shards of {site} are gone. Restore them, or open it with "
                f"partial=True to read the others; `mmcache verify` lists them"
            )
        raise IncompleteError(
            f"{folder} is not complete: {gone} of {all_of_them} shards of {site} are missing. Run the same "
            f"`mmcache extract` again to go on, or open it with partial=True"
        )
    return store
