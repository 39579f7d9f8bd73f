"""The training feed: every site and layer of random tokens, aligned, and the same again after a restart."""

from __future__ import annotations

import functools
import math
import os
from operator import index as whole
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from mmcache.errors import ArgumentError
from mmcache.format.dtypes import activation_dtype
from mmcache.read.store import Store, a_store
from mmcache.system.arguments import a_device, a_switch, choice, count, layer_numbers, names, optional, public, shown
from mmcache.system.memory import BufferPool
from mmcache.training.fetcher import Batch, Conversion, Fetcher, Source
from mmcache.training.prefetch import BatchIterator, FetchAll, ReadAhead
from mmcache.training.schedule import BlockOrder, EpochSchedule, Position, State, block_geometry
from mmcache.training.token_filter import Drop, KeptTokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mmcache.training.token_filter import Split

__all__ = ["ActivationDataset", "checked_layers", "checked_sites", "nodes_of", "share_of"]

# How launchers tell each process how many there are in all, and on how many machines. All of them are told the same;
# how many are on a machine need not be the same on each.
_LAUNCHERS = (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))


def checked_sites(store: Store, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Give the sites wanted, all of the store's where None are named.

    Raises:
        ArgumentError: none at all, or one twice.
        UnknownSiteError: the store has no such site.
    """
    if sites is None:
        return store.sites
    names = tuple(sites)
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"sites is {sites!r}: expected a list of sites, each once, of {', '.join(store.sites)}")
    for name in names:
        store.d_model(name)
    return names


def checked_layers(store: Store, site: str, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Give the layers wanted.

    Raises:
        ArgumentError: none at all.
        OutOfRangeError, DtypeError: one is not there, or no number.
    """
    if layers is None:
        return None
    store[site].gather([], layers=layers)
    chosen = tuple(whole(layer) for layer in layers)
    if not chosen:
        raise ArgumentError(f"layers is {layers!r}: expected at least one of {list(store.layers)}, or None for all")
    return chosen


def share_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Give rank and world size, as given, or else those of `torch.distributed`, or 0 of 1.

    Raises:
        ArgumentError: only one of them is given, or the rank is not below the world size.
    """
    if rank is None and world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if rank is None or world_size is None:
        raise ArgumentError(
            f"rank is {shown(rank)} and world_size is {shown(world_size)}: give both of them, or neither"
        )
    ranks = count(1)("world_size", world_size)
    return count(0, ranks - 1)("rank", rank), ranks


def nodes_of(nodes: int | None, world_size: int) -> int:
    """Give how many machines the ranks are on: as given, or as the launcher says if these are the ranks it started.

    Raises:
        ArgumentError: there are more of them than ranks, or none.
    """
    if nodes is not None:
        return count(1, world_size)("nodes", nodes)
    for ranks, machines in _LAUNCHERS:
        found = os.environ.get(machines, "")
        if os.environ.get(ranks) == str(world_size) and found.isdecimal():
            return min(max(1, int(found)), world_size)
    return 1


# Small batches are fetched several together, but not so many that the first of them is long in coming. Three
# threads have a group each, and a fourth waits for the first that is free.
_GROUP_BYTES, _MOST_TOGETHER, _GROUPS = 32 << 20, 8, 4
# What does not take part, and is read all the same where its neighbours on both sides are: as long as a request takes.
_GAP_BYTES = 256 << 10


class ActivationDataset(IterableDataset[Batch]):
    """Batches of a store's activations for training: iterate over it, once for each epoch.

        data = mmcache.ActivationDataset(store, batch_size=1024)
        for batch in data:
            batch["mlp_in"]                     # [1024, n_layers, d_model]; batch.positions, batch.tokens
        torch.save(data.state_dict(), path)     # a few numbers; data.load_state_dict goes on exactly there

    An epoch has every token once, over all ranks together. The next one comes by itself, in another order; an
    iteration that was broken off begins its epoch anew. Batches are fetched in the background, three at least, into
    memory that is used again once the last tensor of a batch is dropped: until then a batch is the caller's own. One
    dataset may be iterated over several times at once; `state_dict` follows the latest iteration.

    Under `torch.utils.data.DataLoader(data, batch_size=None, num_workers=N)`, or torchdata's `StatefulDataLoader`, the
    workers take turns, and the order is that of one process. The dataset in the main process does not move then, as
    nobody iterates over it there: call `set_epoch` before each epoch, or the same one comes again. Workers that are
    persistent go on to the next epoch by themselves, also after one that was broken off, and do not hear of
    `set_epoch`. To resume with a plain `DataLoader`, load the `state` of the last batch before the workers start.

    Args:
        store: what to read. It may be partial: a batch with tokens that are not there raises `IncompleteError`.
        sites: the sites wanted; None for all.
        layers: the model's numbers of the layers wanted, in that order; None for all.
        batch_size: tokens a batch, for each rank. The last batches of an epoch may be smaller: what is left is shared
            evenly, so that all ranks have as many batches.
        shuffle: `"global"`: a uniform shuffle of all tokens. `"block"`: for disks that hate random reads: blocks of
            about 8 MiB in random order, mixed within `buffer_bytes`; `shuffle_quality` says how well. None: the text's
            order.
        seed: of the shuffle, from 0 to 2**64 - 1.
        drop: tokens to leave out: `"bos"`, `"special"`, `"first"` (of each sequence, where attention sinks are, BOS or
            not), bits of the flags, `[n_tokens]` bool, or several of these. In a store of format version 1, which does
            not flag first tokens, its sequences say which they are; its statistics, by which `normalize` goes, have
            them all the same.
        normalize: `"scalar"` or `"per_dim"`: by the statistics of the whole store; see `SiteStatistics.normalizer`.
        split: None, `"train"`, `"validation"`, or a `Split`.
        drop_last: leave out the tokens at the end of the epoch's order that do not fill a batch for each rank.
        device: where the sites go. On CUDA a batch belongs to the stream that is current when it is handed out.
        dtype: of the batches; None for the storage dtype.
        rank, world_size: which share of how many; from `torch.distributed` where that is running, else 0 of 1.
        nodes: on how many machines the ranks are, in the order of the ranks: with `shuffle="block"` each of them reads
            blocks of its own, once for all of its ranks. As torchrun or Slurm say where they started these ranks, else
            1. All ranks have to give the same number.
        buffer_bytes: what `shuffle="block"` mixes at a time, on each machine. It is in the page cache, with as much
            again behind it.

    Raises:
        ArgumentError, DtypeError, ShapeError: an argument makes no sense, or leaves no tokens.
        UnknownSiteError, OutOfRangeError: a site or layer is not there.
        IncompleteError, CorruptError: flags or statistics cannot be read.
    """

    @public(
        store=a_store,
        sites=optional(names),
        layers=optional(layer_numbers),
        batch_size=count(1),
        shuffle=choice("global", "block", None),
        seed=count(0, 2**64 - 1),
        normalize=choice("scalar", "per_dim", None),
        drop_last=a_switch,
        buffer_bytes=count(1),
    )
    def __init__(
        self,
        store: Store,
        *,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        batch_size: int,
        shuffle: Literal["global", "block"] | None = "global",
        seed: int = 0,
        drop: Drop = ("bos", "special", "first"),
        normalize: Literal["scalar", "per_dim"] | None = None,
        split: Split | Literal["train", "validation"] | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        nodes: int | None = None,
        buffer_bytes: int = 2 << 30,
    ) -> None:
        self._rank, ranks = share_of(rank, world_size)
        machines = nodes_of(nodes, ranks)
        chosen_sites = checked_sites(store, sites)
        wanted = None if dtype is None else activation_dtype(dtype).torch
        kept = KeptTokens.from_store(store, drop, split)
        chosen = checked_layers(store, chosen_sites[0], layers)
        conversions = {site: Conversion(store[site], chosen, wanted, normalize) for site in chosen_sites}
        self._source = Source(store, kept, conversions, chosen, a_device("device", device))
        blocks = block_geometry(*self._source.disk_bytes(), buffer_bytes) if shuffle == "block" else None
        self._plan = EpochSchedule(
            seed, len(kept), kept.digest, shuffle, blocks, ranks, batch_size, drop_last, machines
        )
        self._position, self._resumes = self._plan.begin(0), False
        self._settle()

    def _settle(self) -> None:
        """Begin in this process, with no memory that another one knows of."""
        self._process, self._workers, self._passed = os.getpid(), 1, False
        self._turn: object = None
        self._buffers = BufferPool(self._ahead + 2), BufferPool(self._ahead)

    @property
    def _group(self) -> int:
        """How many batches are fetched together."""
        shapes = self._source.shapes(self._plan.batch_size)
        batch = sum(math.prod(shapes[site]) * made.dtype.itemsize for site, made in self._source.conversions.items())
        return max(1, min(_MOST_TOGETHER, _GROUP_BYTES // batch))

    @property
    def _ahead(self) -> int:
        """How many batches may be under way."""
        return self._group * _GROUPS

    @property
    def store(self) -> Store:
        """The store that is read."""
        return self._source.store

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of a batch, in their order."""
        return tuple(self._source.conversions)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's numbers of the layers of a batch, in their order."""
        return self.store.layers if self._source.layers is None else tuple(self._source.layers)

    @property
    def n_tokens(self) -> int:
        """How many tokens an epoch has, over all ranks, before `drop_last`."""
        return self._plan.tokens

    @property
    def epoch(self) -> int:
        """The number of the epoch that is, or will be, iterated over."""
        return self._position.epoch

    @property
    def shuffle_quality(self) -> float:
        """How far apart two neighbours in the text end up on average, as a part of what a uniform shuffle makes of it.

        1.0 for `"global"`, about 0 for None.
        """
        return self._plan.order(self._position).quality

    def __len__(self) -> int:
        """Count the batches of a whole epoch for a rank, the same for all."""
        return len(self._plan.shares())

    def __repr__(self) -> str:
        return (
            f"ActivationDataset({self.store.where!r}, sites={list(self.sites)}, n_tokens={self.n_tokens}, "
            f"batches={len(self)} of {self._plan.batch_size}, shuffle={self._plan.shuffle!r})"
        )

    def __iter__(self) -> Iterator[Batch]:
        """Begin where a state that was just loaded says, or else at the start of the epoch.

        Raises:
            ArgumentError: a DataLoader's worker shall fetch to another device than the CPU.
        """
        if self._process != os.getpid():
            # A fork: locks that another thread held are never let go of here.
            self._source = self._source.reopened()
            self._settle()
        info = get_worker_info()
        worker = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None and self._source.device.type != "cpu":
            raise ArgumentError(
                f"device is {self._source.device} in a DataLoader's worker: leave it at 'cpu', give the DataLoader "
                f"pin_memory=True, and take batch.to(device, non_blocking=True)"
            )
        if not self._resumes:
            # Workers of which some had finished, and others not, when it was broken off: only so they stay together.
            later = info is not None and self._passed
            self._position = self._plan.begin(self._position.epoch + later)
        self._resumes, self._passed, self._workers = False, True, worker[1]
        self._turn = turn = object()
        return BatchIterator(
            self._fetcher(worker),
            self._plan,
            self._position,
            self._rank,
            worker,
            self._group,
            self._ahead,
            functools.partial(self._move, turn),
        )

    def _fetcher(self, worker: tuple[int, int]) -> Fetcher:
        order, source = self._plan.order(self._position), self._source
        pools: ReadAhead | FetchAll | None = None
        if isinstance(order, BlockOrder):
            # All workers of the ranks of a lane want the same of it.
            beside = max(1, self._plan.world_size // self._position.lanes)
            reader = self._rank % beside * worker[1] + worker[0], beside * worker[1]
            gap = _GAP_BYTES // source.disk_bytes()[0]
            # Batches that are fetched ahead may be of pools behind that one already.
            ahead = (self._ahead + 1) * self._plan.batch_size * beside
            if source.has_room(2 * order.pool_tokens + ahead):
                pools = ReadAhead(order, source.kept, source.views(), gap, reader, remote=source.store.url is not None)
        elif source.store.fits:
            pools = FetchAll(source.views(), source.store.shard_tokens or 1)
        return Fetcher(source, order, pools, self._buffers)

    def _move(self, turn: object, position: Position) -> None:
        """Note how far an iteration has come, if it is the latest."""
        if turn is self._turn:
            self._position = position

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. Where it is the current one, nothing changes: a state just loaded stays.

        Raises:
            ArgumentError: it is no number of an epoch.
        """
        epoch = count(0)("epoch", epoch)
        if epoch != self._position.epoch:
            self._go(self._plan.begin(epoch), resumes=False)

    def _go(self, position: Position, *, resumes: bool) -> None:
        self._position, self._resumes = position, resumes
        # An iteration that goes on is not followed any more, and the next is not a worker's next epoch.
        self._turn, self._passed = None, False

    def state_dict(self) -> State:
        """Give the state behind the last batch that was handed out, whatever was fetched ahead: a few numbers.

        It is the same for all ranks. In a DataLoader's worker it is that worker's own.
        """
        return self._plan.state(self._position, self._workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, with the next iteration, behind the batch that the state is of, for the rest of its epoch.

        With another `world_size`, `batch_size` or `drop_last` than its own, the tokens that no rank had seen are laid
        out anew, each once. The end of an epoch is an empty rest; the next epoch follows.

        Raises:
            ArgumentError: it is of another order (the fields that differ are named), or none that can be gone on from.
        """
        info = get_worker_info()
        self._go(self._plan.position(state, 1 if info is None else info.num_workers), resumes=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_turn", "_buffers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._settle()
