"""The hardware's limits: raw reads, writes and copies, without mmcache."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np

from mmcache.system.direct_io import Queue
from mmcache.system.syscalls import READ

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["aligned", "memcpy", "random_reads", "raw_preads", "raw_write", "reader_name"]

_WRITE = 8 << 20


def aligned(size: int) -> np.ndarray:
    """Page-aligned memory that was touched: `[size]` uint8."""
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    memory[:] = 1
    return memory


def raw_write(folder: Path, total: int) -> float:
    """Write `total` bytes past the page cache, 8 MiB at a time, on one thread, into reserved space; sync: GB/s.

    The time ends when the data and the file's name are durable.
    """
    block = aligned(_WRITE)
    block[:] = np.random.default_rng(0).integers(0, 255, _WRITE, dtype=np.uint8)
    path = folder / "raw"
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
    try:
        os.posix_fallocate(fd, 0, total)
        for offset in range(0, total, _WRITE):
            os.pwrite(fd, block.data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    taken = time.perf_counter() - began
    path.unlink()
    return -(-total // _WRITE) * _WRITE / taken / 1e9


def raw_preads(path: Path, size: int, offsets: Sequence[int]) -> list[float]:
    """Read `size` bytes at each offset past the page cache, one after the other: microseconds each."""
    buffer = aligned(size)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    taken = []
    try:
        for offset in offsets:
            began = time.perf_counter()
            os.preadv(fd, [buffer.data], offset)
            taken.append((time.perf_counter() - began) * 1e6)
    finally:
        os.close(fd)
    return taken


def reader_name() -> str:
    """What `random_reads` runs."""
    fio = shutil.which("fio")
    if fio is None:
        return "libaio loop in Python (fio is not installed)"
    said = subprocess.run([fio, "--version"], capture_output=True, text=True, check=True)  # noqa: S603 -- fio, as found
    return said.stdout.strip()


def random_reads(files: Sequence[Path], size: int, count: int, *, depth: int = 32, jobs: int = 1) -> float:
    """Read `count` random pieces of `size` bytes from files, past the page cache, at a queue depth: bytes/s.

    With fio if it is installed, else with our own loop, which always runs one job.
    """
    if shutil.which("fio") is None:
        return _random_reads(files, size, count, depth)
    names = ":".join(str(path).replace(":", "\\:") for path in files)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603 -- fio, as found
            [
                shutil.which("fio") or "fio", "--name=read", "--ioengine=libaio", "--direct=1", "--rw=randread",
                f"--bs={size}", f"--iodepth={depth}", f"--numjobs={jobs}", f"--filename={names}", "--readonly",
                f"--io_size={size * max(1, count // jobs)}", "--randrepeat=0", "--gtod_reduce=1", "--group_reporting",
                "--output-format=json", "--allow_file_create=0",
            ],
            capture_output=True, text=True, check=True, cwd=folder,
        )  # fmt: skip
    # Warnings come before the JSON.
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return float(read["io_bytes"] / max(read["runtime"], 1) * 1e3)


def _random_reads(files: Sequence[Path], size: int, count: int, depth: int) -> float:
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    random = np.random.default_rng()
    step = 512 * (size // 512) or 512
    buffer = aligned(depth * -(-size // 4096) * 4096)
    places = buffer.ctypes.data + np.arange(depth) * (len(buffer) // depth)
    chosen = random.integers(0, len(fds), count)
    blocks = np.array([max(1, path.stat().st_size // step - 1) for path in files])
    offsets = random.integers(0, blocks[chosen]) * step
    free, at = list(range(depth)), 0
    began = time.perf_counter()
    try:
        with Queue(depth) as queue:
            while at < count or queue.in_flight:
                if at < count and free:
                    slot = free.pop()
                    some = slice(at, at + 1)
                    fd = np.array([fds[chosen[at]]])
                    queue.prepare(READ, fd, places[slot : slot + 1], np.array([step]), offsets[some], slot)
                    queue.submit()
                    at += 1
                else:
                    free += queue.reap(1)
    finally:
        for opened in fds:
            os.close(opened)
    return count * step / (time.perf_counter() - began)


def memcpy(total: int, piece: int) -> float:
    """Copy `total` bytes of a large source, in pieces, into one touched buffer, on one thread: bytes/s."""
    source, target = aligned(max(piece, min(total, 1 << 30))), aligned(piece)
    steps = len(source) // piece
    began = time.perf_counter()
    done = 0
    while done < total:
        start = done // piece % steps * piece
        np.copyto(target, source[start : start + piece])
        done += piece
    return done / (time.perf_counter() - began)
