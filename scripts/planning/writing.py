"""The hours of an extraction: which parts are sequential, which overlap, and which is the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmcache.write.pipeline import SLOT_BYTES
from planning.machine import Machine, Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planning.figures import Figures
    from planning.models import Model
    from planning.size import Size

__all__ = ["Job", "Outcome", "outcome", "seconds_a_look"]

# From `mmcache.extraction.runner`: a worker looks again after a second, or fifty times the duration of its last look.
_LOOK_AGAIN, _LOOK_SHARE = 1.0, 50
# Slots of a ring, which are full when the last batch has run.
_SLOTS = 4
_WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Job:
    """A store to be made: `depth` layers of the model are run, on contexts of `context` tokens."""

    model: Model
    size: Size
    machine: Machine
    depth: int
    context: int
    as_text: bool = True  # whether the corpus is text, not token ids


@dataclass(frozen=True)
class Outcome:
    """The cost of a job: `seconds` in all, and `bottleneck`, the part that takes most of it.

    `times` is how many times longer that part takes than the next one. For a part of the pipeline, that is the next
    lane, which would become the bottleneck; else the longest of all other parts.
    """

    parts: tuple[Part, ...]
    seconds: float
    together: float
    bottleneck: Part
    runner_up: Part
    times: float


def outcome(job: Job, figures: Figures) -> Outcome:
    """Add up the parts of a job."""
    parts = tuple(part for part in _parts(job, figures) if part.seconds > 0)
    lanes: dict[str, list[Part]] = {}
    for part in parts:
        if part.phase == "together":
            lanes.setdefault(part.lane, []).append(part)
    longest = sorted(lanes.values(), key=_total, reverse=True)
    together = _total(longest[0])
    alone = sorted((part for part in parts if part.phase != "together"), key=lambda part: part.seconds, reverse=True)
    seconds = together + sum(part.seconds for part in alone)
    first = max(longest[0], key=lambda part: part.seconds)
    if alone and alone[0].seconds > together:
        second = first if len(alone) < 2 or together > alone[1].seconds else alone[1]
        return Outcome(parts, seconds, together, alone[0], second, alone[0].seconds / max(together, second.seconds))
    rivals = [max(lane, key=lambda part: part.seconds) for lane in longest[1:]] + alone[:1]
    second = rivals[0] if rivals else first
    other = _total(longest[1]) if len(longest) > 1 else second.seconds
    return Outcome(parts, seconds, together, first, second, together / other)


def _total(lane: list[Part]) -> float:
    return sum(part.seconds for part in lane)


def _parts(job: Job, figures: Figures) -> Iterator[Part]:
    yield from _before(job, figures)
    together = list(_together(job, figures))
    yield from together
    longest = max(part.seconds for part in together)
    yield from _looking(job, figures, longest)
    yield from _after(job, figures)


def _before(job: Job, figures: Figures) -> Iterator[Part]:
    machine, size = job.machine, job.size
    value = {name: figure.value for name, figure in figures.items()}
    weights = job.model.parameters * _WEIGHT_BYTES
    read = weights * machine.machines / (value["disk read"] * machine.disks)
    if machine.network is not None:
        read = max(read, weights * 8 / machine.network)
    yield Part(
        "read the weights", read, "before", f"{weights:,} bytes for each of {machine.machines} machines",
        "keep the model on each machine's own disk",
    )  # fmt: skip
    yield Part(
        "hash the weights", weights / value["weights"], "before", "crc32c of all of them, in each worker",
        "nothing: seconds, once a run",
    )  # fmt: skip
    if not job.as_text:
        return
    yield Part(
        "tokenise", size.tokens / value["tokenise"], "before", "by one worker, while the others wait",
        "give token ids (.npy), made by many processes before the GPUs are there",
    )  # fmt: skip
    if machine.workers > 1:
        corpus = size.tokens * value["bytes a token"]
        taken = max(corpus / value["corpus"], corpus * machine.machines / (value["disk read"] * machine.disks))
        yield Part(
            "compare the corpus", taken, "before", f"each worker reads and hashes all {corpus / 1e9:.1f} GB of it",
            "give token ids (.npy); or let a worker that waited for the plan believe it",
        )  # fmt: skip


def _together(job: Job, figures: Figures) -> Iterator[Part]:
    machine, size = job.machine, job.size
    value = {name: figure.value for name, figure in figures.items()}
    on_gpu = machine.gpus > 0
    if machine.forward is not None:
        forward, why = size.tokens / machine.forward, f"{machine.forward:,.0f} tokens/s, measured"
    else:
        flops = job.model.flops_a_token(job.depth, job.context)
        forward = size.tokens * flops / (max(1, machine.gpus) * machine.peak * machine.mfu)
        why = f"{flops / 1e9:.3g} GFLOP a token at {machine.peak * machine.mfu / 1e12:.0f} TFLOP/s a GPU"
    yield Part(
        "forward passes", forward, "together", why, "more or faster GPUs; fewer layers, from the first on", "caller"
    )
    rows = size.tokens * size.bytes_a_token
    copies = rows / ((value["pcie"] if on_gpu else value["copy"]) * machine.workers)
    yield Part(
        "copy to staging", copies, "together", "each row once", "fewer sites or layers; a narrower dtype",
        "copy" if on_gpu else "caller",
    )  # fmt: skip
    # One thread per worker; without a GPU it takes a core from the forward passes.
    digests = rows / (value["digest"] * machine.workers * (1 if on_gpu else machine.cores))
    yield Part(
        "checksums, statistics", digests, "together", "one thread a worker",
        "more workers (several may share a GPU), each of which has a thread for it", "digest" if on_gpu else "caller",
    )  # fmt: skip
    written = sum(size.sites.values()) + size.columns
    yield Part(
        "write", written / (value["disk write"] * machine.disks), "together", f"{machine.disks} disks",
        "more or faster disks; fewer sites or layers", "disk",
    )  # fmt: skip
    if machine.network is not None:
        yield Part(
            "network", written * 8 / (machine.network * machine.machines), "together",
            f"{machine.network / 1e9:.0f} Gbit/s for each of {machine.machines} machines",
            "a faster network, or disks of the machines' own", "network",
        )  # fmt: skip
    yield Part(
        "name and sync shards", size.shards * value["publish"] / machine.workers, "together",
        f"{size.shards:,} files, one thread a worker", "larger shards", "publish",
    )  # fmt: skip


def seconds_a_look(job: Job, figures: Figures, *, full: float, at_once: float) -> float:
    """Seconds that one look takes a worker, when `full` of all names exist and `at_once` workers look at the same time.

    Each site's folder is listed twice, and every draft of a live worker is opened to try its lock.
    """
    machine, names = job.machine, job.size.shards * full
    drafts = 2 * machine.workers * len(job.size.sites)
    own = names / figures["look"].value + drafts * figures["draft"].value
    if machine.names is None:
        return own
    return max(own, 2 * (names + drafts) * max(1.0, at_once) / machine.names)


def _looking(job: Job, figures: Figures, longest: float) -> Iterator[Part]:
    """The cost of the workers' looking at each other's shards."""
    machine = job.machine
    if machine.workers == 1:
        return
    # On average, half of the names exist, and one in fifty workers is looking.
    look = seconds_a_look(job, figures, full=0.5, at_once=machine.workers / (_LOOK_SHARE + 1))
    share = look / (look + max(_LOOK_AGAIN, _LOOK_SHARE * look))
    # A look that takes longer than the whole job is made once, at its end, where it is counted.
    if look < longest:
        yield Part(
            "look at the others", share * longest, "together", f"{look:.2g} s each time, at most a 50th of the time",
            "larger shards", "caller",
        )  # fmt: skip
    last = seconds_a_look(job, figures, full=1.0, at_once=machine.workers)
    yield Part(
        "last looks", 2 * last, "after", f"all {machine.workers:,} workers list {job.size.shards:,} names, twice",
        "ask for the few shards that are missing by their names, instead of listing",
    )  # fmt: skip


def _after(job: Job, figures: Figures) -> Iterator[Part]:
    machine, size = job.machine, job.size
    value = {name: figure.value for name, figure in figures.items()}
    slow = min(value["digest"], value["disk write"] * machine.disks / machine.workers)
    yield Part(
        "empty the pipeline", min(_SLOTS * SLOT_BYTES, size.bytes / machine.workers) / slow, "after",
        f"{_SLOTS} slots of {SLOT_BYTES >> 20} MiB a worker", "nothing",
    )  # fmt: skip
    listing = value["open"] + size.shards / value["list"]
    if machine.names is not None:
        listing = max(listing, size.shards * machine.workers / machine.names)
    yield Part("open the store", listing, "after", f"{size.shards:,} names listed, by each worker", "larger shards")
    read = size.statistics / (value["disk read"] * machine.disks)
    merge = size.shards * (value["first touch"] + value["merge a shard"]) + size.statistics / value["merge"]
    yield Part(
        "merge the statistics", merge + read, "after",
        f"{size.statistics / 1e9:.3g} GB of {size.shards:,} shards, by worker 0 alone",
        "let each worker merge the blocks of its rank, and worker 0 what they merged",
    )  # fmt: skip
