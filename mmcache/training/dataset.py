"""`ActivationDataset`: batches of random tokens, all sites and layers aligned, resumable at any batch."""

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

# Environment variables of launchers: the number of processes, and of machines. These are the same in every process;
# the number of processes per machine need not be.
_LAUNCHERS = (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))


def checked_sites(store: Store, sites: Sequence[str] | None) -> tuple[str, ...]:
    """The sites wanted; for None, all of the store.

    Raises:
        ArgumentError: the list is empty, or has a site twice.
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
    """The layers wanted, checked; None for all.

    Raises:
        ArgumentError: the list is empty.
        OutOfRangeError, DtypeError: a layer is not in the store, or not an integer.
    """
    if layers is None:
        return None
    store[site].gather([], layers=layers)
    chosen = tuple(whole(layer) for layer in layers)
    if not chosen:
        raise ArgumentError(f"layers is {layers!r}: expected at least one of {list(store.layers)}, or None for all")
    return chosen


def share_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: the arguments, or those of `torch.distributed` if it is initialised, or (0, 1).

    Raises:
        ArgumentError: only one of them is given, or the rank is not less than the world size.
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
    """The number of machines: the argument, or the launcher's if it started `world_size` processes, or 1.

    Raises:
        ArgumentError: `nodes` is less than 1, or more than the ranks.
    """
    if nodes is not None:
        return count(1, world_size)("nodes", nodes)
    for ranks, machines in _LAUNCHERS:
        found = os.environ.get(machines, "")
        if os.environ.get(ranks) == str(world_size) and found.isdecimal():
            return min(max(1, int(found)), world_size)
    return 1


# Small batches are fetched in groups, but not so large that the first batch is late. Three threads have a group each,
# and a fourth group waits for the first free thread.
_GROUP_BYTES, _MOST_TOGETHER, _GROUPS = 32 << 20, 8, 4
# Gap size below which dropped tokens between two kept runs are read anyway: costs about one request.
_GAP_BYTES = 256 << 10


class ActivationDataset(IterableDataset[Batch]):
    """Batches of a store's activations for training: iterate over it, once for each epoch.

        data = mmcache.ActivationDataset(store, batch_size=1024)
        for batch in data:
            batch["mlp_in"]                     # [1024, n_layers, d_model]; batch.positions, batch.tokens
        torch.save(data.state_dict(), path)     # a few numbers; data.load_state_dict resumes exactly there

    An epoch has every token once, over all ranks together. Iterating again starts the next epoch, in another order; if
    an iteration was not finished, it starts the same epoch again. At least three batches are prefetched in the
    background, into memory that is reused once the last tensor of a batch is dropped: until then a batch is the
    caller's own. Several iterations over one dataset may run at once; `state_dict` follows the latest.

    Under `torch.utils.data.DataLoader(data, batch_size=None, num_workers=N)`, or torchdata's `StatefulDataLoader`, the
    workers take turns, and the order is that of one process. The dataset in the main process is then not iterated and
    does not advance: call `set_epoch` before each epoch, or the same epoch is repeated. Persistent workers advance to
    the next epoch by themselves, even after an unfinished one, and are not affected by `set_epoch`. To resume with a
    plain `DataLoader`, load the `state` of the last batch before the workers start.

    Args:
        store: the store to read. It may be partial: a batch with tokens of missing shards raises `IncompleteError`.
        sites: the sites wanted; None for all.
        layers: the model's numbers of the layers wanted, in that order; None for all.
        batch_size: tokens per batch and rank. The last batches of an epoch may be smaller: the rest is shared evenly,
            so that all ranks have the same number of batches.
        shuffle: `"global"`: a uniform shuffle of all tokens. `"block"`: for disks that are slow at random reads: blocks
            of about 8 MiB in random order, mixed within `buffer_bytes`; see `shuffle_quality`. None: the order of the
            text.
        seed: of the shuffle, from 0 to 2**64 - 1.
        drop: tokens to leave out: `"bos"`, `"special"`, `"first"` (of each sequence, BOS or not, where attention sinks
            are), bits of the flags, `[n_tokens]` bool, or several of these. A store of format version 1 does not flag
            first tokens: there they are determined by the sequences, but the statistics (for `normalize`) include them.
        normalize: `"scalar"` or `"per_dim"`: by the statistics of the whole store; see `SiteStatistics.normalizer`.
        split: None, `"train"`, `"validation"`, or a `Split`.
        drop_last: leave out the tokens at the end of the epoch's order that do not fill a batch for each rank.
        device: where the sites go. On CUDA a batch belongs to the stream that is current when it is returned.
        dtype: of the batches; None for the storage dtype.
        rank, world_size: which share, of how many; by default those of `torch.distributed` if it is initialised, else
            0 and 1.
        nodes: the number of machines that the ranks are on, in the order of the ranks: with `shuffle="block"` each
            machine reads its own blocks, once for all of its ranks. By default from torchrun or Slurm if they started
            these ranks, else 1. Must be the same on all ranks.
        buffer_bytes: bytes that `shuffle="block"` mixes at a time, on each machine. They are in the page cache, and as
            many again for the next pool.

    Raises:
        ArgumentError, DtypeError, ShapeError: an argument is invalid, or leaves no tokens.
        UnknownSiteError, OutOfRangeError: there is no such site or layer.
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
        """Set the state of this process: nothing that is shared with another one."""
        self._process, self._workers, self._passed = os.getpid(), 1, False
        self._turn: object = None
        self._buffers = BufferPool(self._ahead + 2), BufferPool(self._ahead)

    @property
    def _group(self) -> int:
        """The number of batches that are fetched together."""
        shapes = self._source.shapes(self._plan.batch_size)
        batch = sum(math.prod(shapes[site]) * made.dtype.itemsize for site, made in self._source.conversions.items())
        return max(1, min(_MOST_TOGETHER, _GROUP_BYTES // batch))

    @property
    def _ahead(self) -> int:
        """The most batches that are pending or ready."""
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
        """The number of tokens of an epoch, over all ranks, before `drop_last`."""
        return self._plan.tokens

    @property
    def epoch(self) -> int:
        """The number of the epoch that is, or will be, iterated over."""
        return self._position.epoch

    @property
    def shuffle_quality(self) -> float:
        """The average distance of two neighbours in the text after the shuffle, relative to a uniform shuffle.

        1.0 for `"global"`, about 0 for None.
        """
        return self._plan.order(self._position).quality

    def __len__(self) -> int:
        """The number of batches of a whole epoch for a rank; the same for all ranks."""
        return len(self._plan.shares())

    def __repr__(self) -> str:
        return (
            f"ActivationDataset({self.store.where!r}, sites={list(self.sites)}, n_tokens={self.n_tokens}, "
            f"batches={len(self)} of {self._plan.batch_size}, shuffle={self._plan.shuffle!r})"
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from the state that was just loaded, or else from the start of the epoch.

        Raises:
            ArgumentError: `device` is not the CPU in a DataLoader's worker.
        """
        if self._process != os.getpid():
            # In a fork, locks that other threads held are never released.
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
            # An unfinished epoch may have ended in some workers only: all advance, so that they stay together.
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
            # All workers of a lane's ranks want the same pools.
            beside = max(1, self._plan.world_size // self._position.lanes)
            reader = self._rank % beside * worker[1] + worker[0], beside * worker[1]
            gap = _GAP_BYTES // source.disk_bytes()[0]
            # Prefetched batches may belong to the next pool already.
            ahead = (self._ahead + 1) * self._plan.batch_size * beside
            if source.has_room(2 * order.pool_tokens + ahead):
                pools = ReadAhead(order, source.kept, source.views(), gap, reader, remote=source.store.url is not None)
        elif source.store.fits:
            pools = FetchAll(source.views(), source.store.shard_tokens or 1)
        return Fetcher(source, order, pools, self._buffers)

    def _move(self, turn: object, position: Position) -> None:
        """Record the position of an iteration, if it is the latest."""
        if turn is self._turn:
            self._position = position

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. No-op for the current epoch, so that a state just loaded stays.

        Raises:
            ArgumentError: not the number of an epoch.
        """
        epoch = count(0)("epoch", epoch)
        if epoch != self._position.epoch:
            self._go(self._plan.begin(epoch), resumes=False)

    def _go(self, position: Position, *, resumes: bool) -> None:
        self._position, self._resumes = position, resumes
        # A running iteration is not followed any more, and the next one is not a worker's next epoch.
        self._turn, self._passed = None, False

    def state_dict(self) -> State:
        """The state after the last batch that was returned, whatever was prefetched: a few numbers.

        It is the same for all ranks. In a DataLoader's worker it is that worker's own.
        """
        return self._plan.state(self._position, self._workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume after the batch of the state: the next iteration is the rest of its epoch.

        With another `world_size`, `batch_size` or `drop_last` than the state's, the tokens that no rank had seen are
        laid out anew, each once. At the end of an epoch the rest is empty; the next epoch follows.

        Raises:
            ArgumentError: the state is of another order (the fields that differ are named), or cannot be resumed from.
        """
        info = get_worker_info()
        self._go(self._plan.position(state, 1 if info is None else info.num_workers), resumes=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_turn", "_buffers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._settle()
