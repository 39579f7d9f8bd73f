"""Reading a store: `open_store`, and `Store` with its sites, tokens and sequences."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from mmcache.errors import ArgumentError, CorruptError, IncompleteError, OutOfRangeError, UnknownSiteError
from mmcache.format.dtypes import BY_NAME
from mmcache.format.manifest import read_manifest
from mmcache.format.token_flags import counted
from mmcache.read.describe import store_html
from mmcache.read.positions import span_of, whole_number
from mmcache.read.site_view import MAX_MAPS, SiteView
from mmcache.read.tokens import Location, Sequences, TokenArrays
from mmcache.stats.site_statistics import load_summary
from mmcache.storage.connection import placed
from mmcache.storage.listing import count_shards
from mmcache.storage.mirror import Mirror
from mmcache.storage.shard_folder import ShardFolder
from mmcache.storage.tokenizer_file import read_tokenizer
from mmcache.system.arguments import a_folder, a_path, a_switch, count, instance, optional, public, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    import xarray

    from mmcache.format.manifest import Manifest

__all__ = ["Store", "a_store", "open_store", "reopened"]

T = TypeVar("T")


class Store:
    """Activations of several sites, with their tokens and sequences. Made by `mmcache.open`.

    Read-only, and safe to use from several threads. `tokens` and `flags` are read once and then shared by all
    callers; writing to them never reaches the file. Everything else that is returned is the caller's own.
    """

    def __init__(self, path: Path, manifest: Manifest, *, check: bool = False, remote: Mirror | None = None) -> None:
        self.path, self._check, self._remote = path, check, remote
        self._manifest = manifest
        self._views: dict[str, SiteView] = {}
        self._arrays = TokenArrays(manifest, self._folder, self.where)

    @property
    def url(self) -> str | None:
        """The address of a store in a bucket (`path` is then the folder of its metadata); None for a local store."""
        return None if self._remote is None else self._remote.url

    @property
    def where(self) -> str:
        """Where the store is: its folder, or its address."""
        return self.url or str(self.path)

    @property
    def remote(self) -> Mirror | None:
        """The `Mirror` that fetches the shards of a store in a bucket; None for a local store."""
        return self._remote

    @property
    def check(self) -> bool:
        """Whether rows are read without mapping, and their checksums compared."""
        return self._check

    @property
    def manifest(self) -> Manifest:
        """The store's metadata, of its root `zarr.json`."""
        return self._manifest

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(self._manifest.sites)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own numbers of the stored layers, ascending; the same for every site."""
        return self._manifest.layers

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self._manifest.layers)

    @property
    def n_tokens(self) -> int:
        """The number of tokens that the root `zarr.json` counts."""
        return self._manifest.n_tokens or 0

    @property
    def n_sequences(self) -> int:
        """The number of sequences that the root `zarr.json` counts."""
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
        """Tokens per shard; None for a cache that nothing was pushed to."""
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
        """The user's `metadata=` of `create`, a copy."""
        return deepcopy(self._manifest.metadata)

    @property
    def source(self) -> dict[str, Any]:
        """Where the data came from (identity, numerics, record), as `extract` recorded it, a copy."""
        return deepcopy(self._manifest.source)

    def tokenizer_json(self) -> str | None:
        """The store's tokenizer, in the JSON of Hugging Face's `tokenizers`; None if it has none.

        Raises:
            CorruptError, StoreNotFoundError: it is damaged, or missing.
        """
        return self._metadata(lambda: read_tokenizer(self.path, self._manifest))

    def _metadata(self, read: Callable[[], T]) -> T:
        """The result of `read`, which reads metadata; for a store in a bucket, through `Mirror.reread`."""
        return read() if self._remote is None else self._remote.reread(read)

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids: `[n_tokens]` int32; -1 if unknown, as in a cache."""
        return self._arrays.whole("tokens")

    @property
    def flags(self) -> torch.Tensor:
        """The flags of each token: `[n_tokens]` uint8; `flag_bits` names the library's own bits."""
        return self._arrays.whole("flags")

    @property
    def flag_bits(self) -> dict[str, int]:
        """Bits of `flags` by name: bos 1, special 2, first 4 (of each sequence).

        Tokens with any of them are left out of the statistics. Stores made before first tokens were flagged have no
        `first`: there, bit 4 is the user's own.
        """
        return self._manifest.flag_bits

    def read_tokens(self, start: int, stop: int) -> torch.Tensor:
        """Read only the ids of the tokens from `start` to before `stop`, as `tokens`. Raises OutOfRangeError."""
        return self._arrays.piece("tokens", *span_of(start, stop, self.n_tokens, "n_tokens"))

    def read_flags(self, start: int, stop: int) -> torch.Tensor:
        """Read only the flags of the tokens from `start` to before `stop`, as `flags`. Raises OutOfRangeError."""
        return self._arrays.piece("flags", *span_of(start, stop, self.n_tokens, "n_tokens"))

    def shards(self, site: str) -> ShardFolder:
        """The shard files of a site, for code that needs no rows. Raises UnknownSiteError, IncompleteError."""
        if self.d_model(site) is None or self._manifest.shard_tokens is None:
            raise IncompleteError(f"site {site!r} of {self.where} has no rows yet")
        return self._folder(site)

    def _folder(self, array: str) -> ShardFolder:
        return ShardFolder(self.path, self._manifest, array, self._manifest.rows(array), remote=self._remote)

    def array(self, name: str) -> ShardFolder:
        """The shard files of `tokens`, `flags` or `sequences`, as `shards` for a site."""
        return self._folder(name)

    @property
    def sequences(self) -> Sequences:
        """The contexts that the model saw, in order; together they cover all tokens."""
        return self._arrays.sequences

    def locate(self, position: int) -> Location:
        """The sequence of a position, the offset in it, and the token id.

        Raises:
            OutOfRangeError: there is no such position.
        """
        position = whole_number("position", position)
        if not -self.n_tokens <= position < self.n_tokens:
            raise OutOfRangeError(f"position {shown(position)} not in store (n_tokens={self.n_tokens})")
        position %= self.n_tokens
        number = self.sequences.find(position)
        return Location(
            number, position - self.sequences[number].start, int(self.read_tokens(position, position + 1)[0])
        )

    def __getitem__(self, site: str) -> SiteView:
        view = self._views.get(site) if isinstance(site, str) else None
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
                fits=self.fits,
                summary=lambda: self._metadata(lambda: load_summary(self.path, self._manifest, site)),
            )
            self._views[site] = view
        return view

    @property
    def fits(self) -> bool:
        """Whether all sites of a store in a bucket fit into the cache together; False for a local store."""
        return self._remote is not None and sum(map(self.site_bytes, self.sites)) <= self._remote.cache.most_bytes

    def counted(self, start: int, stop: int) -> np.ndarray:
        """Which tokens count in the statistics (have none of `flag_bits`): `[stop - start]` bool."""
        return counted(self.read_flags(start, stop).numpy(), self._manifest.left_out)

    def __contains__(self, site: object) -> bool:
        return site in self._manifest.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.sites)

    def __repr__(self) -> str:
        return (
            f"Store({self.where!r}, sites={list(self.sites)}, n_layers={self.n_layers}, "
            f"n_tokens={self.n_tokens}, n_sequences={self.n_sequences}, dtype={self.dtype}, layout={self.layout!r})"
        )

    _repr_html_ = store_html

    def to_xarray(self, *, dtype: torch.dtype | str | None = None) -> xarray.Dataset:
        """A lazy dataset, its sites read as `dtype` (None: as stored). For details see `to_xarray.as_dataset`."""
        from mmcache.read.to_xarray import as_dataset  # noqa: PLC0415 -- an extra, and slow to import

        views = {site: self[site] for site in self.sites}
        return as_dataset(
            self.where, self._folder, self._manifest, views, lambda: np.asarray(self.sequences)[:, 0], dtype
        )

    def missing(self, site: str) -> int:
        """The number of a site's shards that have not been written yet, from one listing of its folder."""
        if self._manifest.shard_tokens is None:
            return 0
        return self.n_shards(site) - count_shards(self.path, self._manifest, site, self.n_tokens)

    def d_model(self, site: str) -> int | None:
        """The width of a site; None for a cache that nothing was pushed to.

        Raises:
            UnknownSiteError: the store has no such site.
        """
        if not isinstance(site, str) or site not in self._manifest.sites:
            raise UnknownSiteError(f"site {shown(site)} not in {self.where} (sites: {', '.join(self.sites)})")
        return self._manifest.sites[site]

    def site_bytes(self, site: str) -> int:
        """The bytes of a complete site, headers, padding and statistics included."""
        self.d_model(site)
        return self._manifest.array_bytes(site)

    def n_shards(self, site: str) -> int:
        """The number of shards of a complete site."""
        self.d_model(site)
        return self._manifest.n_shards(site)

    def close(self) -> None:
        """Drop every map; reading makes them again."""
        for view in self._views.values():
            view._forget()  # noqa: SLF001 -- a store and its views are one thing to users

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Path, Manifest]]:
        # With this manifest: a grown store may have more tokens by the time that the copy is opened.
        return partial(Store, check=self._check, remote=self._remote), (self.path, self._manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


a_store = instance(Store, "mmcache.open")


@public(
    path=a_path,
    partial=a_switch,
    check=a_switch,
    cache_dir=optional(a_folder),
    cache_bytes=optional(count(1)),
)
def open_store(
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    check: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store for reading. Reads only its metadata and one listing per site.

    Args:
        path: the store's folder, or its address in a bucket, such as `s3://bucket/acts` (also `gs://`, `az://`,
            `file://`), with credentials as each ecosystem finds them.
        partial: open a store even if shards are missing; reading rows of those raises `IncompleteError`.
        check: read rows without mapping them, and compare the checksum of every inner chunk (of up to 4 MiB) that
            they lie in. Far slower for scattered rows. Without it, a file that is truncated during a read ends the
            process (SIGBUS), and only `verify` compares the checksums of rows.
        cache_dir: for a store in a bucket, the folder that caches what is fetched. Any number of stores and of the
            user's processes may share it; None for `$MMCACHE_CACHE`, or the user's cache folder. Its disk limits the
            speed of downloads.
        cache_bytes: what shards may take in the cache; the least recently used are evicted. None for a quarter of the
            free disk space, up to 64 GiB.

    Raises:
        StoreNotFoundError: there is no store, or no bucket.
        IncompleteError: shards are missing, and `partial` is false.
        CorruptError: the metadata is damaged, or shards that were committed are gone and `partial` is false.
        VersionError: a format version that this library does not read.
        AccessError, RemoteError: object storage refuses, or does not answer.
        ArgumentError: a cache was given for a local store, or belongs to another user or is writable for everyone;
            obstore is not installed.
    """
    place = placed(path)
    if isinstance(place, str):
        mirror = Mirror(place, cache_dir, cache_bytes)
        mirror.bucket.warn_of(mirror.strange)
        return _opened(mirror.folder, mirror, partial=partial, check=check)
    if cache_dir is not None or cache_bytes is not None:
        raise ArgumentError(f"{path} is a folder, and needs no cache: cache_dir and cache_bytes are for addresses")
    return _opened(place, None, partial=partial, check=check)


def _opened(folder: Path, remote: Mirror | None, *, partial: bool, check: bool) -> Store:
    manifest = read_manifest(folder)
    store = Store(folder, manifest, check=check, remote=remote)
    if manifest.kind == "planned" and manifest.n_tokens is None:
        raise IncompleteError(f"{store.where} is still being planned: run the same `mmcache extract` again")
    for site in () if partial else store.sites:
        if not (gone := store.missing(site)):
            continue
        all_of_them = store.n_shards(site)
        if manifest.kind == "grown":
            raise CorruptError(
                f"{store.where}: {gone} of {all_of_them} shards of {site} are gone. Restore them, or open it with "
                f"partial=True to read the others; `mmcache verify` lists them"
            )
        raise IncompleteError(
            f"{store.where} is not complete: {gone} of {all_of_them} shards of {site} are missing. Run the same "
            f"`mmcache extract` again to go on, or open it with partial=True"
        )
    return store


def reopened(store: Store) -> Store:
    """Open a store again in its present state, with its own maps; shards may be missing. Errors as `open_store`."""
    return _opened(store.path, store.remote, partial=True, check=store.check)
