"""What a view returns (`View`), and bounded reads of a store's rows and statistics (`Sampler`)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, IncompleteError, OutOfRangeError
from mmcache.format.shard import Layout
from mmcache.stats.site_statistics import SiteStatistics, load_summary, merge_site
from mmcache.text import json_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from plotly.graph_objects import Figure

    from mmcache.read.store import Store
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["BUDGET", "Name", "Sample", "Sampler", "View", "written"]


class Name(str):
    """The name of a variable: its repr is the name itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def written(view: Callable[..., View], *given: object, **named: object) -> str:
    """The Python call that makes a view: the given arguments, then the named ones that are not defaults."""
    usual = {name: parameter.default for name, parameter in inspect.signature(view).parameters.items()}
    more = [f"{name}={value!r}" for name, value in named.items() if value != usual[name]]
    return f"mmcache.view.{view.__name__}({', '.join(['store', *map(repr, given), *more])})"


@dataclass(frozen=True, eq=False)
class View:
    """Arrays and labels, and where they are from. A notebook shows its figure.

    Attributes:
        name: the kind of view: the function of `mmcache.view` that made it.
        title: what it shows, for people.
        python: the Python call that makes it.
        data: numpy arrays, numbers, texts, lists and dicts, by name, as documented by the function that made it.
        sampled: which part was read; None if all of it was.
        bytes_read: bytes of activations and statistics that were read, as stored.
    """

    name: str
    title: str
    python: str
    data: dict[str, Any]
    sampled: str | None = None
    bytes_read: int = 0

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __repr__(self) -> str:
        return f"View({self.title!r}, {', '.join(self.data)}{', sampled' if self.sampled else ''})"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; NaN and infinities as "NaN", "Infinity" and "-Infinity"."""
        about = {"view": self.name, "title": self.title, "python": self.python, "sampled": self.sampled}
        ready: dict[str, Any] = json_ready({**about, "bytes_read": self.bytes_read, "data": self.data})
        return ready

    def figure(self, *, dark: bool = False) -> Figure:
        """Draw it with plotly.

        Raises:
            ImportError: plotly is not installed: `pip install 'mmcache[view]'`.
        """
        from mmcache.view.figures import draw  # noqa: PLC0415 -- an extra, and slow to import

        return draw(self, dark=dark)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        try:
            figure = self.figure()
        except ImportError:
            return {"text/plain": repr(self)}
        bundle: dict[str, Any] = figure._repr_mimebundle_(include, exclude)
        return {"text/plain": repr(self), **bundle}


# How many bytes a view reads, unless told otherwise.
BUDGET = 64 << 20
# Rows in a sampled run, so that most of them have their neighbours.
_RUN = 64
# How many numbers are converted to float64 at a time.
_WIDE = 1 << 22


@dataclass(frozen=True)
class Sample:
    """A choice of tokens.

    Attributes:
        positions: `[n]` int64, ascending: those that count in the statistics.
        looked: how many tokens were chosen, including those that do not count.
        total: how many tokens the store has.
    """

    positions: np.ndarray
    looked: int
    total: int

    @property
    def said(self) -> str | None:
        """Which part was read, for people; None if all of it was."""
        if self.looked == self.total:
            return None
        return f"{self.looked:,} of {self.total:,} tokens, evenly spread in runs of {_RUN}"


class Sampler:
    """Reads rows and statistics of one site for one view. Not thread-safe.

    Args:
        store: the store; shards may be missing.
        site: one of its sites.
        layers: the model's numbers; None for all.
        budget: how many bytes of activations may be read.

    Raises:
        UnknownSiteError, OutOfRangeError: there is no such site or layer.
        IncompleteError: it has no rows yet.
        ArgumentError: a budget below 1, no layers, or a layer twice.
    """

    def __init__(self, store: Store, site: str, layers: Sequence[int] | None = None, budget: int = BUDGET) -> None:
        if budget < 1:
            raise ArgumentError(f"budget is {budget}: expected a number of bytes")
        self.store, self.site, self.budget = store, site, budget
        self.view = store[site]
        _, self.slots = self.view.rows_of(layers)
        if not self.slots:
            raise ArgumentError("layers is empty: name at least one, or leave it out for all of them")
        if len(set(self.slots)) < len(self.slots):
            raise ArgumentError(f"layers are {layers}: expected each once")
        self.layers = [store.layers[slot] for slot in self.slots]
        self.bytes_read = 0

    @cached_property
    def folder(self) -> ShardFolder:
        """The site's shards."""
        return self.store.shards(self.site)

    @property
    def record_bytes(self) -> int:
        """The bytes read per token: the layers asked for, or all if the layout stores them together."""
        rows = 1 if self.store.layout == "token" else len(self.slots)
        return self.folder.spec.row_bytes * rows

    @cached_property
    def blocks(self) -> np.ndarray:
        """The blocks whose shards exist for all layers asked for: `[n]` int64, ascending."""
        wanted = [0] if self.store.layout == "token" else self.slots
        return np.flatnonzero(self.folder.present()[wanted].all(axis=0))

    def span(self, start: int, stop: int | None) -> tuple[int, int]:
        """The range of positions from `start` to `stop` (None for the end). Raises OutOfRangeError if it is invalid."""
        total = self.store.n_tokens
        stop = total if stop is None else stop
        if not 0 <= start < stop <= total:
            raise OutOfRangeError(f"positions {start} to {stop} are not in {self.site} (n_tokens={total})")
        return start, stop

    def sample(self, run: int = _RUN) -> Sample:
        """Choose tokens that count in the statistics: all if the budget allows it, else evenly spread runs.

        Raises:
            IncompleteError: there are no shards yet.
        """
        shard, total = self.folder.spec.shard_rows, self.store.n_tokens
        if not len(self.blocks):
            raise IncompleteError(f"{self.site} of {self.store.where}: no shard of the layers asked for is there yet")
        room = max(run, self.budget // self.record_bytes)
        runs = [range(int(block) * shard, min((int(block) + 1) * shard, total)) for block in self.blocks]
        there = sum(map(len, runs))
        if there > room:
            # Evenly spaced runs over the rows that exist, from the first to the last.
            edges = np.concatenate([[0], np.cumsum([len(run) for run in runs])])
            starts = np.linspace(0, there - run, max(1, room // run)).astype(np.int64)
            within = np.searchsorted(edges, starts, side="right") - 1
            first = [runs[one].start + int(at - edges[one]) for one, at in zip(within, starts, strict=True)]
            runs = [range(at, min(at + run, runs[one].stop)) for one, at in zip(within, first, strict=True)]
        positions = np.unique(np.concatenate([np.arange(one.start, one.stop) for one in runs]))
        return Sample(positions[self.counted(positions)], len(positions), total)

    def counted(self, positions: np.ndarray) -> np.ndarray:
        """Which of the given ascending positions count in the statistics: `[n]` bool."""
        return self._pick(positions, self.store.counted)

    def tokens(self, positions: np.ndarray) -> np.ndarray:
        """The token ids at ascending positions: `[n]` int32."""
        return self._pick(positions, lambda start, stop: self.store.read_tokens(start, stop).numpy())

    def flags(self, positions: np.ndarray) -> np.ndarray:
        """The flags at ascending positions: `[n]` uint8."""
        return self._pick(positions, lambda start, stop: self.store.read_flags(start, stop).numpy())

    @staticmethod
    def _pick(positions: np.ndarray, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        # Positions that are far apart are read separately.
        breaks = np.flatnonzero(np.diff(positions) > 1 << 12) + 1
        parts = []
        for part in np.split(positions, breaks):
            if len(part):
                first = int(part[0])
                parts.append(np.asarray(read(first, int(part[-1]) + 1))[part - first])
        return np.concatenate(parts) if parts else np.asarray(read(0, 0))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows in float64: `[n, layers, d_model]`. The caller makes sure that they fit into memory."""
        self.bytes_read += len(positions) * self.record_bytes
        found: np.ndarray = self.view.gather(positions, layers=self.layers).double().numpy()
        return found

    def scores(self, positions: np.ndarray, direction: np.ndarray | int | None) -> np.ndarray:
        """One number for each row: `[n, layers]` float64. Rows are read in pieces.

        Args:
            positions: `[n]` int64.
            direction: a dimension, whose value is taken; a vector `[d_model]` or `[layers, d_model]`, for the dot
                product; None for the Euclidean norm.
        """
        some = max(1, _WIDE // (len(self.slots) * self.view.d_model))
        out = np.empty((len(positions), len(self.slots)))
        for start in range(0, len(positions), some):
            rows = self.rows(positions[start : start + some])
            if direction is None:
                out[start : start + some] = np.sqrt(np.einsum("nld,nld->nl", rows, rows))
            elif isinstance(direction, int):
                out[start : start + some] = rows[:, :, direction]
            else:
                # Zero times infinity becomes NaN, as it should.
                with np.errstate(invalid="ignore"):
                    out[start : start + some] = (rows * direction).sum(axis=-1)
        return out

    def statistics(self) -> tuple[SiteStatistics, str | None]:
        """The statistics of all layers of the site, and what was left out, for people (None if nothing was).

        They are the merged ones if stored, else merged from the shards, or from as many as the budget allows.
        """
        found = load_summary(self.store.path, self.store.manifest, self.site)
        if found is not None:
            return found, None
        there = self.folder.present()
        shards, blocks = int(there.sum()), np.flatnonzero(there.any(axis=0))
        layout = Layout(self.folder.spec, self.folder.spec.shard_rows)
        size = layout.tensors["statistics_crc32c"][3] - layout.tensors["count"][2]
        if shards * size <= self.budget:
            self.bytes_read += shards * size
            return self.view.statistics, None
        some = max(1, self.budget // (size * max(1, shards // len(blocks))))
        chosen = blocks[np.linspace(0, len(blocks) - 1, some).astype(int)].tolist()
        return self._merged(chosen), f"the statistics of {len(set(chosen)):,} of {len(blocks):,} blocks, evenly spread"

    def _merged(self, blocks: Collection[int]) -> SiteStatistics:
        return merge_site(self.folder, self.store.layout, self.store.n_layers, self.store.counted, frozenset(blocks))
