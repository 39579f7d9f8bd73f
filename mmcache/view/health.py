"""What is wrong with the activations: NaN, infinities, rows of zeros, dead dimensions, rows of very large norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.read.store import a_store
from mmcache.stats.site_statistics import brief_statistics
from mmcache.system.arguments import a_name, public
from mmcache.view.base import Sampler, View, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.store import Store
    from mmcache.stats.site_statistics import SiteStatistics

__all__ = ["FAR", "far_rows", "health"]

# Times the median norm. Few ordinary rows reach three times it; attention sinks reach hundreds.
FAR = 20
# Bytes of rows read for the medians; rows per run of that sample; bytes of rows read to count the far ones.
_MEDIAN_BYTES, _RUN, _BYTES = 8 << 20, 4, 32 << 20
# How many shards' norms are read; in a bucket, each is a request.
_MOST_FAR_SHARDS, _MOST_REQUESTS = 1024, 64
# How many positions, places and dead dimensions are listed per layer.
_MOST = 100


def far_rows(look: Sampler, found: SiteStatistics) -> tuple[list[dict[str, Any]], str | None]:
    """Layers with rows that count but are far from the rest, and what was left out, for people (None if nothing was).

    The largest norm comes from the statistics, so no such layer is missed, except that the median is of a sample. For
    the layers found, the statistics of inner chunks show which chunks have such rows; only those chunks are read.

    Each record: `layer`; `median`, `max_norm`; `rows`, how many are over `FAR` times the median, a lower bound unless
    `exact`; `first`, the position of the first one found, or -1; `starts`, how many of them begin a sequence;
    `positions`, 100 at most; `chunks`, how many inner chunks have such rows, and `tokens`, the first of these, (first,
    stop).
    """
    if not len(look.blocks):
        return [], None
    medians = _medians(look)
    far = np.flatnonzero((found.max_norm.numpy() > FAR * medians) & (medians > 0)).tolist()
    if not far:
        return [], None
    narrow = Sampler(look.store, look.site, [look.store.layers[slot] for slot in far])
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
    # If a shard holds more rows than count, its statistics may be of rows that do not.
    return [one for one in records if one["rows"] or not one["exact"]], said


def _medians(look: Sampler) -> np.ndarray:
    """The median norm of a sample of rows that count: `[layers]`, NaN if none is finite."""
    some = Sampler(look.store, look.site, None, _MEDIAN_BYTES)
    norms = some.scores(some.sample(_RUN).positions, None)
    look.bytes_read += some.bytes_read
    norms[~np.isfinite(norms)] = np.nan
    known = ~np.isnan(norms).all(axis=0)
    found = np.full(norms.shape[1], np.nan)
    found[known] = np.nanmedian(norms[:, known], axis=0)
    return found


def _chunks(look: Sampler, limits: np.ndarray) -> tuple[list[np.ndarray], str | None]:
    """For each layer, the inner chunks with a norm above its limit, by the statistics; and what was left out."""
    files = 1 if look.store.layout == "token" else len(look.slots)
    most = max(1, (_MOST_FAR_SHARDS if look.store.url is None else _MOST_REQUESTS) // files)
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


def _read(look: Sampler, limits: np.ndarray, chunks: Sequence[np.ndarray], records: list[dict[str, Any]]) -> None:
    """Count the far rows in these chunks: first in each layer's first chunk, then in others within the budget.

    The records are updated.
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


# How many shards are asked for their counts; each takes a few KiB and 0.1 ms.
_MOST_SHARDS = 1 << 14


@public(store=a_store, site=a_name)
def health(store: Store, site: str) -> View:
    """What is wrong with a site's values, and where, from the shards' statistics.

    Some rows are read too: a sample for the median norm, and inner chunks with norms over 20 times the median.

    `data`: `layers`, one record each: `layer`, `rows` (that count), `non_finite` (rows with NaN or infinity),
    `first_non_finite` (a position, or -1), `zero_rows`, `overflow` (values that became infinite in the cast), `dead`
    (dimensions that are the same in every row, 100 at most, each with its `value`), `n_dead` and `n_far` (rows);
    `places`, the shards with rows that are not finite or all zeros: `layer`, `tokens` (first, stop), `non_finite`,
    `first_non_finite`, `zero_rows`; `far`, the layers with rows that count but are far from the rest: `layer`,
    `median`, `max_norm`, `rows` (how many norms are over 20 times the median; a lower bound unless `exact`), `first`
    (position of the first one, or -1), `starts` (how many begin a sequence), `positions` (100 at most), `chunks` (how
    many inner chunks have such rows) and `tokens` (the first of these, (first, stop)); `left_out`, how many tokens are
    flagged `first`, if the store flags them; and `problems`, sentences for people, none if all is well.

    Raises:
        UnknownSiteError: there is no such site.
        IncompleteError: no shard is there yet.
        CorruptError: a shard is not this store's.
    """
    look = Sampler(store, site)
    found, sampled = look.statistics()
    layers = [_layer(found, slot, layer) for slot, layer in enumerate(look.layers)]
    places: list[dict[str, Any]] = []
    if any(one["non_finite"] or one["zero_rows"] for one in layers) or sampled:
        places, asked = _places(look)
        if sampled:
            # The counts come from more shards than the statistics do.
            for one in layers:
                _recount(one, [place for place in places if place["layer"] == one["layer"]])
        sampled = ", ".join(part for part in (sampled, asked) if part) or None
    far, asked = far_rows(look, found)
    sampled = ", ".join(part for part in (sampled, asked) if part) or None
    for one in layers:
        one["n_far"] = sum(its["rows"] for its in far if its["layer"] == one["layer"])
    left_out = {"first": store.n_sequences} if store.manifest.flags_first else {}
    problems = _problems(layers, places) + [_far(one, flagged=bool(left_out)) for one in far]
    places = [place for one in layers for place in [at for at in places if at["layer"] == one["layer"]][:_MOST]]
    return View(
        "health",
        f"Health of {site}",
        written(health, site),
        {"site": site, "layers": layers, "places": places, "far": far, "left_out": left_out, "problems": problems},
        sampled,
        look.bytes_read,
    )


