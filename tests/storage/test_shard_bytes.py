"""A shard is read alike from a file and from an object, as far as it goes."""

import os
import random

import pytest

import remote_stores
from mmcache.errors import CorruptError, IncompleteError
from mmcache.storage.mirror import Mirror
from mmcache.storage.shard_bytes import FileBytes, ObjectBytes
from mmcache.system.memory import anonymous
from stores_and_processes import shards

PAGE = 4096


@pytest.fixture(params=["file", "direct", "object"])
def opened(request, tmp_path):
    """Give a shard that is open, and its bytes."""
    path = remote_stores.make(tmp_path / "acts")
    file = shards(path / "b")[0]
    if request.param == "object":
        url = remote_stores.upload(request.getfixturevalue("s3_server"), path)
        shard = ObjectBytes(Mirror(url), "b", file.name)
    else:
        direct = request.param == "direct"
        try:
            fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        except OSError as error:
            pytest.skip(f"this file system has no direct reads: {error}")
        shard = FileBytes(fd, file.stat().st_size, direct=direct)
    yield shard, file.read_bytes(), PAGE if request.param == "direct" else 1
    shard.close()


def room(size):
    """Give memory that direct reads may go to."""
    return anonymous(size).data if size else memoryview(bytearray())


def test_what_is_read_is_what_is_there(opened):
    shard, data, step = opened
    shard.scattered()
    assert (shard.size, shard.head()) == (len(data), data[:PAGE])
    dice = random.Random(0)  # noqa: S311
    for _ in range(20):
        start = dice.randrange(0, len(data), step)
        stop = dice.randrange(start, len(data) + 1, step)
        into = room(stop - start)
        assert shard.read(into, start)
        assert bytes(into) == data[start:stop]


def test_where_it_ends_before_it_says_so_and_gives_what_there_is(opened):
    shard, data, step = opened
    # Whole pages, which direct reads need, and the end in the middle of what is asked for.
    start = len(data) - 2 * PAGE
    into = room(3 * PAGE)
    assert not shard.read(into, start)
    assert bytes(into[: 2 * PAGE]) == data[start:]
    assert not shard.read(room(PAGE), len(data) + PAGE)
    if step == 1:
        assert not shard.read(room(2), len(data) - 1)


def test_an_object_is_one_request_a_piece_and_its_header_none(s3_proxy, s3_server, tmp_path):
    path = remote_stores.make(tmp_path / "acts")
    mirror = Mirror(remote_stores.upload(s3_server, path))
    s3_proxy.reset()
    shard = ObjectBytes(mirror, "b", "c.0.0.0")
    assert shard.head() == (path / "b" / "c.0.0.0").read_bytes()[:PAGE]
    assert s3_proxy.n_requests() == 1
    assert shard.read(room(10_000), 5000)
    assert s3_proxy.n_requests() == 2
    # The network counts what it sent only after we have it.
    remote_stores.wait_for(lambda: s3_proxy.bytes_sent() == PAGE + 10_000)
    with pytest.raises(IncompleteError, match=r"acts/b/c\.0\.9\.0"):
        ObjectBytes(mirror, "b", "c.0.9.0")
    # Shorter than it was when it was opened.
    remote_stores.replace(s3_server, "acts/b/c.0.0.0", b"short")
    with pytest.raises(CorruptError, match=r"acts/b/c\.0\.0\.0 has 5 bytes"):
        shard.read(room(10_000), 5000)
