import errno
import fcntl
import functools
import os
import resource
import stat

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.errors import (
    CorruptError,
    DiskFullError,
    IncompleteError,
    StoreNotFoundError,
    WriteError,
)
from mmcache.system import files
from mmcache.system.atomic import AtomicFile, publish, remove_drafts
from mmcache.system.files import map_file, read_file
from mmcache.system.memory import anonymous

pytestmark = pytest.mark.portable

PAGE = 4096
NUMBERS = r"no room while .*: [0-9]+ bytes needed, [0-9]+ free there"
RESERVES = pytest.mark.skipif(
    files.PORTABLE or not hasattr(os, "posix_fallocate"), reason="nothing is reserved on the portable path"
)


def some_bytes(size, seed=0, shift=0):
    """Random bytes in memory that begins on a page (or `shift` bytes behind one)."""
    memory = anonymous(size + shift + PAGE)[shift : shift + size]
    memory[:] = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return memory


def refuse(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_draft_is_seen_under_its_own_name_only_when_it_is_published(tmp_path):
    path, data = tmp_path / "c.0.0.0", some_bytes(10_000)
    draft = AtomicFile(tmp_path, path.name, reserve=1 << 20)
    (temporary,) = names(tmp_path)
    assert temporary.startswith(".c.0.0.0.")
    assert temporary.endswith(".tmp")
    draft.write(data, 0)
    assert names(tmp_path) == [temporary]
    draft.publish(len(data))
    assert names(tmp_path) == ["c.0.0.0"]
    assert path.read_bytes() == data.tobytes()  # the reserve behind it is given back
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    draft.discard()
    assert path.exists()


@pytest.mark.parametrize("umask", [0, 0o022, 0o027, 0o077, 0o377])
def test_a_sealed_file_keeps_to_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        publish(tmp_path, "zarr.json", b"{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "zarr.json").stat().st_mode) == 0o444 & ~umask


def test_what_was_reserved_and_not_written_is_zeros(tmp_path):
    draft = AtomicFile(tmp_path, "file", reserve=3 * PAGE)
    draft.write(some_bytes(PAGE), PAGE)
    draft.publish(3 * PAGE)
    data = (tmp_path / "file").read_bytes()
    assert (len(data), any(data[:PAGE]), any(data[2 * PAGE :])) == (3 * PAGE, False, False)


def test_a_discarded_draft_leaves_nothing_and_touches_nothing(tmp_path):
    path = tmp_path / "c.0"
    publish(tmp_path, path.name, b"before")
    draft = AtomicFile(tmp_path, path.name, reserve=1 << 20)
    draft.write(some_bytes(2 * PAGE), 0, direct=True)
    draft.discard()
    draft.discard()
    assert names(tmp_path) == ["c.0"]
    assert path.read_bytes() == b"before"


def test_a_file_is_replaced_whole_and_who_reads_the_old_one_keeps_it(tmp_path):
    path = tmp_path / "zarr.json"
    publish(tmp_path, path.name, b"old")
    before = map_file(path, what="the file")
    publish(tmp_path, path.name, b"newer")
    assert path.read_bytes() == b"newer"
    assert before.tobytes() == b"old"


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_are_durable_before_the_name_and_the_name_before_publish_returns(durable, tmp_path, monkeypatch):
    said = []

    def spy(name, real, *args, **options):
        is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
        said.append("fsync folder" if is_folder else name)
        return real(*args, **options)

    for name in ("pwrite", "ftruncate", "fchmod", "fsync", "rename"):
        monkeypatch.setattr(os, name, functools.partial(spy, name, getattr(os, name)))
    publish(tmp_path, "file", b"data", durable=durable)
    whole = ["pwrite", "ftruncate", "fchmod", "fsync", "rename", "fsync folder"]
    assert said == (whole if durable else [call for call in whole if not call.startswith("fsync")])


PIECES = st.lists(
    st.sampled_from([1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE + 77]) | st.integers(1, 6 * PAGE),
    min_size=1,
    max_size=8,
)


@given(PIECES, st.integers(0, 3), st.sampled_from([0, 1, 512]))
@example([PAGE, PAGE], 0, 0)
@example([PAGE + 1, PAGE - 1, 2 * PAGE], 0, 0)
def test_direct_writes_leave_the_same_bytes_as_buffered_ones(tmp_path_factory, pieces, start, shift):
    folder = tmp_path_factory.mktemp("direct")
    for direct in (True, False):
        draft = AtomicFile(folder, f"direct={direct}", reserve=PAGE)
        at = start * 512
        for number, size in enumerate(pieces):
            draft.write(some_bytes(size, number, shift), at, direct=direct and number != 1)
            at += size
        draft.publish(at)
    assert (folder / "direct=True").read_bytes() == (folder / "direct=False").read_bytes()


class Writes:
    """Every `os.pwrite` and `os.pwritev`, as (descriptor, bytes, offset); at most `most` bytes of each are taken."""

    def __init__(self, monkeypatch, most=1 << 30, direct=None):
        self.calls, self.most, self.real = [], most, os.pwrite
        self.refuse_direct, self.refused = direct, 0
        self.draft = None
        monkeypatch.setattr(os, "pwrite", self)
        if hasattr(os, "pwritev"):
            # With flags, for writes that do not stay in the page cache.
            monkeypatch.setattr(os, "pwritev", lambda fd, views, offset, _flags=0: self(fd, views[0], offset))

    def __call__(self, fd, view, offset):
        if self.refuse_direct and self.draft is not None and fd == self.draft._direct_fd:
            self.refused += 1
            raise OSError(self.refuse_direct, os.strerror(self.refuse_direct))
        self.calls.append((fd, len(view), offset))
        return self.real(fd, view[: self.most], offset)


def direct_draft(path):
    draft = AtomicFile(path.parent, path.name, reserve=16 * PAGE)
    draft.write(some_bytes(PAGE), 15 * PAGE, direct=True)
    if draft._direct_fd < 0:
        draft.discard()
        pytest.skip("direct writes are off, or refused by this file system")
    return draft


def test_whole_pages_go_past_the_page_cache_and_the_rest_through_it(tmp_path, monkeypatch):
    draft = direct_draft(tmp_path / "file")
    fds = {draft._direct_fd: "direct", draft._fd: "buffered"}
    writes = Writes(monkeypatch)
    draft.write(some_bytes(3 * PAGE + 5), PAGE, direct=True)
    draft.write(some_bytes(PAGE, shift=1), 5 * PAGE, direct=True)
    draft.write(some_bytes(PAGE), 6 * PAGE + 512, direct=True)
    found = [(fds[fd], size, offset) for fd, size, offset in writes.calls]
    assert found == [
        ("direct", 3 * PAGE, PAGE),
        ("buffered", 5, 4 * PAGE),
        ("buffered", PAGE, 5 * PAGE),
        ("buffered", PAGE, 6 * PAGE + 512),
    ]
    draft.discard()


@pytest.mark.parametrize("most", [1, 1000, PAGE, 2 * PAGE])
@pytest.mark.parametrize("direct", [False, True])
def test_short_writes_are_gone_on_with(most, direct, tmp_path, monkeypatch):
    data = some_bytes(3 * PAGE + 17 if most > 1 else 99)
    draft = AtomicFile(tmp_path, "file")
    writes = Writes(monkeypatch, most)
    draft.write(data, 0, direct=direct)
    draft.publish(len(data))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert len(writes.calls) > 1


def test_a_system_that_takes_no_bytes_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    draft = AtomicFile(tmp_path, "file")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(WriteError, match="took no bytes") as raised:
        draft.write(some_bytes(10), 0)
    assert raised.value.errno == errno.EIO
    draft.discard()


def test_a_file_system_that_refuses_a_direct_write_is_written_through_the_page_cache(tmp_path, monkeypatch):
    data = some_bytes(4 * PAGE)
    draft = direct_draft(tmp_path / "file")
    direct = draft._direct_fd
    writes = Writes(monkeypatch, direct=errno.EINVAL)
    writes.draft = draft
    draft.write(data[: 2 * PAGE], 0, direct=True)
    refused = writes.refused
    draft.write(data[2 * PAGE :], 2 * PAGE, direct=True)
    assert writes.refused == refused == 1
    draft.publish(len(data))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(direct)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_a_failed_direct_write_is_not_tried_in_another_way(tmp_path, monkeypatch):
    draft = direct_draft(tmp_path / "file")
    writes = Writes(monkeypatch, direct=errno.EIO)
    writes.draft = draft
    with pytest.raises(WriteError, match="failed while writing at offset 0"):
        draft.write(some_bytes(PAGE), 0, direct=True)
    assert writes.calls == []
    draft.discard()


def test_a_file_system_without_direct_writes_or_preallocation_is_done_without(tmp_path, monkeypatch):
    real = os.open

    def without_direct(path, flags, *mode, **options):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", without_direct)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP), raising=False)
    data = some_bytes(2 * PAGE)
    draft = AtomicFile(tmp_path, "file", reserve=2 * PAGE)
    draft.write(data, 0, direct=True)
    draft.publish(len(data))
    assert (tmp_path / "file").read_bytes() == data.tobytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    "call", [pytest.param("posix_fallocate", marks=RESERVES), "pwrite", "ftruncate", "fsync", "open"]
)
def test_a_full_disk_is_told_with_numbers_and_leaves_nothing(call, code, tmp_path, monkeypatch):
    def write():
        draft = AtomicFile(tmp_path, "c.0", reserve=1 << 20)
        try:
            draft.write(some_bytes(10), 0)
            draft.publish(1 << 20)
        except BaseException:
            draft.discard()
            raise

    publish(tmp_path, "before", b"x")
    monkeypatch.setattr(os, call, refuse(code))
    with pytest.raises(DiskFullError, match=NUMBERS) as raised:
        write()
    assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / "c.0"))
    assert f" {10 if call == 'pwrite' else 1 << 20} bytes needed" in str(raised.value)
    assert names(tmp_path) == ["before"]
    monkeypatch.undo()
    write()


