"""The S3 server and the failing network that other tests stand on do what these tests take for granted."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PermissionDeniedError
from obstore.store import S3Store

import fake_s3

MIB = 1 << 20


@pytest.fixture(scope="module")
def served():
    with fake_s3.serve_s3() as server:
        yield server


@pytest.fixture
def server(served):
    served.clear()
    return served


@pytest.fixture
def proxy(server):
    with fake_s3.FaultProxy(server.host, server.port, seed=1, hang_s=60.0) as proxy:
        yield proxy


def store_at(server, endpoint=None, *, retries=0, timeout_s=5.0):
    """Give an obstore store that finds its server by the environment, as mmcache's do."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env(endpoint).items():
            patch.setenv(name, value)
        return S3Store.from_url(
            server.url(),
            # Given options of the client, an empty dictionary too, obstore does not look at AWS_ALLOW_HTTP.
            client_options={"timeout": timedelta(seconds=timeout_s), "allow_http": True},
            retry_config={"max_retries": retries, "backoff": {"init_backoff": timedelta(milliseconds=10)}},
            copy_if_not_exists="multipart",
        )


def test_what_obstore_writes_boto3_finds_and_the_other_way_round(server):
    store = store_at(server)
    large = os.urandom(12 * MIB)
    obstore.put(store, "a/small", b"0123456789")
    obstore.put(store, "a/large", large, chunk_size=5 * MIB, max_concurrency=2)
    assert server.objects() == {"a/small": b"0123456789", "a/large": large}
    server.client().put_object(Bucket=server.bucket, Key="b/theirs", Body=b"theirs")
    assert obstore.get(store, "b/theirs").bytes() == b"theirs"
    assert bytes(obstore.get_range(store, "a/small", start=3, length=4)) == b"3456"
    ranges = obstore.get_ranges(store, "a/large", starts=[0, 7 * MIB], lengths=[100, 4096])
    assert [bytes(part) for part in ranges] == [large[:100], large[7 * MIB : 7 * MIB + 4096]]
    assert sorted(entry["path"] for page in obstore.list(store, "a") for entry in page) == ["a/large", "a/small"]
    assert obstore.list_with_delimiter(store)["common_prefixes"] == ["a", "b"]
    obstore.delete(store, ["a/small", "b/theirs"])
    assert set(server.objects()) == {"a/large"}
    with pytest.raises(FileNotFoundError):
        obstore.get(store, "a/small")


def test_only_one_creates_an_object(server):
    store = store_at(server)

    def create(n):
        try:
            obstore.put(store, "once", str(n).encode(), mode="create", use_multipart=False)
        except AlreadyExistsError:
            return None
        return n

    with ThreadPoolExecutor(8) as pool:
        (made,) = {n for n in pool.map(create, range(24)) if n is not None}
    assert server.objects() == {"once": str(made).encode()}


def test_a_copy_does_not_replace(server):
    store = store_at(server)
    obstore.put(store, "from", b"new")
    obstore.copy(store, "from", "to", overwrite=False)
    obstore.put(store, "from", b"newer")
    with pytest.raises(AlreadyExistsError):
        obstore.copy(store, "from", "to", overwrite=False)
    assert server.objects("to") == {"to": b"new"}


def test_who_signs_with_a_wrong_key_is_not_let_in():
    with fake_s3.serve_s3(auth=True) as server, fake_s3.FaultProxy(server.host, server.port) as proxy:
        for endpoint in (server.endpoint, proxy.endpoint):
            # A proxy that changed what is signed would be found out here.
            store = store_at(server, endpoint)
            obstore.put(store, "a b/ä=1", b"mine")
            assert obstore.get(store, "a b/ä=1").bytes() == b"mine"
        server.secret_key = "wrong"  # noqa: S105 -- that is the point
        with pytest.raises(PermissionDeniedError, match="403"):
            obstore.get(store_at(server), "a b/ä=1")


