"""The system calls that Python has no names for, through ctypes: address space, advice, residency, asynchronous I/O.

Linux only: `LINUX` says whether any of this may be called, and every caller has a portable path too. Calls that take
microseconds keep the GIL (see system/threads.py); calls that may wait for the disk release it.

Sources: man pages mmap(2), madvise(2), process_madvise(2), mincore(2), statx(2), io_submit(2); the structures are
those of <linux/aio_abi.h> and <linux/stat.h>.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mmcache.system.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AIO",
    "EVENT",
    "IOCB",
    "LIBC",
    "LINUX",
    "PORTABLE",
    "READ",
    "WRITE",
    "Ranges",
    "Residency",
    "aio_destroy",
    "aio_reap",
    "aio_setup",
    "aio_submit",
    "dont_need",
    "map_over",
    "page_table_bytes",
    "populate",
    "release",
    "reserve",
    "unmap_over",
    "will_need",
    "will_need_all",
    "writable",
]

# MMCACHE_PORTABLE=1 selects the portable paths everywhere.
PORTABLE = bool(os.environ.get("MMCACHE_PORTABLE"))
# Shard data start at byte 4096, which can be mapped only if pages are no larger.
LINUX = sys.platform == "linux" and sys.maxsize > 2**32 and mmap.PAGESIZE == PAGE and not PORTABLE

READ, WRITE = 0, 1
IOCB = np.dtype(
    [("data", "<u8"), ("key", "<u4"), ("flags", "<u4"), ("opcode", "<u2"), ("priority", "<i2"), ("fd", "<u4"),
     ("address", "<u8"), ("size", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("more", "<u4"), ("event_fd", "<u4")]
)  # fmt: skip
EVENT = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("more", "<i8")])

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = _NUMBERS.get(platform.machine(), (-1,) * 4)
_PROCESS_MADVISE, _PIDFD_OPEN = 440, 434
# Whether the numbers of this machine's asynchronous I/O calls are known; `aio_setup` fails if the kernel forbids them.
AIO = LINUX and _SETUP >= 0

_NONE, _READ = 0, 1
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_RANDOM, _WILLNEED, _DONTNEED, _POPULATE_READ = 1, 3, 4, 22
_FAILED = ctypes.c_void_p(-1).value
_MOST_RANGES = 1024
_HUGE = 2 << 20

# Ranges of memory: page-aligned addresses and sizes in bytes, int64 `[n]` each.
Ranges: TypeAlias = "tuple[np.ndarray, np.ndarray]"

# The C library: calls through `LIBC` keep the GIL, calls through `_let_go` release it.
LIBC = _held = ctypes.PyDLL(None, use_errno=True)
_let_go = ctypes.CDLL(None, use_errno=True)
if LINUX:
    _held.mmap.restype = ctypes.c_void_p
    _held.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _held.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _held.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _held.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    for _library in (_held, _let_go):
        _library.syscall.restype = ctypes.c_long


def _error(doing: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{doing}: {os.strerror(number)}")


def _mmap(address: int | None, size: int, access: int, flags: int, fd: int, offset: int) -> int:
    found = _held.mmap(address, size, access, flags, fd, offset)
    if found is None or found == _FAILED:
        raise _error(f"mapping {size} bytes")
    return int(found)


def reserve(size: int, offset: int) -> int:
    """Reserve `size` bytes of address space, inaccessible and without memory or commitment. Its address.

    The address equals `offset` modulo the size of a huge page, so that a file mapped there from that offset can use
    huge pages.

    Raises:
        OSError: there is not enough address space (RLIMIT_AS, an old machine).
    """
    found = _mmap(None, size + _HUGE, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
    before = (offset - found) % _HUGE
    if before:
        release(found, before)
    if before < _HUGE:
        release(found + before + size, _HUGE - before)
    return found + before


def release(address: int, size: int) -> None:
    """Release address space. Nothing may point into it any more."""
    _held.munmap(address, size)


def map_over(address: int, size: int, fd: int, offset: int) -> None:
    """Map a file's bytes, read-only, over reserved address space; page faults read no further than what they touch.

    Raises:
        OSError: too many maps (ENOMEM), or a file that cannot be mapped.
    """
    _mmap(address, size, _READ, _SHARED | _FIXED, fd, offset)
    _held.madvise(address, size, _RANDOM)


def unmap_over(address: int, size: int) -> None:
    """Unmap a file, page tables included; the address space stays reserved."""
    _mmap(address, size, _NONE, _PRIVATE | _FIXED | _ANONYMOUS | _NORESERVE, -1, 0)


def will_need(address: int, size: int) -> None:
    """Start reading a range of mapped pages into the page cache; `address` must be page-aligned."""
    _held.madvise(address, size, _WILLNEED)


def dont_need(address: int, size: int) -> None:
    """Drop mapped pages from this process' page tables; they stay in the page cache."""
    _held.madvise(address, size, _DONTNEED)


