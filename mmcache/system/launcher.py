"""Which of how many workers of one job a process is, as torchrun, srun and SLURM's job arrays say it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Rank", "find_rank"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Set in the tasks of `srun`; a batch script that runs by itself has SLURM_NTASKS too, and is one process all the same.
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Rank:
    """A worker: number `number` of `of`, number `local` on its machine; `launcher` is who said so, None for nobody.

    `leads` says that it tells how far all are: one of those that share a terminal, and each task of an array, which has
    a log of its own.
    """

    number: int = 0
    of: int = 1
    local: int = 0
    launcher: str | None = None
    leads: bool = True


def find_rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """Find out which worker this process is; the only one where the environment does not say.

    A job array of which each task starts several processes, by torchrun or srun, counts all of them.

    Raises:
        ArgumentError: the environment says what cannot be.
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
    # The numbers of an array may have gaps: then some tasks begin where another does, which costs them a look.
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
