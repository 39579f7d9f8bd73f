"""A part of a store: some of its sites, some blocks of its tokens, and the root that says so.

Shards do not say which other sites there are, so those of a part are the whole store's, byte for byte; only the root
differs, and lists fewer sites. Parts of the same store that meet in one place make a larger one.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mmcache.errors import ArgumentError, OutOfRangeError, StoreExistsError, UnknownSiteError
from mmcache.system.arguments import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.format.manifest import Manifest
    from mmcache.read.tokens import Sequences

__all__ = ["ALL", "Blocks", "Numbers", "blocks_of", "chosen_sites", "joined"]

Numbers: TypeAlias = "tuple[int, int] | slice | range | Sequence[int]"

_FIELDS = ("store", "kind", "layout", "has_tokens", "special_tokens", "uses", "dtype", "shard_tokens")
# Of `source`: what decides on the bits of a row.
_SOURCE = ("tokens", "numerics")
_SHOWN = 60


@dataclass(frozen=True)
class Blocks:
    """Some blocks of tokens, as stretches: `firsts` `[n]` ascending, `lasts` `[n]` the last block up to each."""

    firsts: np.ndarray
    lasts: np.ndarray

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """Tell which of some blocks, `[n]`, are among these: `[n]` bool."""
        place = np.searchsorted(self.firsts, blocks, side="right") - 1
        return (place >= 0) & (self.lasts[place] >= blocks)

    def count(self, blocks: int) -> int:
        """Count those below `blocks`."""
        lasts = np.minimum(self.lasts, blocks - 1)
        before = np.concatenate([[-1], lasts[:-1]])
        return int(np.maximum(0, lasts - np.maximum(before, self.firsts - 1)).sum())


ALL = Blocks(np.zeros(1, np.int64), np.full(1, 2**62))


def chosen_sites(manifest: Manifest, sites: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Give the sites asked for, each once; all of them for None.

    Raises:
        UnknownSiteError: there is no such site. ArgumentError: none is named.
    """
    if sites is None:
        return tuple(manifest.sites)
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    for site in names:
        if site not in manifest.sites:
            raise UnknownSiteError(f"site {site!r} not in {where} (sites: {', '.join(manifest.sites)})")
    if not names:
        raise ArgumentError("sites is empty: name some, or leave it out for all of them")
    return names


def blocks_of(sequences: Sequences, asked: Numbers, shard_tokens: int) -> Blocks:
    """Find the blocks of tokens in which some sequences lie.

    Args:
        sequences: those of the store.
        asked: from a number to before another, a slice, a range, or numbers of sequences.
        shard_tokens: tokens a block.

    Raises:
        OutOfRangeError: there is no such sequence.
        ArgumentError: no numbers, or none at all.
    """
    spans = sequences.numpy()[_numbers(asked, len(sequences))]
    spans = spans[spans[:, 1] > spans[:, 0]]
    firsts, lasts = spans[:, 0] // shard_tokens, (spans[:, 1] - 1) // shard_tokens
    return Blocks(firsts, np.maximum.accumulate(lasts))


def _numbers(asked: Numbers, total: int) -> np.ndarray:
    if isinstance(asked, slice):
        asked = range(*asked.indices(total))
    elif isinstance(asked, tuple):
        if len(asked) != 2:
            raise ArgumentError(f"sequences is {shown(asked)}: expected (first, stop), or a list of numbers")
        asked = range(*asked)
    # Of a range the ends tell, however long it is.
    ends = asked if not isinstance(asked, range) else [asked[0], asked[-1]] if asked else []
    try:
        numbers = np.asarray(ends)
    except ValueError:  # lists of several lengths
        numbers = np.empty(0)
    if not numbers.size or numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise ArgumentError(f"sequences is {shown(asked)}: expected numbers of sequences, at least one")
    outside = numbers[(numbers < -total) | (numbers >= total)]
    if outside.size:
        raise OutOfRangeError(f"sequence {outside[0]} not in store (n_sequences={total})")
    found: np.ndarray = np.unique(np.asarray(asked, np.int64) % total)
    return found