@cache
def _own_pidfd(process: int) -> int:
    return int(_held.syscall(ctypes.c_long(_PIDFD_OPEN), ctypes.c_long(process), ctypes.c_long(0)))


def populate(address: int, size: int) -> None:
    """Fill the page tables for mapped pages, which must all be in memory (Linux 5.14; no effect on older kernels)."""
    _let_go.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ)


def will_need_all(ranges: Sequence[Ranges]) -> None:
    """Start reading many ranges of mapped pages into the page cache.

    One system call per 1,024 ranges where the kernel has it (Linux 5.10), otherwise one per range.
    """
    pidfd = _own_pidfd(os.getpid())
    vectors = np.empty((sum(len(addresses) for addresses, _ in ranges), 2), np.uint64)
    start = 0
    for addresses, sizes in ranges:
        some = vectors[start : start + len(addresses)]
        some[:, 0], some[:, 1] = addresses, sizes
        start += len(addresses)
    for start in range(0, len(vectors), _MOST_RANGES):
        some = vectors[start : start + _MOST_RANGES]
        done = -1
        if pidfd >= 0:
            done = _let_go.syscall(
                ctypes.c_long(_PROCESS_MADVISE), ctypes.c_long(pidfd), ctypes.c_void_p(some.ctypes.data),
                ctypes.c_long(len(some)), ctypes.c_long(_WILLNEED), ctypes.c_long(0),
            )  # fmt: skip
        if done < 0:
            for address, size in some.tolist():
                _held.madvise(address, size, _WILLNEED)


class Residency:
    """Whether mapped pages are in memory. The kernel tells only users who own the file or may write to it.

    An answer is a guess, since pages come and go; so several threads may share one object.
    """

    def __init__(self, most_bytes: int) -> None:
        self._pages = bytearray(most_bytes // PAGE + 2)
        self._at = ctypes.addressof((ctypes.c_char * len(self._pages)).from_buffer(self._pages))

    def whole(self, address: int, size: int) -> bool:
        """Whether all of `size` mapped bytes at `address` are in memory."""
        first = address & -PAGE
        reach = address + size - first
        _held.mincore(first, reach, self._at)
        return self._pages.find(0, 0, -(-reach // PAGE)) < 0


@cache
def _own_page() -> int:
    return _mmap(None, PAGE, _READ, _PRIVATE | _ANONYMOUS, -1, 0)


def writable(address: int) -> bool:
    """Whether a byte of memory can be written to, tested without a fault; the byte is changed."""
    # mincore writes its answer there, or fails with EFAULT.
    return _held.mincore(_own_page(), PAGE, address) == 0 or ctypes.get_errno() != errno.EFAULT


def page_table_bytes() -> int:
    """Bytes of this process' page tables; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as lines:  # noqa: PTH123 -- no Path for a pseudo-file
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPTE")), 0)
    except OSError:
        return 0


def aio_setup(depth: int) -> int:
    """Create a context for asynchronous I/O of this process. Its handle.

    Raises:
        OSError: the kernel has none, or none left (fs.aio-max-nr).
    """
    handle = ctypes.c_ulong(0)
    if _held.syscall(ctypes.c_long(_SETUP), ctypes.c_long(depth), ctypes.byref(handle)):
        raise _error("setting up asynchronous I/O")
    return handle.value


def aio_destroy(handle: int) -> None:
    """Destroy a context; blocks until every request in it is done."""
    _let_go.syscall(ctypes.c_long(_DESTROY), ctypes.c_ulong(handle))


def aio_submit(handle: int, pointers: np.ndarray) -> int:
    """Submit requests: `pointers` `[n]` uint64 to IOCB records; blocks while the device's queue is full.

    The number of requests accepted; 0 if some must be reaped first. Their memory must stay valid until `aio_reap` has
    returned each of them.

    Raises:
        OSError: none was accepted.
    """
    while True:
        done = _let_go.syscall(
            ctypes.c_long(_SUBMIT), ctypes.c_ulong(handle), ctypes.c_long(len(pointers)),
            ctypes.c_void_p(pointers.ctypes.data),
        )  # fmt: skip
        if done >= 0:
            return int(done)
        if ctypes.get_errno() == errno.EAGAIN:
            return 0
        if ctypes.get_errno() != errno.EINTR:
            raise _error("submitting asynchronous I/O")


def aio_reap(handle: int, least: int, into: np.ndarray) -> int:
    """Block until at least `least` requests are done. The number of EVENT records filled in `into`."""
    while True:
        done = _let_go.syscall(
            ctypes.c_long(_GETEVENTS), ctypes.c_ulong(handle), ctypes.c_long(least), ctypes.c_long(len(into)),
            ctypes.c_void_p(into.ctypes.data), ctypes.c_void_p(None),
        )  # fmt: skip
        if done >= 0:
            return int(done)
        if ctypes.get_errno() != errno.EINTR:
            raise _error("waiting for asynchronous I/O")