def test_a_killed_server_refuses_and_a_restarted_one_is_empty():
    with fake_s3.serve_s3() as server:
        store = store_at(server)
        obstore.put(store, "key", b"value")
        port = server.port
        server.kill()
        with pytest.raises(GenericError):
            obstore.get(store, "key")
        server.restart()
        assert (server.port, server.objects()) == (port, {})
        obstore.put(store, "key", b"again")
        assert server.objects() == {"key": b"again"}


def test_without_faults_the_proxy_changes_nothing(server, proxy):
    store = store_at(server, proxy.endpoint)
    large = os.urandom(64 * MIB)
    obstore.put(store, "one", large, use_multipart=False)
    obstore.put(store, "parts", large, chunk_size=8 * MIB)
    assert obstore.get(store, "one").bytes() == large
    assert obstore.get(store, "parts").bytes() == large
    # boto3 waits for a 100 before it sends a body, and sends deletions as XML.
    with contextlib.closing(server.client(proxy.endpoint)) as client:
        client.put_object(Bucket=server.bucket, Key="theirs", Body=b"x" * MIB)
        client.delete_objects(Bucket=server.bucket, Delete={"Objects": [{"Key": "one"}]})
        assert client.head_object(Bucket=server.bucket, Key="theirs")["ContentLength"] == MIB
    obstore.copy(store, "theirs", "copy", overwrite=False)
    obstore.delete(store, "theirs")
    assert set(server.objects()) == {"parts", "copy"}
    assert not proxy.met()
    assert proxy.bytes_sent("GET") == 2 * len(large)
    assert proxy.n_requests("PUT", "partNumber=") == 9
    assert proxy.n_requests("HEAD") == 1


def test_many_at_a_time_through_the_proxy(server, proxy):
    store = store_at(server, proxy.endpoint)
    data = os.urandom(MIB)
    obstore.put(store, "key", data)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda n: obstore.get_range(store, "key", start=n * 4096, length=4096), range(64))
        assert b"".join(bytes(part) for part in parts) == data[: 64 * 4096]


@pytest.mark.parametrize("kind", ["close", "cut_response", "lost", "error_500", "slow_down", "forbidden"])
def test_a_read_fails_and_is_right_the_next_time(server, proxy, kind):
    store = store_at(server, proxy.endpoint)
    data = os.urandom(MIB)
    obstore.put(store, "key", data)
    obstore.put(store, "other", b"other")
    proxy.plan(kind, "GET", "/key")
    assert obstore.get(store, "other").bytes() == b"other"
    with pytest.raises(PermissionDeniedError if kind == "forbidden" else GenericError):
        obstore.get_range(store, "key", start=0, end=MIB)
    assert proxy.met() == {kind: 1}
    assert obstore.get(store, "key").bytes() == data


