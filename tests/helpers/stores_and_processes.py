"""What the tests of stores share: every bit pattern, what lies in a folder, a store's plain twin, child processes."""

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import mmcache
from mmcache.format.dtypes import BY_NAME

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BOS, SPECIAL, FIRST = 1, 2, 4


def random_bits(*shape, dtype, seed=0):
    """Give a tensor of uniformly random bits: NaN payloads, infinities and subnormals among them."""
    size = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape))
    data = np.random.default_rng(seed).bytes(count * size)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape).clone()


def raw(values):
    """Give the bytes of a tensor or array, by which NaNs can be compared."""
    if isinstance(values, torch.Tensor):
        # Viewed as a flat copy: an empty tensor may have strides that no view takes.
        values = values.detach().reshape(-1).clone().view(torch.uint8).numpy()
    return np.ascontiguousarray(values).tobytes()


def same(found, expected):
    """Tell whether two tensors agree in shape, dtype and every bit."""
    return found.shape == expected.shape and found.dtype == expected.dtype and raw(found) == raw(expected)


def tree(folder, *, locks=False):
    """Give every file below a folder with its bytes, and every folder with None; a writer's lock where asked for."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if locks or path.name != ".lock"
    }


def shards(folder):
    """Give the shard files of one array, in order of name."""
    return sorted(Path(folder).glob("c.*"))


def damage(file, change):
    """Overwrite a sealed file with `change(its bytes)`."""
    data = change(file.read_bytes())
    file.chmod(0o644)
    file.write_bytes(data)


def flip(offset):
    """Give the change that inverts one byte."""

    def change(data):
        data = bytearray(data)
        data[offset] ^= 0xFF
        return bytes(data)

    return change


def python(code, *arguments, timeout=120):
    """Run Python code in a process of its own, in which this checkout of mmcache can be imported."""
    found = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(Path(mmcache.__file__).parents[1]), *([found] if found else [])])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_for(what, seconds=60):
    """Wait until something is true of what others do."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"it did not happen in {seconds} s"
        time.sleep(0.005)


def threads_named(*names):
    """The threads of mmcache's that work in the background under these names (`ThreadPool`)."""
    return [thread for thread in threading.enumerate() if thread.name in {f"mmcache-{name}" for name in names}]


@contextlib.contextmanager
def ended_uploads():
    """Where the block fails, wait for the uploads that were under way: the job does not, and they still write."""
    try:
        yield
    except BaseException:
        wait_for(lambda: not threads_named("upload"))
        raise


def widened(request, counts):
    """Give how many: the first of two counts in the suite, the second with `--slow`."""
    return counts[request.config.getoption("--slow")]


