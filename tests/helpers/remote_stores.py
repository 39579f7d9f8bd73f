"""Stores in a bucket for tests: how they get there without mmcache, what their cache takes, and their local twins."""

import contextlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import mmcache
from stores_and_processes import random_bits, same, wait_for

LAYERS, SHARD = 4, 256
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +(.*)$")


def make(path, *, layout="token", dtype=torch.float32, tokens=900, sites=None, shard=SHARD, seed=0):
    """Make a grown store, with a partly filled last shard."""
    sites = sites or {"a": 256, "b": 64}
    dice = torch.Generator().manual_seed(seed)
    with mmcache.create(
        path, sites=sites, n_layers=LAYERS, layout=layout, dtype=dtype, shard_tokens=shard, special_tokens=(3,)
    ) as writer:
        extend(writer, sites, dtype, tokens, dice)
    return path


def extend(writer, sites, dtype, tokens, dice):
    """Append so many tokens, in sequences of up to 500."""
    while tokens:
        length = min(tokens, 500)
        rows = {s: torch.randn(LAYERS, length, width, generator=dice).to(dtype) for s, width in sites.items()}
        writer.append(torch.randint(0, 50, (length,), generator=dice), rows)
        tokens -= length


def make_cache(path, tokens=700, width=64):
    """Make a cache: a store without tokens."""
    with mmcache.FullActivationCache.with_capacity(3, path, shard_tokens=SHARD) as made:
        for layer in range(3):
            made.push(random_bits(tokens, width, dtype=torch.float32, seed=layer))
    return path


def upload(server, folder, prefix="acts", *, but=lambda _: False):
    """Put a store's files into the bucket, by boto3; give its address."""
    client = server.client()

    def put(file):
        key = file.relative_to(folder).as_posix()
        if file.is_file() and not file.name.startswith(".") and not but(key):
            client.put_object(Bucket=server.bucket, Key=f"{prefix}/{key}", Body=file.read_bytes())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, sorted(Path(folder).rglob("*"))))
    return server.url(prefix)


def replace(server, key, data):
    """Put other bytes in the place of an object."""
    server.client().put_object(Bucket=server.bucket, Key=key, Body=data)


def compare(found, right, dice):
    """Compare all that can be read of a store with what its local twin gives."""
    assert same(found.tokens, right.tokens)
    assert same(found.flags, right.flags)
    assert [list(span) for span in found.sequences] == [list(span) for span in right.sequences]
    middle = right.n_tokens // 2
    assert found.locate(middle) == right.locate(middle)
    assert same(found.read_tokens(middle, middle + 5), right.read_tokens(middle, middle + 5))
    for site in right.sites:
        compare_site(found[site], right[site], dice)
        for name, right_one in vars(right[site].statistics).items():
            assert same(getattr(found[site].statistics, name), right_one)


def compare_site(found, right, dice):
    """Compare rows, gathers, slices, layers and a sequence of a site."""
    layers, tokens, width = right.shape
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    for _ in range(5):
        layer, position = int(dice.integers(layers)), int(dice.integers(-tokens, tokens))
        assert same(found.get_position(layer, position), right.get_position(layer, position))
    for count in (1, 30, tokens // 2):
        positions = dice.integers(-tokens, tokens, count)
        assert same(found.gather(positions), right.gather(positions))
        some = dice.permutation(layers)[: layers // 2].tolist()
        assert same(found.gather(positions, layers=some), right.gather(positions, layers=some))
        out = torch.empty((count, layers, width), dtype=right.dtype)
        assert found.gather(positions, out=out) is out
        assert same(out, right.gather(positions))
    assert same(found.gather([5] * 7), right.gather([5] * 7))
    assert same(found.gather([]), right.gather([]))
    assert same(found.gather([1, 2], layers=[]), right.gather([1, 2], layers=[]))
    for rows in (slice(10, 20), slice(None, None, 7), slice(-5, None), slice(300, 3, -11), slice(9, 9)):
        assert same(found[layers - 1, rows], right[layers - 1, rows])
    for layer in range(layers):
        assert same(found.get_layer(layer), right.get_layer(layer))
    assert same(found.sequence(0), right.sequence(0))


def compare_epoch(found, right, **options):
    """Compare one shuffled epoch, batch for batch."""
    given = {"batch_size": 64, "seed": 3, "drop": ()} | options
    ours, theirs = (mmcache.ActivationDataset(store, **given) for store in (found, right))
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.positions, other.positions)
        assert same(one.tokens, other.tokens)
        for site in right.sites:
            assert same(one[site], other[site])
        count += 1
    assert count == len(theirs)


def _deleted(folder):
    """Give the bytes of files of a folder that are gone and still held by this process, by inode and name."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = _MAPPED.match(line)
        if match and match[4].startswith(f"{folder}/") and match[4].endswith("(deleted)"):
            found[match[3], match[4]] = found.get((match[3], match[4]), 0) + int(match[2], 16) - int(match[1], 16)
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(fd.readlink())
            if name.startswith(f"{folder}/") and name.endswith("(deleted)"):
                status = fd.stat()
                found[str(status.st_ino), name] = status.st_size
    return found


def _there(folder):
    found = {}
    with os.scandir(folder) as entries:
        # What is noted of the files is none of them.
        for entry in (entry for entry in entries if entry.name != ".checked"):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                found[entry.name, status.st_ino] = max(status.st_size, status.st_blocks * 512)
    return found


class Watch:
    """Looks all the time at what a cache's folder takes, files that are gone and still held by us included."""

    def __init__(self, folder):
        self.folder, self.most, self.looks = folder, 0, 0
        self._before = (0, 0, 0, 0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self._thread.join()
        # A busy machine may have let it look at little.
        if self.folder.exists():
            self.look()

    def look(self):
        """Count what was there at the same moment: what is met both before and behind it."""
        maps, files = _deleted(self.folder), _there(self.folder)
        again = _there(self.folder)
        maps_again = _deleted(self.folder)
        held = sum(size for key, size in maps.items() if key in maps_again)
        taken = sum(min(size, again[key]) for key, size in files.items() if key in again)
        # What was opened just before it went is held until it is closed: that, and no longer, is fine.
        lasting = min(*self._before, held + taken)
        self._before = (*self._before[1:], held + taken)
        self.most = max(self.most, taken, lasting)
        self.looks += 1

    def _watch(self):
        while not self._ending.wait(0.01):
            if self.folder.exists():
                self.look()


def is_here(store, site, key):
    """Tell whether a shard is in the cache."""
    return (store.remote.cache.folder / store.remote._file(site, key)).exists()


def tidy(folder):
    """Wait for what still comes in the background, and tell that no drafts and locks are left behind it."""
    wait_for(lambda: not [file for file in Path(folder).rglob(".*") if file.name.endswith((".tmp", ".lock"))])
    return True