def test_a_short_answer_looks_whole(server, proxy):
    store = store_at(server, proxy.endpoint)
    data = os.urandom(MIB)
    obstore.put(store, "key", data)
    proxy.plan("short", substring="/key", count=2)
    # Nothing is raised: whoever reads has to count.
    assert bytes(obstore.get_range(store, "key", start=4096, length=8192)) == data[4096:8192]
    assert obstore.get(store, "key").bytes() == data[: MIB // 2]
    assert obstore.get(store, "key").bytes() == data


@pytest.mark.parametrize("kind", ["close", "cut_request", "error_500", "slow_down", "forbidden"])
def test_a_write_fails_and_leaves_nothing(server, proxy, kind):
    store = store_at(server, proxy.endpoint)
    data = os.urandom(4 * MIB)
    proxy.plan(kind, "PUT", "/key")
    with pytest.raises(BaseError):
        obstore.put(store, "key", data, use_multipart=False)
    assert (server.objects(), proxy.met()) == ({}, {kind: 1})
    obstore.put(store, "key", data, use_multipart=False)
    assert server.objects() == {"key": data}


def test_a_lost_answer_leaves_what_was_written(server, proxy):
    store = store_at(server, proxy.endpoint, retries=3)
    proxy.plan("lost", "PUT", "/key")
    # To create is not sent again by itself: the second time it would meet what the first has written.
    with pytest.raises(GenericError):
        obstore.put(store, "key", b"ours", mode="create", use_multipart=False)
    assert server.objects() == {"key": b"ours"}
    assert proxy.n_requests("PUT") == 1


def test_a_part_that_fails_ends_a_multipart_upload(server, proxy):
    store = store_at(server, proxy.endpoint)
    proxy.plan("cut_request", "PUT", "partNumber=2")
    with pytest.raises(GenericError):
        obstore.put(store, "key", bytes(16 * MIB), chunk_size=5 * MIB, max_concurrency=1)
    assert server.objects() == {}


def test_a_server_that_hangs_is_given_up(server, proxy):
    store = store_at(server, proxy.endpoint, timeout_s=0.3)
    obstore.put(store, "key", b"value")
    proxy.plan("hang", "GET", "/key")
    began = time.monotonic()
    with pytest.raises(GenericError):
        obstore.get(store, "key")
    assert 0.2 < time.monotonic() - began < 30
    # The fixture ends at once, though a minute is not over.
    assert obstore.get(store, "key").bytes() == b"value"


def test_what_is_down_refuses_and_what_is_up_again_answers(server, proxy):
    store = store_at(server, proxy.endpoint)
    obstore.put(store, "key", b"value")
    proxy.down()
    with pytest.raises(GenericError):
        obstore.get(store, "key")
    proxy.up()
    assert obstore.get(store, "key").bytes() == b"value"


def test_obstore_asks_again_by_itself(server, proxy):
    store = store_at(server, proxy.endpoint, retries=5)
    data = os.urandom(MIB)
    for kind in ("close", "error_500", "slow_down", "lost"):
        proxy.plan(kind)
    obstore.put(store, "key", data, use_multipart=False)
    for kind in ("close", "cut_response", "error_500", "slow_down", "lost"):
        proxy.plan(kind, "GET")
    assert obstore.get(store, "key").bytes() == data
    assert sum(proxy.met().values()) == 9


def test_chance_is_the_same_for_the_same_seed_whoever_comes_first(server):
    obstore.put(store_at(server), "key", bytes(65536))

    def run(seed, threads):
        rates = {"close": 0.1, "error_500": 0.2, "slow_down": 0.1, "forbidden": 0.1}
        with (
            fake_s3.FaultProxy(server.host, server.port, seed, rates=rates) as proxy,
            ThreadPoolExecutor(threads) as pool,
        ):
            store = store_at(server, proxy.endpoint)

            def fails(n):
                try:
                    obstore.get_range(store, "key", start=n, length=10)
                except BaseError:
                    return True
                return False

            found = list(pool.map(fails, range(60)))
            assert found.count(True) == sum(proxy.met().values())
            proxy.faults(on=False)
            assert not any(fails(n) for n in range(10))
            return found

    first = run(1, threads=1)
    assert 15 < first.count(True) < 45
    assert run(1, threads=4) == first
    assert run(2, threads=4) != first


def test_faults_are_aimed(server, proxy):
    store = store_at(server, proxy.endpoint)
    proxy.set_rates(error_500=1.0)
    proxy.aim("GET", "/bad")
    for key in ("good", "bad"):
        obstore.put(store, key, key.encode())
    assert obstore.get(store, "good").bytes() == b"good"
    with pytest.raises(GenericError):
        obstore.get(store, "bad")
    with pytest.raises(ValueError, match="kinds are"):
        proxy.set_rates(nonsense=1.0)


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_behind():
    threads, files = threading.active_count(), _open_files()
    with fake_s3.serve_s3() as server, fake_s3.FaultProxy(server.host, server.port, hang_s=60) as proxy:
        store = store_at(server, proxy.endpoint, timeout_s=0.2)
        proxy.plan("hang")
        with pytest.raises(GenericError):
            obstore.get(store, "key")
        process = server._process
        server.objects()
    assert process.returncode is not None
    del store
    assert threading.active_count() == threads
    # obstore's own connections close when they like.
    assert _open_files() <= files + 8
