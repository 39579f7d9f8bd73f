"""Which blocks a worker makes next, beside others that make the same store.

Workers agree on nothing. Each takes its part, by its rank, of the blocks that are missing and that nobody is making;
when it has made those, or meets one that is there meanwhile, it looks again. So a worker that is slow, late or dead is
made up for by those that are done, until nothing is missing. Who makes a shard does not matter: it is the same bytes.
Each time that nothing is seen of any other worker, half as many are counted on: the tasks of an array may have a store
each.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import numpy as np

from mmcache.extraction.missing_shards import missing_of
from mmcache.system.atomic import remove_drafts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.system.launcher import Rank

__all__ = ["BlockScheduler"]

_KEY = re.compile(r"c\.\d{1,18}\.(\d{1,18})\.0", re.ASCII)
# Seconds for which a worker leaves blocks to the one whose part they are, for each rank between the two.
_PATIENCE = 2.0


class BlockScheduler:
    """The turns of one worker at a planned store. Used by one thread.

    Args:
        path: the store.
        manifest: its plan.
        rank: which worker this is.
        refresh: called before each look, where what others make is not seen in the folder by itself.

    As of the last look, `missing` tells which shards were missing of each site of which some were in the beginning,
    `[slots, blocks]` bool; `wanted` tells of which blocks some were, `[blocks]` bool, and `held` which of these
    somebody was making.
    """

    missing: dict[str, np.ndarray]
    wanted: np.ndarray
    held: np.ndarray

    def __init__(self, path: Path, manifest: Manifest, rank: Rank, refresh: Callable[[], None] = lambda: None) -> None:
        self._path, self._manifest, self._rank, self._refresh = path, manifest, rank, refresh
        self._idle_since: float | None = None
        # For how many turns nothing was seen of the others.
        self._silences, self._worked = 0, False
        self.missing = dict.fromkeys(manifest.sites, np.empty(0, bool))
        self.look()
        # The others are complete, and a job that adds sites captures only its own.
        self.missing = {site: shards for site, shards in self.missing.items() if shards.any()}
        self._before, self._given = self.wanted, np.zeros_like(self.wanted)

    def look(self) -> None:
        """See what is there now; removes what dead writers left half-made."""
        self._refresh()
        # Before the shards: one that is published in between is neither being made nor missing.
        names = [name for site in self.missing for name in remove_drafts(self._path, site)]
        self.missing = missing_of(self._path, self._manifest, tuple(self.missing))
        shard, total = self._manifest.shard_tokens or 1, self._manifest.n_tokens or 0
        self.wanted = np.zeros(-(-total // shard), bool)
        for shards in self.missing.values():
            self.wanted |= shards.any(axis=0)
        keys = (_KEY.fullmatch(name) for name in names)
        blocks = np.array([int(key[1]) for key in keys if key], np.int64)
        self.held = np.zeros_like(self.wanted)
        self.held[blocks[blocks < len(self.held)]] = True
        self.held &= self.wanted

    def take(self) -> np.ndarray:
        """Give the blocks that are this worker's now, ascending; none where others are making all that is missing."""
        number, of = self._place()
        blocks = np.flatnonzero(self.wanted & ~self.held)
        part = blocks[len(blocks) * number // of : len(blocks) * (number + 1) // of]
        if len(part) or not len(blocks):
            self._idle_since = None
        else:
            # There are fewer than workers. Whose they are begins at once; who is further away has waited by then.
            now = time.monotonic()
            self._idle_since = now if self._idle_since is None else self._idle_since
            owners = -(-(np.arange(len(blocks)) + 1) * of // len(blocks)) - 1
            part = blocks[(number - owners) % of * _PATIENCE <= now - self._idle_since][:1]
        self._given[part] = True
        self._worked = len(part) > 0
        return part

    def _place(self) -> tuple[int, int]:
        """Give this worker's number, and of how many it is, as far as anything was seen of the others lately."""
        theirs = ((self._before & ~self.wanted) | self.held) & ~self._given
        self._silences = 0 if theirs.any() else self._silences + self._worked
        self._before = self.wanted
        return self._rank.number >> self._silences, -(-self._rank.of >> self._silences)
