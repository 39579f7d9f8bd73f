"""One odd key in a bucket hides nothing: it is left alone, and named."""

import os
import sys

import pytest
from click.testing import CliRunner

import mmcache
import remote_stores
from damaged_stores import MAKERS
from mmcache.cli import main
from mmcache.errors import ArgumentError
from mmcache.storage import object_store
from mmcache.storage.object_store import ObjectStore
from stores_and_processes import same, without_sync

NAMED = r"keys that no store has: .*remove these objects"


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    without_sync(monkeypatch)
    monkeypatch.setenv("MMCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "PATIENCE", 3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store that has all kinds of files."""
    path = tmp_path_factory.mktemp("made") / "acts"
    MAKERS["planned, token"](path).close()
    return path


def check(url, right, odd, tmp_path):
    """Read, verify and copy a store among whose keys there are odd ones; open and verify say which."""
    with pytest.warns(UserWarning, match=NAMED) as told:
        found = mmcache.open(url, cache_dir=tmp_path / "cache")
    assert [warning.filename for warning in told] == [__file__]
    assert all(repr(key) in str(told[0].message) for key in odd)
    with mmcache.open(right) as local, found:
        site = local.sites[0]
        assert same(found[site].gather(range(local.n_tokens)), local[site].gather(range(local.n_tokens)))
        assert same(found[site].statistics.mean, local[site].statistics.mean)
        assert same(found.tokens, local.tokens)
        assert found.tokenizer_json() == local.tokenizer_json()
    report = mmcache.verify(url, "quick")
    assert [(finding.kind, finding.file) for finding in report.findings] == [("unexpected", key) for key in odd]
    assert all("remove the object" in finding.what for finding in report.findings)


# Keys that no client addresses, one that looks like another, and such as cannot be files beside the store's own.
ODD = [
    "../x", "a/../../x", "mlp_in/..", "mlp_in/.", "./zarr.json", "mlp_in//c.0.0.0", "/", "//", "//zarr.json",
    "mlp_in/c.0.0.0\x01", "mlp_in/\x00", "mlp_in/\x7f", "mlp_in/\r", "mlp_in/\tc.0.0.0",
    "zarr.json/", "mlp_in/zarr.json/", "mlp_in/c.0.0.0/", "tokenizer/tokenizer.json/",
    "mlp_in", "statistics", "tokenizer", "mlp_in/c.0.0.0/below", "zarr.json/below", "mlp_in/zarr.json/zarr.json",
    "statistics/zarr.json/zarr.json", "tokenizer/tokenizer.json/below", "statistics/mlp_in",
    "mlp_in/c.0.0.0\u2028", "mlp_in/\u202e", "mlp_in/\ufffe", "n" * 300 + "/zarr.json", "mlp_in/c.0." + "0" * 300,
]  # fmt: skip


def test_a_store_is_read_whatever_key_is_beside_its_own(made, s3_server, tmp_path):
    url = remote_stores.upload(s3_server, made)
    for key in ODD:
        remote_stores.replace(s3_server, f"acts/{key}", b"strange")
        try:
            check(url, made, [key], tmp_path)
        except BaseException as error:
            raise AssertionError(repr(key)) from error
        s3_server.client().delete_object(Bucket=s3_server.bucket, Key=f"acts/{key}")


def test_all_of_them_together_and_each_command(made, s3_server, tmp_path):
    url = remote_stores.upload(s3_server, made)
    for key in ODD:
        remote_stores.replace(s3_server, f"acts/{key}", b"strange")
    refused = [key for key in ODD if key in ODD[:18]]
    report = mmcache.verify(url)
    assert {finding.file for finding in report.findings} == set(ODD)
    with pytest.warns(UserWarning, match=NAMED):
        mmcache.pull(url, tmp_path / "pulled")
    assert mmcache.verify(tmp_path / "pulled").ok
    with pytest.warns(UserWarning, match=NAMED) as told:
        assert mmcache.push(made, url).shards == 0
    assert any(repr(key) in str(told[0].message) for key in refused)
    with pytest.warns(UserWarning, match=NAMED):
        assert MAKERS["planned, token"](url).n_tokens
    done = CliRunner().invoke(main, ["verify", url])
    assert done.exit_code == 1
    assert all(character.isprintable() or character == "\n" for character in done.output)


ORDINARY = [
    "notes.txt", "mlp_in/notes", ".DS_Store", "mlp_in/.part", "deep/er/notes", "mlp_in/%2e%2e", "mlp_in/c.0.0.0%2F",
    "mlp_in/...", "mlp_in/a b", "mlp_in/back\\slash", "mlp_in/\u00e9", "mlp_in/e\u0301", "\U0001f600",
    "mlp_in/#1", "mlp_in/?x",
]  # fmt: skip
FOLDERS = ["", "mlp_in/", "statistics/mlp_in/", "mlp_in", "tokenizer"]


def test_what_is_somebodys_or_stands_for_a_folder_is_no_matter(made, s3_server, tmp_path):
    url = remote_stores.upload(s3_server, made)
    for key in ORDINARY:
        remote_stores.replace(s3_server, f"acts/{key}", b"notes")
    for key in FOLDERS:
        remote_stores.replace(s3_server, f"acts/{key}", b"")
    assert mmcache.verify(url).ok
    # Also where all of it is listed by hand.
    remote_stores.replace(s3_server, "acts/a//b", b"strange")
    check(url, made, ["a//b"], tmp_path)


def test_a_listing_by_hand_comes_in_pages_and_says_the_same(s3_server, monkeypatch):
    where = ObjectStore(s3_server.url("acts"))
    keys = {f"a/{number:04}" for number in range(1203)}
    for key in keys:
        where.put(key, key.encode())
    before = {entry for some in where.names() for entry in some}
    remote_stores.replace(s3_server, "acts/a/..", b"")
    assert {entry for some in where.names() for entry in some} == before
    assert {key for some in where.names("a") for key, _, _ in some} == keys
    assert list(where.names("b")) == []
    assert where.refused == ("a/..",)
    remote_stores.replace(s3_server, "acts/b//", b"b")
    assert list(where.names("b")) == []
    assert where.refused == ("a/..", "b//")
    # Without boto3, the way out is told.
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ArgumentError, match=r"a key that the client refuses.*remove the object, or pip install"):
        list(ObjectStore(s3_server.url("acts")).names())


