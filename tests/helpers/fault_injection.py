"""A disk that fails, dies or loses power at any operation that changes it.

Every call of the system by which mmcache changes a folder goes through this module's stand-ins, in a fork: there the
Nth of them fails, is cut short, comes late, or is the last thing that the process does. What a power failure leaves
is made from the log of a whole run: what was synced is there; what was not is lost, kept, or partly kept and in
another order (after Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
"""

import ast
import errno
import inspect
import os
import pickle
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import mmcache
from stores_and_processes import path_at

PACKAGE = Path(mmcache.__file__).parent
# The modules that touch the disk, and the calls by which they change it.
MODULES = ("system/no_symlinks.py", "system/files.py", "system/atomic.py", "system/locks.py")
CHANGES = ("open", "pwrite", "pwritev", "ftruncate", "fchmod", "fsync", "rename", "unlink", "mkdir", "posix_fallocate")
KILLED = 77
_SECTOR = 512

_ERRORS = {
    "open": (errno.EMFILE, errno.ENOSPC, errno.EACCES),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.EFBIG),
    "pwritev": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "mkdir": (errno.ENOSPC, errno.EROFS),
    "posix_fallocate": (errno.ENOSPC, errno.EOPNOTSUPP),
    "unlink": (errno.EIO, errno.EROFS),
}


def faults_of(call):
    """List the ways in which a call may go wrong."""
    found = [errno.errorcode[code] for code in _ERRORS.get(call, (errno.EIO, errno.ENOSPC))]
    found += ["late", "killed before", "killed behind"]
    return found + (["short", "torn", "killed within"] if call.startswith("pwrite") else [])


@dataclass(frozen=True)
class Call:
    """One operation: which call of the system, and where in mmcache it was made."""

    name: str
    site: str


