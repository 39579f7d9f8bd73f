"""A cache is the user's own, or it is refused with what to do."""

import os
import stat

import pytest

import mmcache
import remote_stores
from mmcache.errors import ArgumentError, WriteError
from mmcache.extraction.bucket_upload import BucketOutput
from mmcache.storage import cache_folder as cache_place
from mmcache.storage.cache_folder import cache_folder, private_folder
from stores_and_processes import python, without_sync

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
STRANGER = 12345


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_cache_is_where_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCACHE_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"
    monkeypatch.delenv("MMCACHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmcache"


def test_what_is_made_is_nobody_elses_to_look_into(tmp_path):
    before = os.umask(0)
    try:
        assert (
            private_folder(tmp_path / "far" / "cache", "stores", "one") == tmp_path / "far" / "cache" / "stores" / "one"
        )
    finally:
        os.umask(before)
    assert [mode(path) for path in sorted((tmp_path / "far").rglob("*"))] == [0o700] * 3
    assert private_folder(tmp_path / "far" / "cache", "stores") == tmp_path / "far" / "cache" / "stores"


@pytest.mark.parametrize("umask", [0o755, 0o750, 0o775, 0o700], ids=oct)
def test_what_the_user_made_is_taken_as_it_is(tmp_path, umask):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(umask)
    private_folder(tmp_path / "cache", "shards")
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    assert private_folder(tmp_path / "link", "shards") == tmp_path / "link" / "shards"
    assert mode(tmp_path / "cache") == umask


# What is done to a cache or a folder in it, and what is said of it.
PLANTED = {
    "a stranger's": (lambda path: os.chown(path, STRANGER, STRANGER), f"another user.*uid {STRANGER}"),
    "a stranger's, for everybody": (
        lambda path: (os.chown(path, STRANGER, STRANGER), path.chmod(0o777)),
        "another user",
    ),
    "for everybody": (lambda path: path.chmod(0o777), "by everybody.*chmod o-w"),
    "a file": (lambda path: (path.rmdir(), path.touch()), "is no folder"),
}


@ROOT
@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("below", [(), ("stores",), ("stores", "one")], ids=["cache", "stores", "one"])
def test_one_that_others_may_write_to_is_refused(tmp_path, what, below):
    there = tmp_path.joinpath("cache", *below)
    there.mkdir(parents=True)
    plant, said = PLANTED[what]
    plant(there)
    with pytest.raises(ArgumentError, match=rf"{there}.*{said}.*cache_dir= or \$MMCACHE_CACHE"):
        private_folder(tmp_path / "cache", "stores", "one")


def test_a_link_below_it_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match=r"shards.*is a link: link the whole cache, or choose.*MMCACHE_CACHE"):
        private_folder(tmp_path / "cache", "shards")
    (tmp_path / "nothing").symlink_to(tmp_path / "not there")
    with pytest.raises(WriteError, match="nothing"):
        private_folder(tmp_path / "nothing", "shards")


@ROOT
def test_a_folder_for_temporary_files_is_shared_and_what_is_made_there_is_not(tmp_path):
    tmp_path.chmod(0o1777)
    private_folder(tmp_path, "shards")
    # Without the sticky bit, anybody could take it away.
    tmp_path.chmod(0o777)
    with pytest.raises(ArgumentError, match="by everybody"):
        private_folder(tmp_path, "shards")
    tmp_path.chmod(0o1777)
    os.chown(tmp_path / "shards", STRANGER, STRANGER)
    with pytest.raises(ArgumentError, match="another user"):
        private_folder(tmp_path, "shards")


def test_where_a_file_system_gives_all_files_to_one_user_that_one_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    private_folder(tmp_path / "cache", "shards")
    monkeypatch.setattr(cache_place.tempfile, "TemporaryFile", lambda **_: open(os.devnull))  # noqa: SIM115, PTH123 -- another's
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100600, 1, 1, 1, STRANGER + 1, 0, 0, 0, 0, 0)))
    with pytest.raises(ArgumentError, match="another user"):
        private_folder(tmp_path / "cache", "shards")


@ROOT
@pytest.mark.parametrize("what", ["a stranger's", "for everybody"])
def test_every_way_to_it_refuses_a_planted_one(tmp_path, monkeypatch, what):
    url = f"file://{remote_stores.make(tmp_path / 'acts', tokens=10)}"
    planted = tmp_path / "planted"
    planted.mkdir()
    PLANTED[what][0](planted)
    monkeypatch.setenv("MMCACHE_CACHE", str(planted))
    for way in (
        lambda: mmcache.open(url),
        lambda: mmcache.open(url, cache_dir=planted),
        lambda: mmcache.verify(url),
    ):
        with pytest.raises(ArgumentError, match=f"{planted}"):
            way()
    assert list(planted.iterdir()) == []
    done = python("from mmcache.cli import main; main()", url)
    assert done.returncode == 2 or "MMCACHE_CACHE" in done.stderr


@ROOT
def test_a_store_for_a_bucket_is_not_staged_in_a_planted_one(tmp_path, monkeypatch):
    planted = tmp_path / "planted"
    (planted / "staging").mkdir(parents=True)
    os.chown(planted / "staging", STRANGER, STRANGER)
    monkeypatch.setenv("MMCACHE_CACHE", str(planted))
    with pytest.raises(ArgumentError, match=r"staging.*another user"):
        BucketOutput(f"file://{tmp_path}/bucket", None, None).plan((), pytest.fail, pytest.fail, pytest.fail)
    assert list((planted / "staging").iterdir()) == []
