"""The cost of reading a store: an epoch of shuffled training, opening, memory, `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcache.read.site_map import _MOST_PLACES as MOST_PLACES
from mmcache.read.site_view import MAX_MAPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planning.figures import Figures
    from planning.writing import Job

__all__ = ["HOLES", "one_tensor", "reading"]

# The address space of a process on x86-64, 128 TiB, less what is in use: a position-independent executable lies two
# thirds of the way up, and leaves a hole on each side. Measured here, with torch loaded.
HOLES = (85 << 40, 42 << 40)
# Bytes of a place in a window, of a sequence in a reader, of a run of kept tokens (`KeptTokens`), and of a token id.
_PLACE, _SPAN, _RUN, _ID = 2, 24, 24, 4
# One page table entry for each page that was touched.
_ENTRY, _PAGE = 8, 4096
_STATE_BYTES = 300


def reading(job: Job, figures: Figures, *, epochs: float, wanted: float | None) -> dict[str, Any]:
    """The cost of reading: seconds, bytes and counts, in one process except for the epochs.

    Args:
        job: the store and the machine.
        figures: the constants.
        epochs: the number of epochs.
        wanted: tokens per second that training needs, in all; None if not known.
    """
    size, machine = job.size, job.machine
    value = {name: figure.value for name, figure in figures.items()}
    rows = size.tokens * size.bytes_a_token
    records = size.tokens * size.bytes_a_token // size.record_bytes
    ways = {
        "disk": rows / (value["disk read"] * machine.disks),
        "copy": rows / (value["copy"] * machine.workers),
        # So few files stay open that each record opens its own.
        "opening files": records * value["touch again"] / machine.workers if size.shards > MAX_MAPS else 0.0,
        "network": rows * 8 / (machine.network * machine.machines) if machine.network else 0.0,
        "training": size.tokens / wanted if wanted else 0.0,
    }
    slowest = max(ways, key=lambda name: ways[name])
    listing = value["open"] + size.shards / value["list"]
    # Flags are read to leave tokens out, ids to go with the batches.
    start = listing + size.columns / (value["disk read"] * machine.disks)
    return {
        "record_bytes": size.record_bytes,
        "epochs": epochs,
        "epochs_seconds": ways[slowest] * epochs,
        "epoch_seconds": ways,
        "bottleneck": slowest,
        "tokens_a_second": size.tokens / ways[slowest],
        "open_seconds": listing,
        "resume_seconds": start,
        "state_bytes": _STATE_BYTES,
        "address_bytes": sum(size.sites.values()),
        "one_tensor": size.names <= MOST_PLACES and one_tensor(list(size.sites.values())),
        "files_open": MAX_MAPS,
        "memory": {
            "places": size.shards * _PLACE,
            "shards met": int(size.shards * value["met"]),
            "token ids": size.tokens * _ID,
            "sequences": size.sequences * _SPAN,
            "kept runs": size.sequences * _RUN,
            # If all of it is touched; a window is released before its entries take a 16th of the free memory.
            "page tables, all of it touched": rows // _PAGE * _ENTRY,
        },
        "verify_quick_seconds": size.shards * value["verify quick"],
        "verify_full_seconds": size.bytes / min(value["disk read"] * machine.disks, value["verify full"]),
    }


def one_tensor(sites: Sequence[int]) -> bool:
    """Whether sites of these sizes in bytes all fit into the address space of a process at the same time."""
    holes = list(HOLES)
    for size in sorted(sites, reverse=True):
        fitting = [number for number, hole in enumerate(holes) if hole >= size]
        if not fitting:
            return False
        holes[min(fitting, key=lambda number: holes[number])] -= size
    return True
