"""The norm map, from the whole store down to single tokens; and the norms of first and special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.format.token_flags import BOS, SPECIAL
from mmcache.read.store import a_store
from mmcache.stats.site_statistics import brief_statistics
from mmcache.system.arguments import a_name, an_index, count, layer_numbers, optional, public
from mmcache.view.base import Sampler, View, written
from mmcache.view.tokens import Detokenizer, a_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.store import Store

__all__ = ["apart", "norms"]

# How many shards' norms are read for one map: a few KiB and 0.1 ms each.
_MOST_SHARDS = 1024
# A map shows single tokens if their rows take no more bytes than this.
_ROW_BYTES = 16 << 20
# How many tokens of each kind `apart` reads.
_APART = 64


@public(
    store=a_store,
    site=a_name,
    layers=optional(layer_numbers),
    start=an_index,
    stop=optional(an_index),
    bins=count(1),
    words=optional(a_words),
)
def norms(
    store: Store,
    site: str,
    *,
    layers: Sequence[int] | None = None,
    start: int = 0,
    stop: int | None = None,
    bins: int = 240,
    words: Detokenizer | None = None,
) -> View:
    """A map of the rows' Euclidean norms: layers by ranges of tokens.

    A range is one or several inner chunks. Its norms come from the shards' statistics, which leave out BOS, special and
    first tokens and rows that are not finite; no row is read. If few tokens are asked for, each is its own range, and
    their rows are read.

    Args:
        store: the store; a range without any shard is NaN.
        site: one of its sites.
        layers: the model's numbers; None for all.
        start: the first position.
        stop: the position after the last; None for the end. Ranges are widened to whole inner chunks.
        bins: the largest number of ranges.
        words: the store's detokenizer, if it was read already.

    `data`: `layers`; `edges` `[B + 1]`, positions; `mean`, `min`, `max` `[L, B]`; `rows` `[L, B]`, how many count;
    `level`, "chunks" or "tokens". For tokens also `tokens` `[B]` ids, `texts`, and `apart` `[B]`: 1 BOS or special, 2
    the first of its sequence, 3 both, 0 neither.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ArgumentError: `bins` below 1.
    """
    if bins < 1:
        raise ArgumentError(f"bins is {bins}: expected 1 or more")
    look = Sampler(store, site, layers)
    start, stop = look.span(start, stop)
    single = stop - start <= bins and (stop - start) * look.record_bytes <= _ROW_BYTES
    data, sampled = _of_tokens(look, start, stop, words) if single else _of_chunks(look, start, stop, bins)
    chosen = None if layers is None else list(layers)
    return View(
        "norms",
        f"Norms of {site}, positions {start:,} to {stop:,}",
        written(norms, site, layers=chosen, start=start, stop=stop, bins=bins),
        {"site": site, "layers": look.layers, **data},
        sampled,
        look.bytes_read,
    )


def _of_tokens(look: Sampler, start: int, stop: int, words: Detokenizer | None) -> tuple[dict[str, Any], None]:
    positions = np.arange(start, stop)
    found = look.scores(positions, None).T
    tokens = look.tokens(positions)
    special = look.flags(positions) & (BOS | SPECIAL) != 0
    first = np.isin(positions, np.asarray(look.store.sequences)[:, 0])
    return {
        "level": "tokens",
        "edges": np.arange(start, stop + 1),
        "mean": found,
        "min": found,
        "max": found,
        "rows": np.ones(found.shape, np.int64),
        "tokens": tokens,
        "texts": (words or Detokenizer(look.store)).texts(tokens.tolist()),
        "apart": special.astype(np.int64) + 2 * first,
    }, None


def _of_chunks(look: Sampler, start: int, stop: int, bins: int) -> tuple[dict[str, Any], str | None]:
    spec, total = look.folder.spec, look.store.n_tokens
    files = 1 if look.store.layout == "token" else len(look.slots)
    bins = max(1, min(bins, _MOST_SHARDS // files))
    first, last = start // spec.chunk_rows, -(-stop // spec.chunk_rows)
    # Each range is a whole number of inner chunks.
    each = -(-(last - first) // bins)
    n_bins = -(-(last - first) // each)
    edges = np.minimum((first + each * np.arange(n_bins + 1)) * spec.chunk_rows, total)
    blocks, asked = _chosen(look, first, last, each)
    sums = np.zeros((2, len(look.slots), n_bins))
    least, most = np.full((2, len(look.slots), n_bins), np.nan)
    left_out = 0
    for block in blocks:
        chunks = block * spec.chunks_per_shard + np.arange(spec.chunks_per_shard)
        for at, slot in enumerate([0] if look.store.layout == "token" else look.slots):
            brief, rows = brief_statistics(look.folder, slot, block)
            look.bytes_read += sum(array.nbytes for array in brief.values())
            # If a shard is ahead of the commit, only inner chunks whose rows all count are used.
            whole = -(-rows // spec.chunk_rows)
            if rows > spec.rows_in_block(block, total):
                whole = spec.rows_in_block(block, total) // spec.chunk_rows
                left_out = spec.rows_in_block(block, total) % spec.chunk_rows
            here = (chunks[:whole] >= first) & (chunks[:whole] < last)
            into = (chunks[:whole][here] - first) // each
            found = brief["norms"][:whole][here]
            lines = [(line, slot_) for line, slot_ in enumerate(look.slots)] if files == 1 else [(at, 0)]
            for line, within in lines:
                rows_sum, norm_sum, _, low, high = found[:, within].T
                np.add.at(sums[0, line], into, rows_sum)
                np.add.at(sums[1, line], into, norm_sum)
                np.fmin.at(least[line], into, low)
                np.fmax.at(most[line], into, high)
    with np.errstate(invalid="ignore"):
        mean = sums[1] / sums[0]
    data = {
        "level": "chunks", "edges": edges, "mean": mean, "min": least, "max": most, "rows": sums[0].astype(np.int64),
    }  # fmt: skip
    said = [] if asked is None else [f"the norms of {len(blocks):,} of {asked:,} shards, evenly spread"]
    if left_out:
        said.append(f"all but the last {left_out:,} tokens: their file holds more than counts")
    return data, ", ".join(said) or None


def _chosen(look: Sampler, first: int, last: int, each: int) -> tuple[list[int], int | None]:
    """The blocks whose norms are read, some for each range; and the number of all blocks, or None if all are read."""
    chunks = look.folder.spec.chunks_per_shard
    files = 1 if look.store.layout == "token" else len(look.slots)
    there = look.blocks[(look.blocks >= first // chunks) & (look.blocks <= (last - 1) // chunks)]
    if len(there) * files <= _MOST_SHARDS:
        return there.tolist(), None
    # The range that holds each block's middle, and how many blocks each range gets.
    stretch = (there * chunks + chunks // 2 - first) // each
    room = max(1, _MOST_SHARDS // (files * len(np.unique(stretch))))
    chosen: list[int] = []
    for part in np.split(there, np.flatnonzero(np.diff(stretch)) + 1):
        chosen += part[np.unique(np.linspace(0, len(part) - 1, room).astype(int))].tolist()
    return chosen, len(there)


@public(store=a_store, site=a_name, layers=optional(layer_numbers))
def apart(store: Store, site: str, *, layers: Sequence[int] | None = None) -> View:
    """The norms of first and of special tokens, where attention sinks are, compared with those of other tokens.

    Of the first tokens of sequences, and of tokens flagged BOS or special, up to 64 rows each are read, evenly spread.
    The mean of the others is from the statistics, which leave out flagged tokens.

    `data`: `layers`; `others` `[L]`, mean norms; `first` and `special`, each with `tokens`, how many were read, `of`,
    how many were found, and `mean`, `max` `[L]` (NaN if there are none).

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
    """
    look = Sampler(store, site, layers)
    found, sampled = look.statistics()
    starts = np.asarray(store.sequences)[:, 0]
    shard = look.folder.spec.shard_rows
    starts = starts[np.isin(starts // shard, look.blocks)]
    # Special tokens are looked for at the beginnings of some sequences only.
    special = _special(look, starts)
    kinds = {}
    for name, positions in (("first", starts), ("special", special)):
        some = (
            positions[np.unique(np.linspace(0, len(positions) - 1, _APART).astype(int))]
            if len(positions)
            else positions
        )
        values = look.scores(some, None) if len(some) else np.full((1, len(look.slots)), np.nan)
        kinds[name] = {
            "tokens": len(some),
            "of": len(positions),
            "mean": values.mean(axis=0),
            "max": values.max(axis=0),
        }
        if len(some) < len(positions):
            sampled = ", ".join(filter(None, [sampled, f"{len(some)} of {len(positions):,} {name} tokens"]))
    return View(
        "apart",
        f"First and special tokens of {site}",
        written(apart, site, layers=None if layers is None else list(layers)),
        {"site": site, "layers": look.layers, "others": found.mean_norm.numpy()[look.slots], **kinds},
        sampled,
        look.bytes_read,
    )


def _special(look: Sampler, starts: np.ndarray) -> np.ndarray:
    """Tokens flagged BOS or special among the first 1,024 tokens from the starts of up to 64 sequences."""
    some = starts[np.unique(np.linspace(0, len(starts) - 1, _APART).astype(int))] if len(starts) else starts
    stretches = [np.arange(start, min(start + 1024, look.store.n_tokens)) for start in some]
    positions = np.unique(np.concatenate(stretches)) if stretches else np.empty(0, np.int64)
    positions = positions[np.isin(positions // look.folder.spec.shard_rows, look.blocks)]
    found: np.ndarray = positions[look.flags(positions) & (BOS | SPECIAL) != 0]
    return found
