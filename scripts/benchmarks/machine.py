"""Description of the machine, the disk and the versions of a benchmark run."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["block_device", "describe", "has", "read_ahead_kb", "version_of"]


def version_of(package: str) -> str:
    """An installed package's name and version."""
    return f"{package} {version(package)}"


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def block_device(folder: Path) -> Path | None:
    """The entry in /sys of a folder's block device; None if it has none, as on tmpfs."""
    number = folder.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return None
    # A partition uses its disk's queue.
    entry = entry.resolve()
    return entry if (entry / "queue").exists() else entry.parent


def read_ahead_kb(folder: Path) -> str:
    """The kernel's read-ahead on a folder's disk, in KiB."""
    device = block_device(folder)
    return "unknown" if device is None else (device / "queue" / "read_ahead_kb").read_text().strip()


def _from(path: str, key: str) -> str:
    found = [line.split(":", 1)[1].strip() for line in Path(path).read_text().splitlines() if line.startswith(key)]
    return found[0] if found else "unknown"


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(point), kind) for _, point, kind, *_ in mounts if folder.resolve().is_relative_to(point)]
    return max(inside)[1]


def describe(folder: Path) -> dict[str, str]:
    """A description of the machine, as far as Linux reports it."""
    device = block_device(folder)
    packages = ("mmcache", "torch", "numpy", "zarr")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{os.cpu_count()} x {_from('/proc/cpuinfo', 'model name')}",
        "memory": _from("/proc/meminfo", "MemTotal"),
        "disk": "no block device" if device is None else device.name,
        "file system": _file_system(folder),
        "read_ahead_kb": read_ahead_kb(folder),
        "torch threads": str(torch.get_num_threads()),
        "python": sys.version.split()[0],
        "versions": ", ".join(version_of(package) for package in packages),
    }