def call_sites():
    """List where mmcache's modules change the disk, as (module, line), from their source."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES):
                continue
            found.add((module, node.lineno))
    return found


def _function_at(module, line):
    """Name the innermost function that holds a line of a module."""
    best = None
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno:
            best = node if best is None or node.lineno > best.lineno else best
    return best.name if best else ""


# Functions that open files, and folders, to read them only.
READERS = {"read_file", "open_file", "open_known", "remove_drafts", "opened_folder", "open_in"}
# Locks, and empty files that stand for shards, of what can be had again from a bucket: a cache, or a staging folder,
# whose own tests kill and fail them.
AGAIN = {"locked", "make_empty"}


def changing_sites():
    """List the call sites that change the disk, without those that open files to read them."""
    return {
        (module, line)
        for module, line in call_sites()
        if _function_at(module, line) not in AGAIN
        and (_function_at(module, line) not in READERS or "unlink" in _line(module, line))
    }


def _line(module, line):
    return (PACKAGE / module).read_text().splitlines()[line - 1]


class Disk:
    """Stands in for `os` below a folder, in this process: for good, so use it in a fork.

    Args:
        root: the folder.
        fail: (number of the operation, fault), or None.
        told: a file that is given the operation that the fault met, and the fault: threads run in another order in
            each run, and another operation may be the Nth.
        then: (call, fault): what goes wrong of the tidying up behind the first fault.
        contents: whether what is written goes into the log.
    """

    def __init__(self, root, fail=None, told=None, *, then=None, contents=False):
        self.root, self.fail, self.told, self.contents = str(root), fail, told, contents
        self.then = then
        self.calls, self.log = [], []
        self._ids, self._next = {}, 0
        self._real = {name: getattr(os, name) for name in CHANGES}
        for name in CHANGES:
            setattr(os, name, lambda *args, _name=name, **options: self._do(_name, args, options))

    def ack(self, what):
        """Note that something was promised to be durable."""
        self.log.append(("ack", what))

    def _do(self, name, args, options):
        real = self._real[name]
        site = _site()
        path = str(path_at(args[0], options.get("dir_fd", options.get("src_dir_fd"))))
        if site is None or not path.startswith(self.root):
            return real(*args, **options)
        number = len(self.calls)
        self.calls.append(Call(name, site))
        fault = None
        if self.fail is not None and self.fail[0] == number:
            fault = self.fail[1]
        elif self.then is not None and self.fail[0] < number and self.then[0] == name:
            fault, self.then = self.then[1], None
        if fault is not None:
            fault = fault if fault in faults_of(name) else "EIO"
            with self.told.open("a") as told:
                told.write(f"{site} {name} {fault}\n")
            done = self._go_wrong(name, fault, args, real, options)
            if done is not None:
                return done
        result = real(*args, **options)
        self._note(name, path, args, options, result)
        if fault == "killed behind":
            self._die()
        return result

    def _go_wrong(self, name, fault, args, real, options):
        """Do what a fault does; None where the call is made as it would have been."""
        if fault == "late":
            time.sleep(0.02)
        elif fault in ("short", "torn", "killed within"):
            data = args[1] if name == "pwrite" else args[1][0]
            half = data[: len(data) // 2]
            done = real(args[0], half if name == "pwrite" else [half], *args[2:], **options) if len(half) else 0
            if fault == "killed within":
                self._die()
            if fault == "torn" or not done:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return done
        elif fault == "killed before":
            self._die()
        elif fault != "killed behind":
            code = getattr(errno, fault)
            raise OSError(code, os.strerror(code))
        return None

    def _die(self):
        os._exit(KILLED)

    def _id(self, path, *, fresh=False):
        inode = (os.fstat(path) if isinstance(path, int) else Path(path).stat()).st_ino
        if fresh or inode not in self._ids:
            self._next += 1
            self._ids[inode] = self._next
        return self._ids[inode]

    def _note(self, name, path, args, options, result):
        """Write down what happened, for `after_power_loss`."""
        if not self.contents:
            return
        short = os.path.relpath(path, self.root)
        if name == "open":
            if args[1] & os.O_CREAT and args[1] & os.O_EXCL:
                self.log.append(("create", short, self._id(result, fresh=True)))
        elif name in ("pwrite", "pwritev"):
            data = args[1] if name == "pwrite" else args[1][0]
            self.log.append(("write", self._id(args[0]), args[2], bytes(data[:result])))
        elif name == "ftruncate":
            self.log.append(("truncate", self._id(args[0]), args[1]))
        elif name == "posix_fallocate":
            self.log.append(("extend", self._id(args[0]), args[1] + args[2]))
        elif name == "fsync":
            folder = os.path.isdir(path)  # noqa: PTH112
            self.log.append(("sync folder", short) if folder else ("sync", self._id(args[0])))
        elif name == "rename":
            there = path_at(args[1], options.get("dst_dir_fd"))
            self.log.append(("rename", short, os.path.relpath(there, self.root), self._id(there)))
        elif name in ("unlink", "mkdir"):
            self.log.append((name, short))


def _site():
    """Say where in mmcache's disk modules a call comes from, or None: it is somebody else's, or only reads."""
    frame = inspect.currentframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            name = file.relative_to(PACKAGE).as_posix()
            if name not in MODULES or frame.f_code.co_name in READERS - {"remove_drafts"}:
                return None
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def in_fork(work, root, **options):
    """Run `work(disk)` in a fork on such a disk: how it ended ("done", "killed", or an error's class), and its disk."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        torch.set_num_threads(1)
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 -- what threads say of their errors
        disk = Disk(root, **options)
        try:
            work(disk)
            ended = "done"
        except BaseException as error:  # noqa: BLE001 -- it is told to the parent
            ended = f"{type(error).__module__}.{type(error).__name__}: {error}"
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump((ended, disk.calls, disk.log), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not said:
        assert code == KILLED, code
        return "killed", [], []
    return pickle.loads(said)  # noqa: S301 -- our own fork's


def after_power_loss(before, log, to, how, seed=0):  # noqa: C901, PLR0912 -- a case for each kind of operation
    """Make a folder as a power failure behind the last entry of a log may leave it.

    Args:
        before: the folder's `stores_and_processes.tree`, locks too, before the log begins.
        log: what was done, in order.
        to: where.
        how: what was not synced is `"lost"`, `"kept"`, or `"mixed"`: any of it, torn, in any order.
        seed: of the dice for `"mixed"`.
    """
    dice = random.Random(seed)  # noqa: S311
    last_sync = {entry[1]: place for place, entry in enumerate(log) if entry[0] == "sync"}
    folder_syncs = {}
    for place, entry in enumerate(log):
        if entry[0] == "sync folder":
            folder_syncs[entry[1]] = place

    def stays(place, synced):
        if synced is not None and place < synced:
            return True
        return how == "kept" or (how == "mixed" and dice.random() < 0.5)

    def named(place, path):
        return stays(place, folder_syncs.get(os.path.dirname(path) or "."))  # noqa: PTH120

    names = {path: ("before", data) for path, data in before.items() if data is not None}
    folders = {path for path, data in before.items() if data is None} | {"."}
    written = {}
    for place, entry in enumerate(log):
        kind = entry[0]
        if kind == "mkdir" and named(place, entry[1]):
            folders.add(entry[1])
        elif kind == "create" and named(place, entry[1]):
            names[entry[1]] = ("new", entry[2])
        elif kind == "unlink" and named(place, entry[1]):
            names.pop(entry[1], None)
        elif kind == "rename":
            source, target, number = entry[1:]
            # What was there before keeps its bytes wherever it goes.
            what = names.get(source, ("new", number))
            # Within a folder both or neither; from one to another a crash may leave two names.
            moved = named(place, target)
            gone = moved if os.path.dirname(source) == os.path.dirname(target) else named(place, source)  # noqa: PTH120
            if moved:
                names[target] = what
            if gone and moved:
                names.pop(source, None)
        elif kind in ("write", "truncate", "extend") and stays(place, last_sync.get(entry[1])):
            durable = place < last_sync.get(entry[1], -1)
            written[entry[1]] = _applied(written.get(entry[1], b""), entry, dice, torn=how == "mixed" and not durable)
    to.mkdir()
    for folder in sorted(folders):
        (to / folder).mkdir(exist_ok=True, parents=True)
    for path, (kind, what) in names.items():
        if (os.path.dirname(path) or ".") in folders:  # noqa: PTH120
            (to / path).write_bytes(what if kind == "before" else written.get(what, b""))


def _applied(data, entry, dice, *, torn):
    kind, size = entry[0], entry[2]
    if kind == "truncate":
        return data[:size].ljust(size, b"\0")
    if kind == "extend":
        return data.ljust(size, b"\0")
    offset, new = entry[2:]
    if torn:
        new = new[: dice.randrange(0, len(new) + 1) // _SECTOR * _SECTOR]
    data = data.ljust(offset + len(new), b"\0")
    return data[:offset] + new + data[offset + len(new) :]
