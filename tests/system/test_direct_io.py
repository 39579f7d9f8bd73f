"""Direct reads: whatever rows, of whatever size, in whatever order, as a plain read gives them."""

import errno
import os

import numpy as np
import pytest
import torch

from mmcache.system import direct_io
from mmcache.system.direct_io import GAP_BYTES, DirectReader, Wanted, borrowed
from mmcache.system.files import Descriptor
from mmcache.system.syscalls import AIO

needs_aio = pytest.mark.skipif(not AIO, reason="no asynchronous I/O here, or the fast paths are switched off")


class Files:
    """Rows in files whose data begin at byte 4096, as `direct_io.Source` wants them."""

    data_offset = 4096

    def __init__(self, folder, rows_per_file, row_elements, files, alignment=512):
        self.rows_per_file, self.alignment, self.opened = rows_per_file, alignment, 0
        self.rows = np.random.default_rng(0).integers(0, 2**16, (files * rows_per_file, row_elements), np.uint16)
        self.paths = [folder / str(number) for number in range(files)]
        for number, path in enumerate(self.paths):
            data = self.rows[number * rows_per_file : (number + 1) * rows_per_file].tobytes()
            path.write_bytes(b"\xff" * 4096 + data + b"\xff" * (-len(data) % 4096 + 4096))

    def descriptors(self, files):
        self.opened += len(files)
        return {file: Descriptor(os.open(self.paths[file], os.O_RDONLY | os.O_DIRECT)) for file in files}


def read(files, rows, shift=0):
    """Read rows into memory that begins `shift` elements behind a page, and give them and the bytes it took."""
    width = files.rows.shape[1]
    room = torch.zeros(len(rows) * width + shift, dtype=torch.int16)
    into = room[shift:].view(len(rows), width)
    with borrowed() as reader:
        (taken,) = reader.read([Wanted(files, np.asarray(rows, np.int64), into)])
    return into.numpy().view(np.uint16), taken


WIDTHS = {"whole pages": 4096, "whole sectors": 256, "odd": 77, "of one element": 1, "half a megabyte": 1 << 18}


@needs_aio
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("alignment", [512, 4096])
def test_rows_come_as_they_are(tmp_path, width, alignment):
    per_file = max(3, 40_000 // width)
    files = Files(tmp_path, per_file, width, 3, alignment)
    total, generator = 3 * per_file, np.random.default_rng(1)
    picks = {
        "few": generator.integers(0, total, min(70, total)),
        "all": np.arange(total),
        "backwards": np.arange(total)[::-1],
        "shuffled": generator.permutation(total),
        "far apart": np.arange(0, total, max(1, total // 50)),
        "repeated": np.repeat(generator.integers(0, total, 20), 5),
        "one": np.array([total - 1]),
    }
    for name, rows in picks.items():
        found, taken = read(files, rows, shift=3)
        assert (found == files.rows[rows]).all(), name
        # Nothing is read twice but what was asked twice, and no more between than what is cheaper than a request.
        assert taken <= len(rows) * (width * 2 + 2 * alignment + GAP_BYTES), name


@needs_aio
def test_more_than_the_ring_and_the_queue_hold(tmp_path):
    files = Files(tmp_path, 10_000, 512, 2)
    rows = np.random.default_rng(2).permutation(20_000)[:15_000] // 40 * 40 % 20_000
    found, _ = read(files, rows)
    assert (found == files.rows[rows]).all()


@needs_aio
@pytest.mark.parametrize("depth", [4096, 256])
def test_what_several_want_is_read_in_one_go(tmp_path, monkeypatch, depth):
    monkeypatch.setattr(direct_io, "_DEPTHS", (depth,))
    direct_io._IDLE.clear()
    generator, sources = np.random.default_rng(4), []
    for number, (width, alignment) in enumerate([(9216, 512), (256, 512), (77, 4096), (4096, 512)]):
        (tmp_path / str(number)).mkdir()
        sources.append(Files(tmp_path / str(number), 100, width, 3, alignment))
    wanted = [
        Wanted(files, rows, torch.zeros(len(rows), files.rows.shape[1], dtype=torch.int16))
        for turn in range(3)
        for files in sources
        for rows in [generator.permutation(300)[: [300, 5, 120][turn]]]
    ]
    submitted, real = [], direct_io.aio_submit
    monkeypatch.setattr(direct_io, "aio_submit", lambda *given: submitted.append(1) or real(*given))
    with borrowed() as reader:
        taken = reader.read(wanted)
        assert not reader._opened
    for (files, rows, into), size in zip(wanted, taken, strict=True):
        assert (into.numpy().view(np.uint16) == files.rows[rows]).all()
        assert 0 < size <= len(rows) * (files.rows.shape[1] * 2 + 2 * files.alignment + GAP_BYTES)
    # Once for what goes straight to its place, once or twice for the ring.
    assert len(submitted) <= (5 if depth == 4096 else 60)
    direct_io._IDLE.clear()
    reader.queue.close()


@needs_aio
def test_rows_of_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "_MOST_FILES", 4)
    files = Files(tmp_path, 8, 4096, 40)
    rows = np.random.default_rng(3).permutation(320)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- names only
    found, _ = read(files, rows)
    assert (found == files.rows[rows]).all()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 -- names only


@needs_aio
def test_dense_rows_are_read_through_and_sparse_ones_are_not(tmp_path):
    files = Files(tmp_path, 4096, 1024, 2)
    dense, sparse = np.arange(0, 8192, 2), np.arange(0, 8192, 64)
    assert read(files, np.random.default_rng(0).permutation(dense))[1] > 0.99 * 8192 * 2048
    assert read(files, sparse)[1] == len(sparse) * 2048


@needs_aio
def test_a_file_that_was_cut_short_is_told(tmp_path):
    files = Files(tmp_path, 100, 4096, 2)
    os.truncate(files.paths[1], 4096 + 50 * 8192)
    found, _ = read(files, np.arange(140))
    assert (found == files.rows[:140]).all()
    with pytest.raises(OSError, match="bytes instead of") as failed:
        read(files, np.arange(0, 200, 2))
    assert failed.value.errno == errno.EIO


@needs_aio
def test_a_reader_that_failed_is_not_used_again(tmp_path):
    files = Files(tmp_path, 100, 4096, 1)
    os.truncate(files.paths[0], 4096)
    direct_io._IDLE.clear()
    with pytest.raises(OSError, match="bytes instead of"):
        read(files, [5])
    assert not direct_io._IDLE


@needs_aio
def test_a_few_readers_are_kept(tmp_path):
    direct_io._IDLE.clear()
    files = Files(tmp_path, 100, 64, 1)
    read(files, [1])
    (kept,) = direct_io._IDLE
    with borrowed() as one, borrowed() as other:
        assert one is kept
        assert other is not kept
    assert len(direct_io._IDLE) == 2
    readers = [DirectReader() for _ in range(9)]
    direct_io._IDLE.extend(readers[: direct_io._MOST_IDLE])
    with borrowed():
        direct_io._IDLE.extend(readers[direct_io._MOST_IDLE :])
    assert sum(not reader.queue.closed for reader in direct_io._IDLE) == len(direct_io._IDLE)
    direct_io._IDLE.clear()
    for reader in readers:
        reader.queue.close()
