"""Writers that are killed, disks that are full, limits that are met, and readers beside a writer: for real."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import mmcache
from damaged_stores import extracted
from small_models import assert_same_store
from stores_and_processes import FORKS, exit_code, forked, start_fork, widened

WIDTH, LAYERS = 16, 2
# In the suite, and with --slow.
KILLS, SECONDS, FULL = (15, 500), (3, 60), (3, 20)


def rows_at(start, stop):
    """Say what a store holds at some positions: a function of the position, the layer and the dimension alone."""
    position = torch.arange(start, stop, dtype=torch.float32)[None, :, None]
    layer = torch.arange(LAYERS, dtype=torch.float32)[:, None, None]
    return position * 64 + layer * 32 + torch.arange(WIDTH, dtype=torch.float32)


def write(path, stop_at=1 << 60, tell=lambda _: None):
    """Append sequences of some length, and commit each third; tell how many tokens are durable."""
    options = {"sites": {"a": WIDTH}, "n_layers": LAYERS, "dtype": torch.float32, "shard_tokens": 256}
    writer = mmcache.append(path) if (path / "zarr.json").exists() else mmcache.create(path, **options)
    with writer:
        while writer.n_tokens < stop_at:
            start, length = writer.n_tokens, 1 + writer.n_tokens * 7 % 190
            writer.append(torch.arange(start, start + length), {"a": rows_at(start, start + length)})
            if writer.n_sequences % 3 == 0:
                writer.commit()
                tell(writer.n_tokens)


def check(path, at_least=0):
    """Compare all that a store holds; give how many tokens that is."""
    with mmcache.open(path) as store:
        assert store.n_tokens >= at_least
        assert store.tokens.tolist() == list(range(store.n_tokens))
        found = store["a"].gather(range(store.n_tokens))
        assert torch.equal(found.transpose(0, 1), rows_at(0, store.n_tokens))
        return store.n_tokens


@contextlib.contextmanager
def child(work):
    """Run `work()` in a fork, which is killed at the end of the block."""
    pid = start_fork(work)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@FORKS
def test_a_writer_that_is_killed_at_any_moment_loses_nothing_that_it_committed(tmp_path, request):
    path, told, dice = tmp_path / "acts", tmp_path / "told", random.Random(3)  # noqa: S311
    told.write_text("0")
    other = tmp_path / "told.new"

    def tell(count):
        other.write_text(str(count))
        other.rename(told)

    there = 0
    for _ in range(widened(request, KILLS)):
        with child(lambda: write(path, tell=tell)):
            time.sleep(dice.uniform(0.01, 0.25))
        if (path / "zarr.json").exists():
            there = check(path, max(there, int(told.read_text())))
            if there > 20_000:
                # Small again, so that looking at all of it does not take ever longer.
                assert mmcache.verify(path).ok
                os.rename(path, tmp_path / f"done-{there}-{dice.random()}")  # noqa: PTH104
                told.write_text("0")
                there = 0
    if (path / "zarr.json").exists():
        assert mmcache.verify(path).ok


@FORKS
def test_readers_beside_a_writer_see_what_is_committed_and_nothing_else(tmp_path, request):
    path, until = tmp_path / "acts", time.monotonic() + widened(request, SECONDS)
    write(path, 500)

    def read(seed):
        dice, seen = random.Random(seed), 0  # noqa: S311
        while time.monotonic() < until:
            with mmcache.open(path, check=seed == 0) as store:
                assert store.n_tokens >= seen
                seen = store.n_tokens
                some = [dice.randrange(seen) for _ in range(200)] + [seen - 1]
                right = torch.stack([rows_at(position, position + 1)[:, 0] for position in some])
                assert torch.equal(store["a"].gather(some), right)
                assert torch.equal(store["a"].get_layer(1), rows_at(0, seen)[1])
                assert len(store.tokens) == seen
                assert store.sequences[-1].stop == seen

    readers = [start_fork(partial(read, seed)) for seed in range(4)]
    with child(lambda: write(path)):
        codes = [exit_code(reader) for reader in readers]
    assert codes == [0] * 4
    assert check(path) > 500


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", "size=6m", "none")
    try:
        yield place, lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def fill(place, leave):
    """Fill a disk but for some bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with (place / "ballast").open("ab") as file:
        file.write(bytes(max(0, free - leave)))


