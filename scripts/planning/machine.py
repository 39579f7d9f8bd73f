"""What a job runs on, and one part of what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Machine", "Part"]


@dataclass(frozen=True)
class Machine:
    """What a job runs on.

    `peak` is that of one GPU in operations a second, of which `mfu` is reached; `forward`, in tokens/s of all
    workers, takes their place where it was measured. `network` is in bits/s a machine, None where the disks are the
    machines' own; `names` in names/s that a shared file system lists for all workers together, None for as fast as
    each of them asks. Without GPUs, forward passes, copies and digests share `cores`.
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
    """What one part of a job takes.

    Parts `before` and `after` come one after the other. Of those `together` only the longest counts: the pipeline
    overlaps them, a stage of it to a `lane`; parts of one lane add up.
    """

    name: str
    seconds: float
    phase: Literal["before", "together", "after"]
    why: str
    remedy: str
    lane: str = ""
