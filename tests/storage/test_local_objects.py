"""What is pushed to `file://` is durable when it has its name, and nothing is written through a link."""

import os
import stat
from pathlib import Path

import pytest

import mmcache
import remote_stores
from damaged_stores import cache
from mmcache.errors import ArgumentError, CorruptError
from mmcache.storage import object_store
from mmcache.storage.object_store import ObjectStore
from stores_and_processes import tree


class Syncs:
    """Notes what is made durable, in order, and which objects there were then."""

    def __init__(self, monkeypatch, root):
        self.root, self.seen, real = root, [], os.fsync

        def fsync(fd):
            there = Path(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115 -- a descriptor
            self.seen.append((there.relative_to(root.parent).as_posix(), self.objects()))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    def objects(self):
        found = {Path(folder, file) for folder, _, files in os.walk(self.root) for file in files}
        return {path.relative_to(self.root).as_posix() for path in found if path.parent.name != ".uploads"}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "bucket"


@pytest.mark.parametrize("size", [10, 12 << 20], ids=["small", "large"])
@pytest.mark.parametrize("replace", [False, True])
def test_bytes_are_durable_before_their_name_and_the_name_at_once_behind_it(root, tmp_path, monkeypatch, size, replace):
    where, data = ObjectStore(f"file://{root}"), os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    syncs = Syncs(monkeypatch, root)
    assert where.upload("a/b/key", tmp_path / "file", replace=replace)
    names = [name for name, _ in syncs.seen]
    # The folders, each by the one that it is in.
    assert names[:-2] == [".", "bucket", "bucket", "bucket/a"]
    assert names[-2].startswith("bucket/.uploads/")
    assert names[-1] == "bucket/a/b"
    assert [there for _, there in syncs.seen[-2:]] == [set(), {"a/b/key"}]
    assert (root / "a/b/key").read_bytes() == data
    del syncs.seen[:]
    assert where.upload("a/b/key", tmp_path / "file", replace=True)
    assert not where.upload("a/b/key", tmp_path / "file")
    assert tree(root) == {".uploads": None, "a": None, "a/b": None, "a/b/key": data}
    # The one that was refused was durable, too; nothing but its name is what it lacks.
    assert [name.rpartition("/")[0] for name, _ in syncs.seen] == ["bucket/.uploads", "bucket/a", "bucket/.uploads"]


def test_a_push_makes_all_of_it_durable_and_the_root_last(root, tmp_path, monkeypatch):
    right = remote_stores.make(tmp_path / "acts", tokens=300)
    syncs = Syncs(monkeypatch, root)
    mmcache.push(right, f"file://{root}")
    objects = syncs.objects()
    assert objects == {key for key, data in tree(right).items() if data is not None}
    synced = [name for name, _ in syncs.seen]
    assert sum(name.startswith("bucket/.uploads/") for name in synced) == len(objects)
    for key in objects:
        # The folder of each, once the object was in it.
        assert any(name == f"bucket/{key}".rpartition("/")[0] and key in there for name, there in syncs.seen), key
    assert ("bucket", objects) in syncs.seen
    assert all("zarr.json" not in there for name, there in syncs.seen if name.startswith("bucket/.uploads/"))
    monkeypatch.undo()
    with mmcache.open(f"file://{root}", cache_dir=tmp_path / "cache") as found:
        assert found.n_tokens == 300


def test_a_disk_that_fails_is_told_at_once_and_nothing_has_its_name(root, monkeypatch):
    where = ObjectStore(f"file://{root}")
    where.put("before", b"before")

    def fsync(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(mmcache.WriteError, match=r"making the object durable.*Input/output"):
        where.put("key", b"data")
    monkeypatch.undo()
    assert tree(root) == {".uploads": None, "before": b"before"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_objects_keep_to_the_umask(root, umask):
    before = os.umask(umask)
    try:
        ObjectStore(f"file://{root}").put("a/key", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "a" / "key").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("linked", ["sub", ".uploads", "sub/deep"])
def test_nothing_is_written_or_removed_through_a_link(root, tmp_path, linked):
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    for name in ("key", "deep/key"):
        (mine / name).write_bytes(b"mine")
    before = {name: (mine / name).stat().st_ctime_ns for name in ("", "key", "deep", "deep/key")}
    (root / linked).parent.mkdir(parents=True)
    (root / linked).symlink_to(mine)
    (tmp_path / "file").write_bytes(bytes(12 << 20))
    where = ObjectStore(f"file://{root}")
    for change in (
        lambda: where.put("sub/deep/key", b"other"),
        lambda: where.put("sub/deep/key", b"other", replace=False),
        lambda: where.upload("sub/deep/key", tmp_path / "file", replace=True),
        lambda: where.delete(["sub/deep/key"]) if linked != ".uploads" else where.put("key", b"other"),
    ):
        with pytest.raises(CorruptError, match=r"is a symbolic link"):
            change()
    assert {name: (mine / name).stat().st_ctime_ns for name in before} == before
    assert (mine / "deep" / "key").read_bytes() == b"mine"
    # The bucket itself may be one.
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    assert ObjectStore(f"file://{tmp_path}/link").put("a/key", b"data")
    assert (tmp_path / "plain" / "a" / "key").read_bytes() == b"data"


def test_a_key_that_is_a_link_is_replaced_and_what_it_leads_to_stays(root, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    root.mkdir()
    (root / "key").symlink_to(tmp_path / "mine")
    where = ObjectStore(f"file://{root}")
    assert not where.put("key", b"other", replace=False)
    assert where.put("key", b"other")
    assert ((tmp_path / "mine").read_bytes(), (root / "key").is_symlink()) == (b"mine", False)


def test_a_store_is_pushed_and_pulled_by_an_address_with_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    cache(tmp_path / "acts").close()
    url = f"file://{tmp_path}/a b%20c/\u00e9"
    mmcache.push(tmp_path / "acts", url)
    assert (tmp_path / "a b c" / "\u00e9" / "zarr.json").exists()
    mmcache.pull(url, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "acts")
    with pytest.raises(ArgumentError, match="three slashes"):
        ObjectStore("file://acts/here")
