"""What `append` is given, checked as a whole before any of it is kept, and cut into sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from mmcache.errors import ArgumentError, DtypeError, ShapeError, UnknownSiteError
from mmcache.format.dtypes import activation_dtype
from mmcache.format.token_flags import FIRST
from mmcache.system.devices import check_dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mmcache.format.manifest import Manifest
    from mmcache.write.block import Run

__all__ = ["Activations", "Ids", "SequenceRows", "check_batch", "runs_by_block"]

Ids: TypeAlias = "torch.Tensor | np.ndarray | Sequence[Any]"
Activations: TypeAlias = "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]"


@dataclass
class SequenceRows:
    """One sequence: `tokens` int64 and `flags` uint8 `[n]`, and a `[n, d_model]` tensor a layer of each site."""

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
    """Give one `[batch, seq, d_model]` tensor a layer, or refuse."""
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

    The activations are views of the caller's tensors wherever the mask is one run of ones.

    Raises:
        ShapeError, DtypeError, UnknownSiteError, ArgumentError: with what was found and what was expected.
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
    """Cut sequences into the runs of each block that they go to, from token `at` of the store on.

    Args:
        batch: the sequences.
        keeps: of each, which rows count in the statistics: `[n]` bool.
        at: the position of the first token.
        shard_tokens: tokens a block.
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