@pytest.mark.parametrize("kind", ["forbidden", "error_500"])
def test_a_server_that_refuses_or_is_down_is_told_there_too(kind, s3_server, s3_proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    where = ObjectStore(s3_server.url("acts"))
    remote_stores.replace(s3_server, "acts/..", b"")
    assert list(where.names()) == []
    s3_proxy.plan(kind, count=10**6)
    error = mmcache.AccessError if kind == "forbidden" else mmcache.RemoteError
    with pytest.raises(error, match="acts"):
        list(where.names())


@pytest.fixture
def folder(made, tmp_path):
    """A bucket that is a folder."""
    mmcache.push(made, f"file://{tmp_path}/bucket")
    return tmp_path / "bucket"


# What is done to a folder, and what is named then.
PLANTED = {
    "no text": (lambda there: (there / "mlp_in" / os.fsdecode(b"x\xff")).touch(), ["mlp_in/x\\xff"]),
    "a new line": (lambda there: (there / "a\nb").touch(), ["a\nb"]),
    "a control character": (lambda there: (there / "mlp_in" / "c.0.0.0\x01").touch(), ["mlp_in/c.0.0.0\x01"]),
    "a link to itself": (lambda there: (there / "mlp_in" / "x").symlink_to("x"), ["mlp_in/x"]),
    "a folder of no text": (lambda there: (there / os.fsdecode(b"x\xff")).mkdir(), []),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_folder_is_read_whatever_else_is_in_it(what, folder, made, tmp_path):
    plant, odd = PLANTED[what]
    plant(folder)
    if odd:
        check(f"file://{folder}", made, odd, tmp_path)
    else:
        assert mmcache.verify(f"file://{folder}").ok


def test_reading_a_folder_that_is_not_there_does_not_make_it(tmp_path):
    for read in (
        mmcache.open,
        mmcache.verify,
        lambda url: mmcache.pull(url, tmp_path / "pulled"),
        lambda url: list(ObjectStore(url).names()) or ObjectStore(url).size("zarr.json"),
    ):
        with pytest.raises(mmcache.StoreNotFoundError):
            read(f"file://{tmp_path}/nothing")
    assert not (tmp_path / "nothing").exists()
