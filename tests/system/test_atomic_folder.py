"""A folder appears whole or not at all, and what dead makers left is removed."""

import errno
import os

import numpy as np
import pytest

from mmcache.errors import DiskFullError, StoreExistsError, WriteError
from mmcache.system.atomic_folder import AtomicFolder
from stores_and_processes import Recorder, tree


def write(box, name, data):
    with box.draft(name, len(data)) as draft:
        draft.write(np.frombuffer(data, np.uint8), 0)


def test_it_appears_under_its_name_when_published_and_is_durable_before(tmp_path, monkeypatch):
    seen = Recorder(monkeypatch, tmp_path)
    with AtomicFolder(tmp_path / "new" / "out") as box:
        (box.path / "inner").mkdir()
        write(box, "inner/a", b"abc")
        write(box, "b", b"")
        assert not (tmp_path / "new" / "out").exists()
        folders = [box.path.stat().st_ino, (box.path / "inner").stat().st_ino]
        box.publish()
    assert tree(tmp_path) == {
        "new": None,
        "new/out": None,
        "new/out/inner": None,
        "new/out/inner/a": b"abc",
        "new/out/b": b"",
    }
    assert (box.files, box.written_bytes, box.linked_bytes) == (2, 3, 0)
    named = next(place for place, (kind, _, name) in enumerate(seen.events) if kind == "rename" and name == "new/out")
    for folder in folders:
        assert ("sync", folder, None) in seen.events[:named]
    assert ("sync", (tmp_path / "new").stat().st_ino, None) in seen.events[named:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_is_gone_when_anything_fails(tmp_path, error):
    def fail():
        with AtomicFolder(tmp_path / "out") as box:
            write(box, "a", b"abc")
            raise error

    with pytest.raises(error):
        fail()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("what", ["file", "folder", "link to nothing"])
def test_a_path_that_is_taken_is_refused(tmp_path, what):
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link to nothing": lambda: out.symlink_to("nowhere")}[what]()
    with pytest.raises(StoreExistsError, match="something there already"):
        AtomicFolder(out).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_path_that_is_taken_meanwhile_is_refused(tmp_path):
    def publish():
        with AtomicFolder(tmp_path / "out") as box:
            write(box, "a", b"abc")
            (tmp_path / "out").mkdir()
            box.publish()

    with pytest.raises(StoreExistsError):
        publish()
    assert tree(tmp_path) == {"out": None}


def test_the_next_one_removes_what_the_dead_left_and_nothing_else(tmp_path):
    dead = tmp_path / ".out.0123456789abcdef.tmp"
    (dead / "inner").mkdir(parents=True)
    (dead / "inner" / "a").write_bytes(b"abc")
    (tmp_path / ".outer.0123456789abcdef.tmp").mkdir()
    with AtomicFolder(tmp_path / "out") as live:
        assert not dead.exists()
        with AtomicFolder(tmp_path / "out") as second:
            assert live.path.exists()
            second.publish()
        write(live, "a", b"abc")
        with pytest.raises(StoreExistsError):
            live.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outer.0123456789abcdef.tmp", "out"]


def test_links_and_copies(tmp_path, monkeypatch):
    source = tmp_path / "source"
    data = np.random.default_rng(0).bytes((1 << 20) + 3)
    source.write_bytes(data)
    with AtomicFolder(tmp_path / "out") as box:
        assert box.link(source, "a")
        assert box.link(source, "b")
        assert (box.files, box.linked_bytes) == (2, 2 * len(data))
        box.unlink("b")
        monkeypatch.setattr(os, "link", failing(errno.EXDEV))
        assert not box.link(source, "b")
        monkeypatch.setattr("mmcache.system.atomic_folder._PIECE_BYTES", 1 << 16)
        with source.open("rb") as file:
            box.copy(file.fileno(), len(data), "b")
        assert (box.files, box.linked_bytes, box.written_bytes) == (2, len(data), len(data))
        box.publish()
    assert (tmp_path / "out" / "a").samefile(source)
    assert (tmp_path / "out" / "b").read_bytes() == data
    assert not (tmp_path / "out" / "b").samefile(source)


def failing(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_refusals_of_the_system_are_told(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    with AtomicFolder(tmp_path / "out") as box:
        monkeypatch.setattr(os, "link", failing(errno.EIO))
        with pytest.raises(WriteError, match="linking"):
            box.link(source, "a")
        with source.open("rb") as file, pytest.raises(WriteError, match="ends before its size"):
            box.copy(file.fileno(), 4, "a")
        monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        with pytest.raises(DiskFullError, match="10 bytes needed"):
            write(box, "a", b"0123456789")
        assert tree(box.path) == {}