@RESERVES
def test_a_real_limit_of_the_system_is_met_before_anything_is_computed(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFullError, match=f"starting the file: {2 << 20} bytes needed"):
            AtomicFile(tmp_path, "c.0", reserve=2 << 20)
        draft = AtomicFile(tmp_path, "c.0")
        with pytest.raises(DiskFullError, match="writing at offset"):
            draft.write(some_bytes(PAGE), 1 << 20)
        draft.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fchmod", "fsync", "rename"])
def test_after_any_failure_the_old_file_is_there_and_the_new_one_is_not(call, tmp_path, monkeypatch):
    publish(tmp_path, "zarr.json", b"old")
    asked = []

    def fail(*_args, **_options):
        asked.append(call)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError, match="failed while") as raised:
        publish(tmp_path, "zarr.json", b"new")
    assert not isinstance(raised.value, DiskFullError)
    assert raised.value.errno == errno.EIO
    assert asked == [call]  # above all no second fsync: the system may have dropped the bytes, and says so once
    assert names(tmp_path) == ["zarr.json"]
    assert (tmp_path / "zarr.json").read_bytes() == b"old"


def test_folders_are_made_and_told_where(tmp_path):
    (tmp_path / "there").mkdir()
    made = ["there", "a/b", "a/c", "there/d"]
    assert files.make_folders(tmp_path, made) == [tmp_path, tmp_path / "a", tmp_path / "there"]
    assert all((tmp_path / folder).is_dir() for folder in made)
    assert files.make_folders(tmp_path, made) == []
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="making the folder"):
        files.make_folders(tmp_path, ["file/under"])


