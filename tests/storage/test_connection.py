"""Whether there is a way to a bucket at all is told at once."""

import os
import sys
import time

import pytest

import fake_s3
from mmcache.errors import AccessError, ArgumentError, BucketNotFoundError, StoreNotFoundError
from mmcache.storage import object_store
from mmcache.storage.object_store import ObjectStore
from mmcache.urls import is_url

SMALL = b"0123456789"
# What is asked of a bucket.
ASKED = {
    "read": lambda where, _: where.read("there/small", 2, 9),
    "stream": lambda where, _: list(where.stream("there/small", 2, 9)),
    "head": lambda where, _: where.read_head("there/small", 4),
    "whole": lambda where, _: where.read_whole("there/small", 99),
    "names": lambda where, _: list(where.names("there")),
    "put": lambda where, _: where.put("new/put", SMALL),
    "create": lambda where, _: where.put("new/create", SMALL, replace=False),
    "upload": lambda where, large: where.upload("new/upload", large),
    "size": lambda where, _: where.size("there/small"),
    "delete": lambda where, _: where.delete(["there/small"]),
}


@pytest.fixture(autouse=True)
def _nobodys_own_keys(monkeypatch):
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)


@pytest.fixture
def large(tmp_path):
    (tmp_path / "large").write_bytes(bytes(6 << 20))
    return tmp_path / "large"


def test_who_is_refused_is_told_at_once(monkeypatch, large):
    monkeypatch.setattr(object_store, "PATIENCE", 60.0)
    with fake_s3.serve_s3(auth=True) as server:
        for name, value in (server.env() | {"AWS_SECRET_ACCESS_KEY": "wrong"}).items():
            monkeypatch.setenv(name, value)
        where, began = ObjectStore(server.url("acts")), time.monotonic()
        for name, work in ASKED.items():
            with pytest.raises(AccessError, match=r"refuses.*acts/(there|new)"):
                work(where, large)
            assert time.monotonic() - began < 20, name


@pytest.mark.usefixtures("s3_server")
def test_no_such_bucket_is_told_at_once(large, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 60.0)
    where, began = ObjectStore("s3://nowhere/acts"), time.monotonic()
    for name in ("read", "stream", "head", "whole", "names", "put", "create", "upload"):
        with pytest.raises(BucketNotFoundError, match=r"no such bucket.*s3://nowhere/acts"):
            ASKED[name](where, large)
    # What is asked for by HEAD is answered without a reason.
    with pytest.raises(StoreNotFoundError):
        where.size("there/small")
    where.delete(["there/small"])
    assert time.monotonic() - began < 20


def test_no_credentials_are_told_at_once(s3_server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    began = time.monotonic()
    with pytest.raises(AccessError, match=r"no AWS credentials.*AWS_PROFILE.*s3://activations/acts"):
        ObjectStore(s3_server.url("acts"))
    assert time.monotonic() - began < 20


def test_a_profile_of_boto3s_is_heeded(s3_server, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "keys").write_text("[mine]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    ObjectStore(s3_server.url("acts")).put("small", SMALL)
    assert s3_server.objects() == {"acts/small": SMALL}


@pytest.mark.parametrize("url", ["http://bucket/acts", "/acts", "s3:acts", "s3://", "s3:///acts", "file://acts/here"])
def test_what_is_no_address_says_so(url, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    with pytest.raises(ArgumentError, match=r"expected an address|Unable to recognise"):
        ObjectStore(url)


def test_addresses_are_told_from_paths():
    assert all(map(is_url, ("s3://bucket/acts", "gs://bucket", "az://account/container", "file:///acts")))
    assert not any(map(is_url, ("/acts", "s3:/acts", "s3", "http://acts", "", None, os)))


def test_without_obstore_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ArgumentError, match=r"pip install 'mmcache\[remote\]'"):
        ObjectStore("s3://bucket/acts")
