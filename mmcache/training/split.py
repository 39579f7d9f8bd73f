"""Which part of a store is for training and which for validation, by units that keep neighbours together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.system.arguments import choice, count, shown
from mmcache.training.permutation import hashed, mixed

if TYPE_CHECKING:
    from mmcache.read.store import Store

__all__ = ["Split", "as_split", "members"]

_PARTS = ("train", "validation")
_UNITS = ("sequence", "document", "shard")
# Apart from the keys that shuffle, whatever the seed.
_PURPOSE = 0x5B117


@dataclass(frozen=True)
class Split:
    """One part of a store.

    Tokens near each other in the text are alike, so a unit is held back whole. One unit of every `1 / fraction`
    consecutive ones is for validation, which one a hash of `seed` and their number says; above one half it is the
    training part that is picked so. A store that grows keeps every unit where it was.

    Attributes:
        part: `"train"` or `"validation"`; the two are disjoint and together everything.
        fraction: of the units for validation, above 0 and below 1.
        by: the unit: `"sequence"`, `"document"`, or `"shard"`: the sequences that start in one block of
            `shard_tokens`, so that the shards of the two parts hardly overlap.
        seed: from 0 to 2**64 - 1: another one is another split.

    Raises:
        ArgumentError: one of these makes no sense.
    """

    part: Literal["train", "validation"]
    fraction: float = 0.1
    by: Literal["sequence", "document", "shard"] = "sequence"
    seed: int = 0

    def __post_init__(self) -> None:
        choice(*_PARTS)("the part of a split", self.part)
        choice(*_UNITS)("the unit of a split", self.by)
        fraction: Any = self.fraction
        # NaN compares false.
        if isinstance(fraction, bool) or not (isinstance(fraction, int | float | np.number) and 0 < fraction < 1):
            raise ArgumentError(f"the fraction of a split is {shown(fraction)}: expected a number between 0 and 1")
        object.__setattr__(self, "seed", count(0, 2**64 - 1)("the seed of a split", self.seed))


def as_split(given: Split | str | None) -> Split | None:
    """Give the split that is meant: the strings are shorthands for one with the defaults.

    Raises:
        ArgumentError: there is no such part.
    """
    if given is None or isinstance(given, Split):
        return given
    if not isinstance(given, str) or given not in _PARTS:
        raise ArgumentError(f"split is {shown(given)}: expected None, 'train', 'validation' or a mmcache.Split")
    return Split("train" if given == "train" else "validation")


def members(split: Split, store: Store) -> np.ndarray:
    """Tell which sequences are in the split's part: `[n_sequences]` bool, in memory of the caller's own."""
    spans = np.asarray(store.sequences)
    if split.by == "sequence":
        numbers, units = np.arange(len(spans)), len(spans)
    elif split.by == "shard":
        numbers, units = _numbered(spans[:, 0] // max(1, store.shard_tokens or 1))
    else:
        numbers, units = _numbered(spans[:, 2])
    if split.fraction <= 0.5:
        validation = _picked(units, split.fraction, split.seed)
    else:
        validation = ~_picked(units, 1 - split.fraction, split.seed)
    chosen = validation if split.part == "validation" else ~validation
    if not chosen.any():
        raise ArgumentError(
            f"the {split.part} part of {store.where} is empty: of {units} {split.by}s, a fraction of {split.fraction} "
            f"with seed {split.seed} leaves none to it. Split by smaller units, or take another fraction"
        )
    found: np.ndarray = chosen[numbers]
    return found


def _numbered(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Number values by their first appearance, `[n]` int64, and count them: what follows later changes no number."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[which], len(first)


def _picked(units: int, fraction: float, seed: int) -> np.ndarray:
    """Pick one of each window of about `1 / fraction` units: `[units]` bool. Window j begins at floor(j / fraction)."""
    windows = math.floor(units * fraction) + 2
    edges = np.minimum(np.floor(np.arange(windows + 1) / fraction), 2.0**62).astype(np.int64)
    widths = np.maximum(np.diff(edges), 1).astype(np.uint64)
    picks = edges[:-1] + (hashed(np.arange(windows), mixed(seed, _PURPOSE)) % widths).astype(np.int64)
    chosen = np.zeros(units, np.bool_)
    chosen[picks[picks < units]] = True
    return chosen