def test_a_folder_that_cannot_be_made_durable_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(WriteError, match="making the folder durable"):
        files.sync_folder(tmp_path)
    with pytest.raises(WriteError, match="making the folder durable"):
        files.make_folder(tmp_path / "new")


@pytest.mark.parametrize("call", ["flock", "pwrite", "fsync"])
def test_an_interruption_leaves_no_draft(call, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl if call == "flock" else os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, "file", b"x")
    assert names(tmp_path) == []


def test_a_draft_in_no_folder_is_an_error(tmp_path):
    with pytest.raises(WriteError, match="starting the file"):
        AtomicFile(tmp_path, "nowhere/file")


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_left_alone(tmp_path):
    live = AtomicFile(tmp_path, "c.0.0.0")
    (live_name,) = names(tmp_path)
    (tmp_path / ".c.0.1.0.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".c.0.2.0.0123abcd.tmp").write_bytes(b"whole, sealed, and not renamed")
    (tmp_path / ".c.0.2.0.0123abcd.tmp").chmod(0o444)
    others = [".hidden", "c.0.1.0", "notes.tmp", "zarr.json"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".folder.tmp").mkdir()
    remove_drafts(tmp_path)
    remove_drafts(tmp_path / "nowhere")
    assert names(tmp_path) == sorted([live_name, ".folder.tmp", *others])
    live.publish(0)
    assert names(tmp_path) == sorted([".folder.tmp", "c.0.0.0", *others])


def test_a_pipe_among_the_drafts_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / ".c.0.tmp")
    remove_drafts(tmp_path)
    assert names(tmp_path) == []


