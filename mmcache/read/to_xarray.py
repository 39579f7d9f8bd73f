"""A store as a lazy `xarray.Dataset`: opening reads metadata, indexing reads what is selected. Needs no dask.

Source: xarray's "How to add a new backend" (https://docs.xarray.dev/en/stable/internals/how-to-add-new-backend.html),
a `BackendArray` behind `LazilyIndexedArray`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmcache.errors import ArgumentError
from mmcache.format.dtypes import BY_NAME, activation_dtype

try:
    import xarray
    from xarray.backends import BackendArray
    from xarray.core import indexing
except ImportError as error:
    raise ImportError("a store as an xarray.Dataset needs xarray: pip install 'mmcache[xarray]'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mmcache.format.manifest import Manifest
    from mmcache.read.site_view import SiteView
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["as_dataset"]

# Names of the dataset's own dimensions and coordinates.
_TAKEN = ("layer", "token", "d_model", "token_id", "flags", "sequence")


class _Lazy(BackendArray):  # type: ignore[misc,unused-ignore]  # untyped in some versions
    """An array that xarray indexes: `read` gets basic and orthogonal keys, and for a pointwise key its bounding box."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self.read)

    def read(self, key: tuple[Any, ...]) -> np.ndarray:
        """Read what a key of integers, slices and 1-D arrays selects, each along its own dimension."""
        raise NotImplementedError


class _Rows(_Lazy):
    """A site, `[n_layers, n_tokens, d_model]`."""

    def __init__(self, view: SiteView, layout: str, dtype: torch.dtype) -> None:
        super().__init__(view.shape, BY_NAME[str(dtype).removeprefix("torch.")].numpy)
        self._view, self._layout, self._torch = view, layout, dtype

    def read(self, key: tuple[Any, ...]) -> np.ndarray:
        slots, tokens, width = key
        layers = np.array(self._view.layers, np.int64)[slots]
        rows = self._rows(np.atleast_1d(layers).tolist(), tokens)[..., width]
        # One after the other: two integers around an array would move its dimension.
        if not isinstance(tokens, slice) and not np.ndim(tokens):
            rows = rows[:, 0]
        return rows if np.ndim(layers) else rows[0]

    def _rows(self, layers: list[int], tokens: Any) -> np.ndarray:
        """Read `[layers, tokens, d_model]`: a range layer by layer in the layer layout, all else as one gather."""
        if isinstance(tokens, slice):
            span = range(*tokens.indices(self.shape[1]))
            if self._layout == "layer" and span.step == 1:
                out = torch.empty((len(layers), len(span), self.shape[2]), dtype=self._torch)
                for place, layer in enumerate(layers):
                    out[place] = self._view[layer, span.start : span.stop]
                return self._numpy(out)
            positions = np.arange(span.start, span.stop, span.step)
        else:
            positions = np.atleast_1d(tokens)
        return self._numpy(self._view.gather(positions, layers=layers).transpose(0, 1))

    def _numpy(self, rows: torch.Tensor) -> np.ndarray:
        rows = rows.to(self._torch)
        # torch cannot convert bfloat16 to numpy; the bits are the same.
        return rows.view(torch.int16).numpy().view(self.dtype) if rows.dtype == torch.bfloat16 else rows.numpy()