def _layer(found: SiteStatistics, slot: int, layer: int) -> dict[str, Any]:
    dead = np.flatnonzero(((found.std[slot] == 0) & (found.count[slot] > 1)).numpy())
    return {
        "layer": layer,
        "rows": int(found.rows[slot]),
        "non_finite": int(found.non_finite[slot]),
        "first_non_finite": int(found.first_non_finite[slot]),
        "zero_rows": int(found.zero_rows[slot]),
        "overflow": int(found.overflow[slot]),
        "n_dead": len(dead),
        "dead": [{"dimension": int(at), "value": float(found.mean[slot, at])} for at in dead[:_MOST]],
    }


def _places(look: Sampler) -> tuple[list[dict[str, Any]], str | None]:
    """The shards with rows that are not finite or all zeros; and what was left out, for people."""
    there = look.folder.present()
    shards = np.flatnonzero(there)
    chosen = shards
    if len(shards) > _MOST_SHARDS:
        chosen = shards[np.linspace(0, len(shards) - 1, _MOST_SHARDS).astype(int)]
    places = []
    for slot, block in (divmod(number, there.shape[1]) for number in chosen.tolist()):
        brief, rows = brief_statistics(look.folder, slot, block)
        look.bytes_read += sum(array.nbytes for array in brief.values())
        first = block * look.folder.spec.shard_rows
        if rows > look.folder.spec.rows_in_block(block, look.store.n_tokens):
            brief = _counted_anew(look, slot, block)
        bad = np.flatnonzero(brief["non_finite"] + brief["zero_rows"])
        places += [
            {
                "layer": look.store.layers[slot + int(at)],
                "tokens": [first, min(first + rows, look.store.n_tokens)],
                "non_finite": int(brief["non_finite"][at]),
                "first_non_finite": int(brief["first_non_finite"][at]),
                "zero_rows": int(brief["zero_rows"][at]),
            }
            for at in bad
        ]
    places.sort(key=lambda place: (place["layer"], place["tokens"]))
    said = None if len(chosen) == len(shards) else f"{len(chosen):,} of {len(shards):,} shards were asked where"
    return places, said


def _counted_anew(look: Sampler, slot: int, block: int) -> dict[str, np.ndarray]:
    """The bad rows of a shard with more rows than count (after a crash), whose statistics cover all of its rows."""
    values = look.folder.open(slot, block).view(-1, look.folder.spec.stat_layers, look.view.d_model)
    look.bytes_read += values.nbytes
    broken = ~values.isfinite().all(dim=-1).numpy()
    first = np.where(broken.any(axis=0), block * look.folder.spec.shard_rows + broken.argmax(axis=0), -1)
    zeros = (values == 0).all(dim=-1).sum(dim=0).numpy()
    return {"non_finite": broken.sum(axis=0), "first_non_finite": first, "zero_rows": zeros}


def _recount(layer: dict[str, Any], places: list[dict[str, Any]]) -> None:
    for name in ("non_finite", "zero_rows"):
        layer[name] = sum(place[name] for place in places)
    positions = [place["first_non_finite"] for place in places if place["first_non_finite"] >= 0]
    layer["first_non_finite"] = min(positions, default=-1)


def _problems(layers: list[dict[str, Any]], places: list[dict[str, Any]]) -> list[str]:
    problems = []
    for one in layers:
        where = f"layer {one['layer']}"
        first = [place["first_non_finite"] for place in places if place["layer"] == one["layer"]]
        positions = [position for position in [one["first_non_finite"], *first] if position >= 0]
        if one["non_finite"]:
            at = f", the first at position {min(positions)}" if positions else ""
            problems.append(f"{where}: {one['non_finite']:,} rows with NaN or infinity{at}")
        if one["overflow"]:
            problems.append(f"{where}: {one['overflow']:,} values became infinite in the cast to the storage dtype")
        if one["zero_rows"]:
            problems.append(f"{where}: {one['zero_rows']:,} rows of zeros only")
        if one["n_dead"]:
            listed = ", ".join(str(dead["dimension"]) for dead in one["dead"][:8])
            more = " …" if one["n_dead"] > 8 else ""
            problems.append(f"{where}: {one['n_dead']:,} dimensions are the same in every row: {listed}{more}")
    return problems


def _far(one: dict[str, Any], *, flagged: bool) -> str:
    """A sentence about a layer's rows that are far from the rest."""
    where, usual = f"layer {one['layer']}", f"{FAR} times the median ({one['median']:.4g})"
    if not one["rows"]:
        start, stop = one["tokens"] or (0, 0)
        return f"{where}: norms up to {one['max_norm']:.4g}, over {usual}, the first at positions {start} to {stop - 1}"
    said = f"{'' if one['exact'] else 'at least '}{one['rows']:,} rows that count have norms over {usual}"
    said = f"{where}: {said}, up to {one['max_norm']:.4g}, the first at position {one['first']}"
    if one["starts"] and not flagged:
        said += f"; {one['starts']:,} of them are the first tokens of their sequences, which this store does not flag"
    return said