def test_drafts_are_removed_where_an_exclusive_lock_wants_a_writable_file(tmp_path, monkeypatch):
    # As NFS does, where flock is made of fcntl's locks.
    real = fcntl.flock

    def flock(fd, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    live = AtomicFile(tmp_path, "c.1")
    (tmp_path / ".c.0.0123abcd.tmp").write_bytes(b"half")
    remove_drafts(tmp_path)
    live.publish(0)
    assert names(tmp_path) == ["c.1"]


@pytest.mark.parametrize("held", [False, True])
def test_a_draft_survives_another_worker_that_starts_while_it_is_made(held, tmp_path, monkeypatch):
    # Between making the file and locking it, a draft looks like a dead writer's.
    real, seen = fcntl.flock, []

    def flock(fd, operation):
        if not seen and operation & fcntl.LOCK_EX:
            seen.append(fd)
            if held:  # the other worker has the lock, and has not removed the file yet
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            remove_drafts(tmp_path)
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    publish(tmp_path, "c.0.0.0", b"data")
    assert names(tmp_path) == ["c.0.0.0"]
    assert (tmp_path / "c.0.0.0").read_bytes() == b"data"


def test_files_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(CorruptError, match="is larger than the 4 bytes"):
        read_file(path, 4)


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(StoreNotFoundError, match="no such file") as raised:
        read_file(tmp_path / "none", 10)
    assert raised.value.filename == str(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(StoreNotFoundError, match="is no folder"):
        read_file(tmp_path / "file" / "none", 10)
    with pytest.raises(CorruptError, match="is a folder"):
        read_file(tmp_path, 10)
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "pipe", 10) == b""  # above all it does not wait for a writer
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(CorruptError):
        read_file(tmp_path / "pipe", 10)
    os.close(writer)


def test_a_file_is_mapped_whole_from_its_first_byte(tmp_path):
    data = some_bytes(2 * PAGE + 3)
    publish(tmp_path, "file", data.tobytes())
    mapped = map_file(tmp_path / "file", what="shard")
    assert mapped.ctypes.data % PAGE == 0
    part = mapped[PAGE:]
    del mapped
    (tmp_path / "file").unlink()
    assert part.tobytes() == data[PAGE:].tobytes()


def test_what_cannot_be_mapped_is_refused(tmp_path):
    with pytest.raises(IncompleteError, match="shard 3 is not there"):
        map_file(tmp_path / "none", what="shard 3")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "empty", tmp_path / "pipe", tmp_path):
        with pytest.raises(CorruptError, match="empty, or no plain file"):
            map_file(path, what="shard")


def test_free_bytes_are_those_of_the_file_system_a_folder_will_be_on(tmp_path):
    assert files.free_bytes(tmp_path / "not" / "there") == pytest.approx(files.free_bytes(tmp_path), rel=0.5)


def test_folders_are_made_with_all_above_them_and_made_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="making the folder"):
        files.make_folder(tmp_path / "file")


@pytest.mark.parametrize("at_a_time", [1, 3, 5, 7])
def test_names_come_some_at_a_time_and_each_once(tmp_path, monkeypatch, at_a_time):
    monkeypatch.setattr(files, "_NAMES", at_a_time)
    for name in "abcde":
        (tmp_path / name).touch()
    batches = list(files.name_batches(tmp_path))
    assert sorted(name for batch in batches for name in batch) == [*"abcde"]
    assert [len(batch) for batch in batches[:-1]] == [at_a_time] * (len(batches) - 1)
    assert files.count_names(tmp_path) == 5
    assert list(files.name_batches(tmp_path / "none")) == list(files.name_batches(tmp_path / "a")) == []


def test_names_and_trees(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / ".lock").touch()
    assert sorted(files.list_names(tmp_path / "a")) == [".lock", "b"]
    assert files.list_names(tmp_path / "none") == []
    files.remove_file(tmp_path, "a/.lock")
    files.remove_file(tmp_path, "a/.lock")
    with pytest.raises(WriteError, match="removing the file"):
        files.remove_file(tmp_path, "a/b")
    files.remove_tree(tmp_path / "a")
    files.remove_tree(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.skipif(not files._NO_WAIT, reason="the system does not say what is in memory")
def test_what_is_in_memory_is_not_read_through_again(tmp_path, monkeypatch):
    piece = files._PIECE
    path, read, real = tmp_path / "file", [], os.preadv
    path.write_bytes(some_bytes(2 * piece + 10_000).tobytes())

    def record(fd, into, offset, flags=0):
        done = real(fd, into, offset, flags)
        if not flags:
            read.append((offset, done))
        return done

    with path.open("rb") as file:
        fd = file.fileno()
        os.fdatasync(fd)
        files.read_through(fd, 0, 2 * piece + 10_000)
        try:
            real(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system does not say what is in memory")
        monkeypatch.setattr(os, "preadv", record)
        files.read_through(fd, 5000, 2 * piece + 10_000)
        assert read == []
        # The second piece goes: it comes again, and nothing of the others.
        os.posix_fadvise(fd, piece, piece, os.POSIX_FADV_DONTNEED)
        with pytest.raises(BlockingIOError):
            real(fd, [bytearray(1)], piece + 5 * PAGE, os.RWF_NOWAIT)
        files.read_through(fd, 0, 2 * piece + 10_000)
        assert read == [(piece, piece)]
        # Where the system does not say, all is read; behind the end of the file, nothing.
        monkeypatch.setattr(files, "_NO_WAIT", 0)
        read.clear()
        files.read_through(fd, 0, 3 * piece)
        assert read == [(0, piece), (piece, piece), (2 * piece, 10_000), (2 * piece + 10_000, 0)]