class _Column(_Lazy):
    """A number per token, `[n_tokens]`, from `span(start, stop)`; scattered ones by blocks of `block` tokens."""

    def __init__(self, n_tokens: int, dtype: type, span: Callable[[int, int], np.ndarray], block: int) -> None:
        super().__init__((n_tokens,), np.dtype(dtype))
        self._span, self._block = span, block

    def read(self, key: tuple[Any, ...]) -> np.ndarray:
        (tokens,) = key
        if isinstance(tokens, slice):
            wanted = range(*tokens.indices(self.shape[0]))
            return self._span(wanted.start, wanted.stop)[:: wanted.step] if wanted else np.empty(0, self.dtype)
        positions = np.atleast_1d(tokens)
        out = np.empty(len(positions), self.dtype)
        for block in np.unique(positions // self._block).tolist():
            start = block * self._block
            here = positions // self._block == block
            out[here] = self._span(start, min(start + self._block, self.shape[0]))[positions[here] - start]
        return out if np.ndim(tokens) else out[0]


def _columns(
    folder_of: Callable[[str], ShardFolder], manifest: Manifest, starts: Callable[[], np.ndarray]
) -> dict[str, _Column]:
    """The coordinates of tokens: token ids, flags, and the number of each token's sequence."""
    total = manifest.n_tokens or 0

    def stored(array: str, unknown: int) -> _Column:
        spec = manifest.spec(array)
        folder = folder_of(array)

        def span(start: int, stop: int) -> np.ndarray:
            if not manifest.has_tokens:
                return np.full(stop - start, unknown, spec.dtype.numpy)
            found: np.ndarray = folder.read(start, stop).numpy()
            return found

        return _Column(total, spec.dtype.numpy.type, span, spec.shard_rows)

    def sequence(start: int, stop: int) -> np.ndarray:
        return np.searchsorted(starts(), np.arange(start, stop), side="right") - 1

    rows = manifest.spec("tokens").shard_rows
    return {
        "token_id": stored("tokens", -1),
        "flags": stored("flags", 0),
        "sequence": _Column(total, np.int64, sequence, rows),
    }


def as_dataset(
    where: str,
    folder_of: Callable[[str], ShardFolder],
    manifest: Manifest,
    views: Mapping[str, SiteView],
    starts: Callable[[], np.ndarray],
    dtype: torch.dtype | str | None,
) -> xarray.Dataset:
    """The dataset of `Store.to_xarray`: a variable `[layer, token, d_model]` for each site.

    The coordinate `layer` has the model's own numbers; `token_id`, `flags` (whose attributes name the bits) and
    `sequence` (the number of a token's sequence) are along `token`. Sites of different widths have a dimension
    `d_model_<site>` each. `attrs` say where the data came from, as dicts. Making the dataset reads only metadata.
    `.isel`, `.sel(layer=…)` and `.values` read what they select into the caller's own memory, each time again unless
    `.load()` keeps it. Reading blocks on the disk, and raises as reading a store does. Pointwise (vectorised) indexing
    reads the box of all layers and tokens that it names.

    numpy's bfloat16 (of ml_dtypes) can be indexed and cast, but xarray's reductions, such as `mean`, refuse it: read
    with `dtype="float32"`, or use `.astype("float32")` after selecting.

    Args:
        where: the store's name in errors.
        folder_of: returns the shards of an array.
        manifest: the store's metadata.
        views: its sites.
        starts: returns the first position of each sequence, `[n_sequences]` int64.
        dtype: the dtype that sites are read as; None for the storage dtype.

    Raises:
        ImportError: xarray is not installed (the extra `xarray`).
        ArgumentError: a site has the name of a dimension or coordinate.
        DtypeError: not a dtype that activations may have.
        IncompleteError: nothing was pushed yet; while reading, rows that were not written yet.
    """
    clash = [name for name in views if name in _TAKEN]
    if clash:
        raise ArgumentError(
            f"site {clash[0]!r} of {where} has the name of a dimension or coordinate of the dataset "
            f"({', '.join(_TAKEN)}): read it with store[{clash[0]!r}]"
        )
    widths = {view.d_model for view in views.values()}

    def lazy(dims: tuple[str, ...], array: _Lazy, **said: Any) -> xarray.Variable:
        # Copy on write, so that assigning into the dataset works and never reaches the file.
        data: Any = indexing.CopyOnWriteArray(indexing.LazilyIndexedArray(array))  # type: ignore[arg-type,unused-ignore]
        return xarray.Variable(dims, data, attrs=said)

    sites = {}
    for site, view in views.items():
        rows = _Rows(view, manifest.layout, view.dtype if dtype is None else activation_dtype(dtype).torch)
        dims = ("layer", "token", "d_model" if len(widths) == 1 else f"d_model_{site}")
        modules = manifest.source.get("modules", {}).get(site)
        sites[site] = lazy(dims, rows, **({"modules": modules} if modules else {}))
    columns = _columns(folder_of, manifest, starts)
    coordinates = {name: lazy(("token",), column) for name, column in columns.items()}
    # As the CF conventions name bits (3.5, "Flags").
    bits = manifest.flag_bits
    coordinates["flags"].attrs |= {"flag_masks": list(bits.values()), "flag_meanings": " ".join(bits)}
    coordinates["layer"] = xarray.Variable(("layer",), np.array(manifest.layers, np.int64))
    said = {name: deepcopy(getattr(manifest, name)) for name in ("store", "kind", "layout", "metadata", "source")}
    return xarray.Dataset(sites, coordinates, {"path": where, **said, "storage_dtype": manifest.dtype})
