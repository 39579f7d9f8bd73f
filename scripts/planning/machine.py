"""The machines that a job runs on, and one part of the job's cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Machine", "Part"]


@dataclass(frozen=True)
class Machine:
    """The machines that a job runs on.

    `peak` is the operations per second of one GPU, and `mfu` the share of them that is reached. If `forward`, the
    tokens/s of all workers, was measured, it replaces both. `network` is in bits/s per machine, None if the disks are
    local. `names` is how many names/s a shared file system lists for all workers together, None for no limit. Without
    GPUs, forward passes, copies and digests share `cores`.
    """

    gpus: int
    workers: int
    machines: int
    disks: int
    cores: int
    peak: float
    mfu: float
    forward: float | None = None
    network: float | None = None
    names: float | None = None


@dataclass(frozen=True)
class Part:
    """The cost of one part of a job.

    Parts `before` and `after` run one after the other. The pipeline overlaps the `together` parts, one stage per
    `lane`: parts of one lane add up, and only the longest lane counts.
    """

    name: str
    seconds: float
    phase: Literal["before", "together", "after"]
    why: str
    remedy: str
    lane: str = ""
