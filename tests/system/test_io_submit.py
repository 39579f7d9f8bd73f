"""Asynchronous requests: what is asked for comes, failures are told, nothing is in flight afterwards."""

import errno
import os

import numpy as np
import pytest

from mmcache.system import direct_io
from mmcache.system.direct_io import Queue, deepest
from mmcache.system.memory import anonymous
from mmcache.system.syscalls import AIO, READ, WRITE

pytestmark = pytest.mark.skipif(not AIO, reason="no asynchronous I/O here, or the fast paths are switched off")
PIECE = 4096


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(64 * PIECE))
    return path


@pytest.fixture
def queue():
    queue = Queue(16)
    yield queue
    queue.close()


def submit(queue, opcode, fd, room, pieces, tag=0):
    """Ask for pieces of a file, one after the other in `room`."""
    count = len(pieces)
    addresses = room.ctypes.data + np.arange(count) * PIECE
    fds, sizes = np.full(count, fd), np.full(count, PIECE)
    queue.prepare(opcode, fds, addresses, sizes, np.asarray(pieces) * PIECE, tag)
    queue.submit()


def read_one(queue, fd, room, piece):
    with queue:
        submit(queue, READ, fd, room, [piece])
        queue.reap(1)


def read_and_be_interrupted(queue, fd, room):
    with queue:
        submit(queue, READ, fd, room, range(8))
        raise KeyboardInterrupt


def test_reads_come_from_where_they_were_asked(queue, file):
    fd, room, data = os.open(file, os.O_RDONLY), anonymous(16 * PIECE), file.read_bytes()
    for turn in range(5):
        pieces = np.random.default_rng(turn).integers(0, 64, 16)
        with queue:
            submit(queue, READ, fd, room, pieces[:10], tag=1)
            submit(queue, READ, fd, room[10 * PIECE :], pieces[10:], tag=2)
            assert (queue.in_flight, queue.free) == (16, 0)
            tags = []
            while queue.in_flight:
                tags += queue.reap(1)
            assert sorted(tags) == [1] * 10 + [2] * 6
        expected = b"".join(data[piece * PIECE : (piece + 1) * PIECE] for piece in pieces)
        assert room.tobytes() == expected
    os.close(fd)


def test_writes_go_to_where_they_were_asked(queue, file):
    fd, room = os.open(file, os.O_RDWR), anonymous(4 * PIECE)
    room[:] = np.repeat(np.arange(4, dtype=np.uint8), PIECE)
    with queue:
        submit(queue, WRITE, fd, room, [7, 3, 60, 0])
        while queue.in_flight:
            queue.reap(queue.in_flight)
    os.close(fd)
    data = file.read_bytes()
    assert [data[piece * PIECE] for piece in (7, 3, 60, 0)] == [0, 1, 2, 3]


def test_a_read_beyond_the_end_is_told(queue, file):
    fd, room = os.open(file, os.O_RDONLY), anonymous(PIECE)
    with pytest.raises(OSError, match="0 bytes instead of 4096"):
        read_one(queue, fd, room, 64)
    os.close(fd)


def test_a_read_that_fails_is_told_by_its_number(queue, tmp_path):
    fd, room = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT), anonymous(PIECE)
    # Found when it is submitted: the descriptor is for writing only.
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_one(queue, fd, room, 0)
    os.close(fd)


def test_what_ends_the_block_waits_for_all_that_is_in_flight(queue, file):
    fd, room = os.open(file, os.O_RDONLY), anonymous(8 * PIECE)
    with pytest.raises(KeyboardInterrupt):
        read_and_be_interrupted(queue, fd, room)
    # Closed, which waits: all of it has come by now.
    assert queue.closed
    assert room.tobytes() == file.read_bytes()[: 8 * PIECE]
    os.close(fd)


def test_a_queue_can_be_closed_twice(queue):
    queue.close()
    queue.close()
    assert queue.closed


def test_what_was_prepared_is_submitted_in_one_go(queue, file, monkeypatch):
    fd, room, calls = os.open(file, os.O_RDONLY), anonymous(16 * PIECE), []
    real = direct_io.aio_submit
    monkeypatch.setattr(direct_io, "aio_submit", lambda *given: calls.append(1) or real(*given))
    with queue:
        for piece in range(16):
            place = room.ctypes.data + np.array([piece * PIECE])
            queue.prepare(READ, np.array([fd]), place, np.array([PIECE]), np.array([(63 - piece) * PIECE]), piece)
            assert queue.free == 15 - piece
        queue.submit()
        tags = []
        while queue.in_flight:
            tags += queue.reap(1)
    assert sorted(tags) == list(range(16))
    assert calls == [1]
    data = file.read_bytes()
    assert room.tobytes() == b"".join(data[(63 - piece) * PIECE : (64 - piece) * PIECE] for piece in range(16))
    os.close(fd)


def test_what_was_prepared_and_never_submitted_is_forgotten(queue):
    with queue:
        queue.prepare(READ, *(np.zeros(5, np.int64) for _ in range(4)))
        assert queue.free == 11
    with queue:
        assert queue.free == 16


def test_where_few_requests_are_left_the_queue_is_shallower(monkeypatch):
    left, real = [1024], direct_io.aio_setup

    def setup(depth):
        if depth > left[0]:
            raise OSError(errno.EAGAIN, "none left")
        return real(depth)

    monkeypatch.setattr(direct_io, "aio_setup", setup)
    depths = []
    for left[0] in (5000, 1024, 300):
        queue = deepest()
        depths.append(queue.depth)
        queue.close()
    assert depths == [4096, 1024, 256]
    left[0] = 100
    with pytest.raises(BlockingIOError, match="none left"):
        deepest()


def test_another_refusal_is_told_at_once(monkeypatch):
    calls = []

    def setup(depth):
        calls.append(depth)
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(direct_io, "aio_setup", setup)
    with pytest.raises(OSError, match="no such call"):
        deepest()
    assert len(calls) == 1
