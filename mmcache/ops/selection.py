"""What of a store is to be handed on: which sites and layers, cast to what, read piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmcache.errors import ArgumentError, IncompleteError, OutOfRangeError
from mmcache.format.dtypes import BY_NAME, activation_dtype
from mmcache.system.memory import anonymous

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from mmcache.read.site_view import SiteView
    from mmcache.read.store import Store

__all__ = ["Selection", "bytes_of"]

# Rows that are under way, at a time.
_PIECE_BYTES = 32 << 20


def bytes_of(rows: torch.Tensor) -> np.ndarray:
    """Look at contiguous rows on the host as `[bytes]` uint8."""
    found: np.ndarray = rows.reshape(-1).view(torch.uint8).numpy()
    return found


class Selection:
    """Some sites and layers of a store, all of whose rows are there.

    Args:
        store: an open store.
        sites: which of them; None for all.
        layers: which of them, by the model's own numbers, in the order wanted; None for all.
        dtype: what rows are cast to; None for the storage dtype.

    Raises:
        UnknownSiteError, OutOfRangeError: a site or layer is not there.
        ArgumentError: nothing is selected, or a layer twice.
        DtypeError: no dtype that activations may have.
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
        # Whether shards as they are hold exactly this.
        self.whole = self.dtype == stored and (not self.deep or self.layers == list(store.layers))
        self._check_complete()

    @property
    def deep(self) -> bool:
        """Whether a row of a shard is all layers of a token."""
        return self.manifest.layout == "token"

    @property
    def n_tokens(self) -> int:
        """How many tokens: all of the store's."""
        return self.store.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all selected rows, cast."""
        return sum(view.d_model for view in self.views.values()) * len(self.layers) * self.dtype.size * self.n_tokens

    def groups(self) -> list[tuple[int, list[int]]]:
        """Give the layers that lie in one file together, with their slot."""
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
        """Read the rows from `start` to `stop` in pieces, not cast: first position and `[k, layers, d_model]`.

        A piece is valid until the next. Raises as `SiteView.gather`.
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
        """Read `tokens` or `flags` in pieces, as `[bytes]` uint8, their checksums compared."""
        folder = self.store.array(array)
        for start in range(0, self.n_tokens, folder.spec.shard_rows):
            yield bytes_of(folder.read(start, min(start + folder.spec.shard_rows, self.n_tokens)))
