"""The constants of a plan, each with its source. `--measure` replaces those that can be measured on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GPUS", "MEASURED_HERE", "Figure", "Figures", "given"]

_MEASURED = "docs/performance.md"
_MILLIONS = "four million real empty files, ext4, two cores"
_HERE = "measured on two cores"


@dataclass(frozen=True)
class Figure:
    """One number, its unit, and its source."""

    value: float
    unit: str
    source: str


Figures = dict[str, Figure]

MEASURED_HERE: Final[Mapping[str, Figure]] = MappingProxyType(
    {
        "disk write": Figure(3.1e9, "bytes/s", f"{_MEASURED}: raw direct writes, one thread"),
        "disk read": Figure(1.1e9, "bytes/s", f"{_MEASURED}: at random, past the page cache"),
        "copy": Figure(23.9e9, "bytes/s", f"{_MEASURED}: memcpy, one thread"),
        "digest": Figure(2.9e9, "bytes/s", f"{_HERE}: ShardWriter.digest, one thread: 12 x 768 3.6, 32 x 4096 2.9"),
        "list": Figure(4e6 / 4.1, "names/s", f"{_MILLIONS}: open took 2.3 to 4.1 s"),
        "look": Figure(0.95e6, "names/s", f"{_HERE}: BlockScheduler.look; a resume plan of four million took 6.8 s"),
        "open": Figure(44e-6, "s", f"{_HERE}: open of one shard"),
        "first touch": Figure(29e-6, "s", f"{_HERE}: a shard opened, its header checked, 20,000 of them"),
        "touch again": Figure(10.4e-6, "s", f"{_HERE}: a shard opened that was checked before"),
        "draft": Figure(7.3e-6, "s", f"{_HERE}: remove_drafts, for each of 4,000 drafts that live writers hold"),
        "publish": Figure(0.45e-3, "s", f"{_HERE}: AtomicFile, publish, sync_folder, beside 200,000 names"),
        "merge a shard": Figure(75e-6, "s", f"{_HERE}: merge_site less the bytes, 12 x 768 beside 32 x 4096"),
        "merge": Figure(3.7e9, "bytes/s", f"{_HERE}: merge_site, statistics in the page cache"),
        "verify quick": Figure(130e-6, "s", f'{_HERE}: verify(level="quick"), 20,000 shards: 73 to 132 us each'),
        "verify full": Figure(14e9, "bytes/s", "crc32c, one core"),
        "weights": Figure(14e9, "bytes/s", "crc32c, one core: 14 to 17"),
        "tokenise": Figure(0.68e6, "tokens/s", f"{_HERE}: mmcache.extraction.tokenization, a BPE of 16,000: 0.54 to 0.82 M/s"),  # noqa: E501
        "corpus": Figure(0.36e9, "bytes/s", f"{_HERE}: JSON lines read and hashed, as each worker does"),
        "met": Figure(266, "bytes", f"{_HERE}: what a reader remembers of each shard it opened (ShardFolder)"),
        "bytes a token": Figure(4.0, "bytes", "of English text, about; 3.8 of Python sources as tokenised above"),
        "pcie": Figure(25e9, "bytes/s", "PCIe 4.0 x16, about what pinned copies reach; not measured here"),
    }
)  # fmt: skip

# Dense bfloat16 operations per second, from the makers' data sheets.
GPUS: Final[Mapping[str, float]] = MappingProxyType(
    {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l40s": 362e12, "rtx4090": 165e12}
)


def given(figures: Figures, name: str, value: float | None) -> None:
    """Replace a figure by an option's value, if it was given."""
    if value is not None:
        figures[name] = Figure(value, figures[name].unit, "as given")