def joined(ours: Manifest, sites: Sequence[str], there: Manifest | None, where: str) -> Manifest:
    """Give the root of a place that gets some sites of a store, and has what another root says: None for nothing.

    Args:
        ours: the store that is copied.
        sites: which of its sites.
        there: what the place holds already.
        where: the place, for the error.

    Raises:
        StoreExistsError: it holds another store, or what would not be true any more; what differs is named.
    """
    if there is None:
        return _narrowed(ours, ours, sites)
    wrong = _differences(ours, there)
    if wrong:
        raise StoreExistsError(
            errno.EEXIST, f"another store is there ({'; '.join(wrong)}): choose another place, or move it away", where
        )
    left = [site for site in there.sites if site not in sites]
    if left and _size(ours) != _size(there):
        raise StoreExistsError(
            errno.EEXIST,
            f"{_size(there)} tokens and layers of {', '.join(left)} count there, and {_size(ours)} here: copy these "
            f"sites too, since one root counts for all",
            where,
        )
    return _narrowed(ours, there, [*sites, *left])


def _size(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.n_tokens or 0, manifest.n_sequences, len(manifest.layers)


def _narrowed(ours: Manifest, there: Manifest, sites: Sequence[str]) -> Manifest:
    """Write a root of some sites of two, in our order first: so that all of ours give our root."""
    names = [site for site in (*ours.sites, *(site for site in there.sites if site not in ours.sites)) if site in sites]
    source = dict(ours.source)
    modules, others = (_dict(manifest.source.get("modules")) for manifest in (ours, there))
    if modules:
        source["modules"] = {site: found for site, found in (others | modules).items() if site in names}
    if "accepted" in source:
        more = [numerics for numerics in there.source.get("accepted", []) if numerics not in source["accepted"]]
        source["accepted"] = [*source["accepted"], *more]
    widths, inner = there.sites | ours.sites, there.inner_tokens | ours.inner_tokens
    return replace(
        ours,
        sites={site: widths[site] for site in names},
        inner_tokens={site: inner[site] for site in names if site in inner},
        source=source,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _differences(ours: Manifest, there: Manifest) -> list[str]:
    """Say in which fields two roots are not of the same store, or ours is behind: name, and both values."""
    fields = {name: (getattr(there, name), getattr(ours, name)) for name in _FIELDS}
    for name in _SOURCE:
        fields[name] = (there.source.get(name), ours.source.get(name))
    old, new = (_dict(manifest.source.get("identity")) for manifest in (there, ours))
    fields |= {name: (old.get(name), new.get(name)) for name in old | new}
    for site in ours.sites.keys() & there.sites.keys():
        modules = [_dict(manifest.source.get("modules")).get(site) for manifest in (there, ours)]
        fields[f"d_model of {site}"] = there.sites[site], ours.sites[site]
        fields[f"inner_tokens of {site}"] = there.inner_tokens.get(site), ours.inner_tokens.get(site)
        fields[f"modules of {site}"] = modules[0], modules[1]
    if there.kind == "grown" and not there.n_tokens:
        # Before its first rows a store has no geometry.
        fields = {name: fields[name] for name in _FIELDS[:-2]}
    wrong = [f"{name}: {_short(a)} there, {_short(b)} here" for name, (a, b) in fields.items() if a != b]
    return wrong + _behind(ours, there)


def _behind(ours: Manifest, there: Manifest) -> list[str]:
    """Compare what counts: a plan has it from the beginning, what grows may only grow."""
    counts = {name: (getattr(there, name), getattr(ours, name)) for name in ("n_tokens", "n_sequences")}
    wrong = [
        f"{name}: {a} there, {b} here"
        for name, (a, b) in counts.items()
        if (a != b if ours.kind == "planned" else (a or 0) > (b or 0))
    ]
    first = ours.layers[: len(there.layers)] if ours.kind == "grown" and ours.layout == "layer" else ours.layers
    return wrong if there.layers == first else [*wrong, f"layers: {there.layers} there, {ours.layers} here"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