def told_all(error, place):
    """The error says where, how much was needed, and how much there was."""
    message = str(error)
    return str(place) in message and "bytes needed" in message and "free" in message and error.errno == errno.ENOSPC


def test_a_disk_that_fills_at_any_moment_of_appending(small_disk, request):
    place, resize = small_disk
    dice = random.Random(4)  # noqa: S311
    for turn in range(widened(request, FULL)):
        path, left = place / f"acts-{turn}", dice.randrange(50_000, 1_500_000)
        fill(place, left)
        with pytest.raises(mmcache.DiskFullError) as raised:
            write(path, 20_000)
        assert told_all(raised.value, path), raised.value
        before = check(path) if (path / "zarr.json").exists() else 0
        # Room is made, and the same program goes on.
        resize(f"{64 + 8 * turn}m")
        write(path, before + 3000)
        assert check(path, before) >= before + 3000
        assert mmcache.verify(path).ok
        (place / "ballast").unlink(missing_ok=True)
        resize(f"{8 + 8 * turn}m")


def test_a_disk_that_fills_at_any_moment_of_an_extraction(small_disk, tmp_path, request):
    place, resize = small_disk
    extracted(tmp_path / "right")
    dice = random.Random(5)  # noqa: S311
    for turn in range(widened(request, FULL)):
        path, moment = place / "acts", dice.randrange(0, 5)
        calls = 0

        def progress(_done, moment=moment):
            nonlocal calls
            calls += 1
            if calls > moment:
                fill(place, 4096 * dice.randrange(3))

        with pytest.raises(mmcache.DiskFullError) as raised:
            extracted(path, progress=progress)
        assert str(place) in str(raised.value)
        assert "free" in str(raised.value)
        (place / "ballast").unlink(missing_ok=True)
        extracted(path)
        assert_same_store(path, tmp_path / "right")
        resize(f"{7 + turn}m")
        subprocess.run(["rm", "-rf", str(path)], check=True)


@contextlib.contextmanager
def limit(what, value):
    """Lower a limit of this process."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def open_files():
    """Count the descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@FORKS
def test_few_open_files_are_enough_to_read_and_an_error_where_they_are_not_to_write(tmp_path):
    path = tmp_path / "acts"
    write(path, 12_000)

    def work():
        with limit(resource.RLIMIT_NOFILE, open_files() + 12):
            assert check(path) >= 12_000
        many = tmp_path / "many"
        writer = mmcache.create(many, sites={"a": 4}, n_layers=64, layout="layer", shard_tokens=4096)
        writer.append(torch.arange(10), {"a": torch.ones(64, 10, 4)})
        writer.commit()
        with limit(resource.RLIMIT_NOFILE, open_files() + 20), pytest.raises(mmcache.WriteError) as raised:
            writer.append(torch.arange(10), {"a": torch.ones(64, 10, 4)})
        assert raised.value.errno == errno.EMFILE
        with contextlib.suppress(mmcache.WriteError):
            writer.close()
        with mmcache.append(many) as again:
            assert again.n_tokens == 10
            again.append(torch.arange(10), {"a": torch.ones(64, 10, 4)})
        with mmcache.open(many) as store:
            assert store["a"].gather(range(20)).eq(1).all()

    assert forked(work) == 0


@FORKS
def test_little_address_space_is_enough_to_read(tmp_path):
    path = tmp_path / "acts"
    write(path, 12_000)

    def work():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        with limit(resource.RLIMIT_AS, used + (256 << 20)):
            assert check(path) >= 12_000

    assert forked(work) == 0


@FORKS
def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    path = tmp_path / "acts"
    write(path, 1000)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with limit(resource.RLIMIT_FSIZE, 20_000), pytest.raises(mmcache.DiskFullError) as raised:
            write(path, 5000)
        assert raised.value.errno == errno.EFBIG
        check(path, 1000)
        write(path, 5000)
        check(path, 5000)

    assert forked(work) == 0
