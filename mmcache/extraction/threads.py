"""How many threads an extraction computes with: another number may change the last bits, so the plan says it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import torch

from mmcache.format.manifest import is_store, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.system.launcher import Rank

__all__ = ["plan_threads"]

_LIMIT = "OMP_NUM_THREADS"


def plan_threads(path: Path, rank: Rank, planned: Manifest | None = None) -> None:
    """Compute with as many threads as the plan at `path` says, or, where there is none, as one process would take.

    `planned` is a plan that is somewhere else.

    torchrun gives each of its processes one thread where the user has not said another number: then a job would not be
    the same, to the last bit, as that of one process.
    """
    if planned is None and is_store(path):
        planned = read_manifest(path)
    if planned is not None:
        threads = planned.source.get("numerics", {}).get("threads")
        if isinstance(threads, int) and threads > 0:
            torch.set_num_threads(threads)
    elif rank.launcher is not None and os.environ.get(_LIMIT) == "1":
        torch.set_num_threads(_usual_threads())


def _usual_threads() -> int:
    """Ask a process for which nobody has set a number; torch reads it once, when it starts."""
    free = {name: value for name, value in os.environ.items() if name != _LIMIT}
    code = "import torch; print(torch.get_num_threads())"
    told = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True)  # noqa: S603 -- our own
    return int(told.stdout)
