"""Rows whose norms are far from the rest: in which layers, how many, and where the first one is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.stats.site_statistics import brief_statistics
from mmcache.view.look import Look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.stats.site_statistics import SiteStatistics

__all__ = ["FAR", "far_rows"]

# As many times the median norm: of ordinary rows few reach three times it, attention sinks reach hundreds.
FAR = 20
# Bytes of rows that are read for the medians, in runs of so many; and of stretches that have such rows.
_MEDIAN_BYTES, _RUN, _BYTES = 8 << 20, 4, 32 << 20
# Shards whose norms are looked at; in a bucket each is a request.
_MOST_SHARDS, _MOST_REQUESTS = 1024, 64
# Positions that are listed, of each layer.
_MOST = 100


def far_rows(look: Look, found: SiteStatistics) -> tuple[list[dict[str, Any]], str | None]:
    """Layers that have rows far from the rest, among those that count; and what was left out, for people.

    That a layer has none is exact, but for the median, which is of a sample: the statistics know the largest norm. Of
    layers that have some, the statistics of inner chunks say which of these have such rows, and those are read.

    Each record: `layer`; `median`, `max_norm`; `rows`, how many are over `FAR` times the median, `exact` or at least so
    many; `first`, the position of the first one that was found, or -1; `starts`, how many of them begin a sequence;
    `positions`, 100 at most; `chunks`, how many inner chunks have such rows, and `tokens`, the first of these (from, to
    before).
    """
    if not len(look.blocks):
        return [], None
    medians = _medians(look)
    far = np.flatnonzero((found.max_norm.numpy() > FAR * medians) & (medians > 0)).tolist()
    if not far:
        return [], None
    narrow = Look(look.store, look.site, [look.store.layers[slot] for slot in far])
    limits = FAR * medians[far]
    chunks, said = _chunks(narrow, limits)
    records: list[dict[str, Any]] = [
        {
            "layer": layer, "median": float(medians[slot]), "max_norm": float(found.max_norm[slot]), "rows": 0,
            "exact": said is None, "first": -1, "starts": 0, "positions": [], "chunks": len(its), "tokens": None,
        }
        for layer, slot, its in zip(narrow.layers, far, chunks, strict=True)
    ]  # fmt: skip
    _read(narrow, limits, chunks, records)
    look.bytes_read += narrow.bytes_read
    # Of shards that hold more than counts, the statistics may be of rows that do not.
    return [one for one in records if one["rows"] or not one["exact"]], said


def _medians(look: Look) -> np.ndarray:
    """The median norm of a sample of rows that count: `[layers]`, NaN where none is finite."""
    some = Look(look.store, look.site, None, _MEDIAN_BYTES)
    norms = some.scores(some.sample(_RUN).positions, None)
    look.bytes_read += some.bytes_read
    norms[~np.isfinite(norms)] = np.nan
    known = ~np.isnan(norms).all(axis=0)
    found = np.full(norms.shape[1], np.nan)
    found[known] = np.nanmedian(norms[:, known], axis=0)
    return found


def _chunks(look: Look, limits: np.ndarray) -> tuple[list[np.ndarray], str | None]:
    """Numbers of the inner chunks of each layer that have a norm above its limit, as the shards' statistics say."""
    files = 1 if look.store.layout == "token" else len(look.slots)
    most = max(1, (_MOST_SHARDS if look.store.url is None else _MOST_REQUESTS) // files)
    blocks = look.blocks
    if len(blocks) > most:
        blocks = blocks[np.unique(np.linspace(0, len(blocks) - 1, most).astype(int))]
    found: list[list[np.ndarray]] = [[] for _ in limits]
    for block in blocks.tolist():
        for at, slot in enumerate([0] if files == 1 and look.store.layout == "token" else look.slots):
            brief, _ = brief_statistics(look.folder, slot, block)
            look.bytes_read += sum(array.nbytes for array in brief.values())
            largest = brief["norms"][:, :, 4]
            lines = enumerate(look.slots) if look.store.layout == "token" else [(at, 0)]
            for line, within in lines:
                above = np.flatnonzero(largest[:, within] > limits[line])
                found[line].append(block * look.folder.spec.chunks_per_shard + above)
    said = None
    if len(blocks) < len(look.blocks):
        said = f"the norms of {len(blocks):,} of {len(look.blocks):,} blocks, evenly spread"
    return [np.concatenate(some) for some in found], said


def _read(look: Look, limits: np.ndarray, chunks: Sequence[np.ndarray], records: list[dict[str, Any]]) -> None:
    """Count the rows of these chunks that are far: of the first one of each layer, then of others while there is room.

    Fills in the records.
    """
    spec, starts = look.folder.spec, np.asarray(look.store.sequences)[:, 0]
    room = max(1, _BYTES // (spec.chunk_rows * look.record_bytes))
    every = np.unique(np.concatenate(chunks))
    firsts = np.unique([its[0] for its in chunks if len(its)])
    chosen = np.concatenate([firsts, np.setdiff1d(every, firsts)])[:room]
    for record, its in zip(records, chunks, strict=True):
        record["exact"] &= bool(np.isin(its, chosen).all())
        if len(its):
            first = int(its[0]) * spec.chunk_rows
            record["tokens"] = [first, min(first + spec.chunk_rows, look.store.n_tokens)]
    for chunk in np.sort(chosen).tolist():
        positions = np.arange(chunk * spec.chunk_rows, min((chunk + 1) * spec.chunk_rows, look.store.n_tokens))
        positions = positions[look.counted(positions)]
        norms = look.scores(positions, None)
        above = np.isfinite(norms) & (norms > limits)
        for record, line in zip(records, above.T, strict=True):
            far = positions[line]
            record["rows"] += len(far)
            record["starts"] += int(np.isin(far, starts).sum())
            record["positions"] += far[: _MOST - len(record["positions"])].tolist()
            record["first"] = record["positions"][0] if record["positions"] else -1