def without_sync(monkeypatch):
    """Leave syncs out, which only matter where the power fails, and take most of the time of a small test.

    That they happen, and in which order, is shown in write/test_cache.py and write/test_writer.py.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)


# Newer Pythons warn that a process with threads should not be forked; data loaders do it all the same.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def start_fork(work):
    """Begin `work()` in a fork of this process, which then exits: with 0 if it returned. Gives its number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            # OpenMP's threads do not come along.
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 -- it must not go on as a second test run
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def exit_code(child):
    """Wait for a fork to end, and give its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work):
    """Run `work()` in a fork of this process, and give its exit code: 0 if it returned."""
    return exit_code(start_fork(work))


def path_at(name, folder=None):
    """The absolute path of a name that is given as such, or from an open folder (`dir_fd`), or as a descriptor."""
    if isinstance(name, int):
        return Path(f"/proc/self/fd/{name}").readlink()
    if folder is None:
        return Path(os.path.abspath(os.fspath(name)))  # noqa: PTH100 -- links are left as they are
    return Path(f"/proc/self/fd/{folder}").readlink() / name


class Recorder:
    """Notes every sync and every rename, in order, and what they were of."""

    def __init__(self, monkeypatch, root):
        self.root, self.events = root, []
        fsync, rename = os.fsync, os.rename

        def record_fsync(fd):
            fsync(fd)
            self.events.append(("sync", os.fstat(fd).st_ino, None))

        def record_rename(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            inode, there = path_at(source, src_dir_fd).stat().st_ino, path_at(target, dst_dir_fd)
            rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self.events.append(("rename", inode, str(there.relative_to(root))))

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "rename", record_rename)

    def check(self, events):
        """Check that nothing gets its name before it is durable, and that nothing counts before it has its name.

        Gives the names, in the order in which they were given.
        """
        renames = [(place, inode, name) for place, (kind, inode, name) in enumerate(events) if kind == "rename"]
        names = [name for _, _, name in renames]
        root_place = renames[-1][0]
        assert names.index("zarr.json") == len(names) - 1, "the commit point does not move last"
        for place, inode, name in renames:
            assert ("sync", inode, None) in events[:place], f"{name} got its name before it was durable"
            folder = ("sync", (self.root / name).parent.stat().st_ino, None)
            until = root_place if name != "zarr.json" else len(events)
            assert folder in events[place:until], f"{name} was counted before its name was durable"
        return names


class Twin:
    """A store as plain tensors: what was appended, by the rules of the documentation and nothing of the code."""

    def __init__(self, sites, n_layers, dtype, special=()):
        self.sites, self.n_layers, self.dtype, self.special = dict(sites), n_layers, dtype, set(special)
        self.tokens, self.flags, self.spans = [], [], []
        self.rows = {site: torch.empty((n_layers, 0, width), dtype=dtype) for site, width in self.sites.items()}

    def copy(self):
        """Give a twin that goes its own way."""
        other = Twin(self.sites, self.n_layers, self.dtype, self.special)
        other.tokens, other.flags = list(self.tokens), list(self.flags)
        other.spans, other.rows = [list(span) for span in self.spans], dict(self.rows)
        return other

    def append(self, tokens, activations, flags=None, *, continues=False):
        """Take in one sequence: ids, `[n_layers, n, d_model]` a site, flags."""
        tokens = [int(token) for token in tokens]
        flags = [0] * len(tokens) if flags is None else [int(flag) for flag in flags]
        flags = [flag | (SPECIAL if token in self.special else 0) for flag, token in zip(flags, tokens, strict=True)]
        if not continues:
            flags[0] |= FIRST | (BOS if tokens[0] in self.special else 0)
        start = len(self.tokens)
        self.tokens += tokens
        self.flags += flags
        if continues:
            self.spans[-1][1] = len(self.tokens)
        else:
            self.spans.append([start, len(self.tokens), len(self.spans)])
        for site, rows in activations.items():
            self.rows[site] = torch.cat([self.rows[site], rows.to(self.dtype)], dim=1)

    def check(self, store):
        """Compare everything that a store says with the twin, bit for bit."""
        assert store.n_tokens == len(self.tokens)
        assert store.n_sequences == len(self.spans)
        assert store.tokens.tolist() == self.tokens
        assert store.flags.tolist() == self.flags
        assert [list(span) for span in store.sequences] == self.spans
        assert store.dtype == self.dtype
        assert store.sites == tuple(self.sites)
        assert store.layers == tuple(range(self.n_layers))
        for site, rows in self.rows.items():
            assert store[site].shape == tuple(rows.shape)
            for layer in range(self.n_layers):
                assert same(store[site].get_layer(layer), rows[layer]), (site, layer)

    def check_path(self, path):
        """Open a store and compare it."""
        with mmcache.open(path) as store:
            self.check(store)


def fill(twin, writer, length, *, seed, continues=False, dtype=None):
    """Append one sequence of random tokens and activations to a writer and to its twin."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (length,), generator=generator)
    activations = {
        site: torch.randn(twin.n_layers, length, width, generator=generator).to(dtype or twin.dtype)
        for site, width in twin.sites.items()
    }
    writer.append(tokens, activations, continues=continues)
    twin.append(tokens, activations, continues=continues)


def abandon(writer):
    """Leave a writer as a crash would: what is under way lands or not, nothing is committed, the lock is free."""
    inner = getattr(writer, "_writer", writer)
    inner._changed = False
    inner._torn = None
    if inner._pipeline is not None:
        inner._pipeline.close()
    inner._abandon()
    inner._closed = True
    inner._lock.release()
    if inner is not writer:
        writer._closed, writer._read = True, None


def file_descriptors():
    """Count the descriptors that this process holds."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def maps_below(folder):
    """Give the lines of this process' maps that are of files below a folder."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line]


def numpy_dtype(dtype):
    """Give the numpy dtype of a torch dtype, bfloat16 included."""
    return BY_NAME[str(dtype).removeprefix("torch.")].numpy


def at_opcode(at, watched, act):
    """A trace function that acts at step `at` of the interpreter in some frames, and one that counts the steps.

    `watched` tells of a frame's code whether it is one of them.
    """
    steps = 0

    def step(_frame, event, _):
        nonlocal steps
        if event == "opcode":
            steps += 1
            if steps == at:
                act()
        return step

    def enter(frame, _event, _):
        if not watched(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    return enter, lambda: steps
