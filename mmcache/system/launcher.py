"""Rank and number of workers of this process, from the environment of torchrun, srun or a SLURM job array."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Rank", "find_rank"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Set in tasks of `srun`. SLURM_NTASKS is not used: a batch script without srun has it too, and is one process.
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Rank:
    """Rank `number` of `of` workers, rank `local` on its machine; `launcher` is where that comes from, None if nowhere.

    `leads`: whether it reports the progress of all workers. One of those that share a terminal does; and one in each
    task of an array, which has its own log.
    """

    number: int = 0
    of: int = 1
    local: int = 0
    launcher: str | None = None
    leads: bool = True


def find_rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """The rank of this process; the only worker if the environment does not say.

    If each task of a job array starts several processes, by torchrun or srun, all of them are counted.

    Raises:
        ArgumentError: the environment contradicts itself, or a number in it is no integer.
    """
    inner = Rank()
    for launcher, names in (("torchrun", _TORCHRUN), ("srun", _SRUN)):
        if names[0] in environ and names[1] in environ:
            number, of = _integer(environ, names[0]), _integer(environ, names[1])
            inner = Rank(number, of, _integer(environ, names[2], default=0), launcher, leads=number == 0)
            break
    if not 0 <= inner.number < inner.of:
        raise ArgumentError(f"{inner.launcher} says that this is worker {inner.number} of {inner.of}")
    if _ARRAY[0] not in environ:
        return inner
    # Array indices may have gaps: then some tasks get the same rank, which costs them only a look at the same shards.
    count = max(1, _integer(environ, _ARRAY[2], default=1))
    step = max(1, _integer(environ, "SLURM_ARRAY_TASK_STEP", default=1))
    task = (_integer(environ, _ARRAY[0]) - _integer(environ, _ARRAY[1], default=0)) // step % count
    launcher = "a job array" if inner.launcher is None else f"{inner.launcher} in a job array"
    return Rank(task * inner.of + inner.number, count * inner.of, inner.local, launcher, inner.leads)


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ArgumentError(f"the environment's {name} is {text!r}: expected a whole number") from None
