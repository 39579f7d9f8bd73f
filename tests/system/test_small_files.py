"""Small files that are put in place together."""

import errno
import os
from pathlib import Path

import pytest

from mmcache.errors import WriteError
from mmcache.system.atomic import AtomicFile, publish_all
from stores_and_processes import tree


@pytest.fixture
def synced(monkeypatch):
    """What was synced, in order."""
    found, real = [], os.fsync

    def fsync(fd):
        found.append(Path(f"/proc/self/fd/{fd}").readlink())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_files_are_put_in_place_and_each_folder_is_made_durable_once(tmp_path, synced):
    (tmp_path / "there").mkdir()
    contents = {"there/a": b"1", "there/b": b"", "new/deep/c": b"x" * 5000}
    publish_all(tmp_path, contents)
    assert tree(tmp_path) == {
        "there": None, "there/a": b"1", "there/b": b"", "new": None, "new/deep": None, "new/deep/c": b"x" * 5000,
    }  # fmt: skip
    files, folders = synced[:3], synced[3:]
    assert [file.parent for file in files] == [(tmp_path / file).parent for file in contents]
    assert sorted(folders) == sorted([tmp_path, tmp_path / "new", tmp_path / "new" / "deep", tmp_path / "there"])


def test_what_is_there_is_replaced_and_nothing_is_nothing(tmp_path, synced):
    publish_all(tmp_path, {})
    assert synced == []
    publish_all(tmp_path, {"a": b"old"})
    publish_all(tmp_path, {"a": b"new"})
    assert tree(tmp_path) == {"a": b"new"}


def test_a_failure_leaves_no_draft_and_what_came_before(tmp_path, monkeypatch):
    publish, done = AtomicFile.publish, []

    def failing(draft, size, **options):
        done.append(draft)
        if len(done) == 2:
            raise WriteError(errno.EIO, "it failed", str(draft.path))
        publish(draft, size, **options)

    monkeypatch.setattr(AtomicFile, "publish", failing)
    with pytest.raises(WriteError, match="it failed"):
        publish_all(tmp_path, dict.fromkeys("abc", b"1"))
    assert tree(tmp_path) == {"a": b"1"}
