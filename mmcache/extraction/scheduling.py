"""`BlockScheduler`: the blocks that a worker makes next, beside others that make the same store.

Workers do not communicate. Each takes its share, by its rank, of the missing blocks that no worker is making. When it
has made those, or meets one that exists by then, it looks again. So workers that are done take over the blocks of a
slow, late or dead one, until nothing is missing. The bytes of a shard are the same, whoever makes it. Each time that
nothing is seen of other workers, their assumed number is halved: each task of a job array may have its own store.
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
# Seconds for which a worker leaves a block to its owner, per rank between the two.
_PATIENCE = 2.0


class BlockScheduler:
    """Chooses the blocks that one worker makes. Used by one thread.

    Args:
        path: the store.
        manifest: its plan.
        rank: this worker's number, and the number of workers.
        refresh: called before each look; updates the folder if others' shards do not appear there by themselves.

    As of the last look: `missing` has the missing shards, `[slots, blocks]` bool, of each site that was incomplete at
    first; `wanted` the blocks with any of them, `[blocks]` bool; `held` those of the wanted blocks that some process
    was making.
    """

    missing: dict[str, np.ndarray]
    wanted: np.ndarray
    held: np.ndarray

    def __init__(self, path: Path, manifest: Manifest, rank: Rank, refresh: Callable[[], None] = lambda: None) -> None:
        self._path, self._manifest, self._rank, self._refresh = path, manifest, rank, refresh
        self._idle_since: float | None = None
        # The number of turns in which nothing was seen of other workers.
        self._silences, self._worked = 0, False
        self.missing = dict.fromkeys(manifest.sites, np.empty(0, bool))
        self.look()
        # The other sites are complete; and a job that adds sites captures only those.
        self.missing = {site: shards for site, shards in self.missing.items() if shards.any()}
        self._before, self._given = self.wanted, np.zeros_like(self.wanted)

    def look(self) -> None:
        """List the folder again; removes temporary files of dead writers."""
        self._refresh()
        # Before the shards are listed: one that is published in between is neither held nor missing.
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
        """The blocks to make now, ascending; none if there are none, or if they are left to other workers for now."""
        number, of = self._place()
        blocks = np.flatnonzero(self.wanted & ~self.held)
        part = blocks[len(blocks) * number // of : len(blocks) * (number + 1) // of]
        if len(part) or not len(blocks):
            self._idle_since = None
        else:
            # Fewer blocks than workers: an owner begins at once, others wait longer the further their rank is.
            now = time.monotonic()
            self._idle_since = now if self._idle_since is None else self._idle_since
            owners = -(-(np.arange(len(blocks)) + 1) * of // len(blocks)) - 1
            part = blocks[(number - owners) % of * _PATIENCE <= now - self._idle_since][:1]
        self._given[part] = True
        self._worked = len(part) > 0
        return part

    def _place(self) -> tuple[int, int]:
        """This worker's number and the number of workers, halved for each turn without a sign of the others."""
        theirs = ((self._before & ~self.wanted) | self.held) & ~self._given
        self._silences = 0 if theirs.any() else self._silences + self._worked
        self._before = self.wanted
        return self._rank.number >> self._silences, -(-self._rank.of >> self._silences)
