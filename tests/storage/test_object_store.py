"""Objects in a bucket come and go whole, whatever the network does, or an error names them."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import fake_s3
from mmcache.errors import AccessError, CorruptError, RemoteError, StoreNotFoundError
from mmcache.storage import object_keys, object_store
from mmcache.storage.object_store import ObjectStore
from stores_and_processes import FORKS, forked

PART = 5 << 20
SMALL, LARGE = b"0123456789", bytes(range(256)) * 49152  # 12 MiB: three parts


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 3.0)
    monkeypatch.setattr(object_store, "PART_BYTES", PART)
    # Nobody's own keys.
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture(params=["s3", "file"])
def place(request, tmp_path):
    """Give a bucket of each kind."""
    if request.param == "file":
        return ObjectStore(f"file://{tmp_path}/bucket/acts")
    return ObjectStore(request.getfixturevalue("s3_server").url("acts"))


@pytest.fixture
def large(tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    return tmp_path / "large"


def listed(where, under=""):
    return sorted((key, size) for some in where.names(under) for key, size, _ in some)


def answering(monkeypatch, where, **changed):
    """Have some of the client's functions be others."""
    real = where._obstore
    monkeypatch.setattr(where, "_obstore", SimpleNamespace(**{n: getattr(real, n) for n in dir(real)} | changed))
    return real


def test_what_is_put_is_read(place, large):
    assert place.put("a/small", SMALL)
    assert place.put("a/empty", b"")
    assert place.upload("a/large", large)
    assert listed(place) == [("a/empty", 0), ("a/large", len(LARGE)), ("a/small", 10)]
    assert listed(place, "a") == listed(place)
    assert listed(place, "b") == []
    assert (place.size("a/large"), place.size("a/empty")) == (len(LARGE), 0)
    for start, stop in ((0, 1), (3, 7), (0, 10), (9, 10), (5, 5)):
        assert bytes(place.read("a/small", start, stop)) == SMALL[start:stop]
        assert b"".join(place.stream("a/small", start, stop)) == SMALL[start:stop]
    start, stop = 1, len(LARGE) - 3
    assert bytes(place.read("a/large", start, stop)) == LARGE[start:stop]
    pieces = [bytes(piece) for piece in place.stream("a/large", start, stop)]
    assert b"".join(pieces) == LARGE[start:stop]
    assert len(pieces) > 2
    assert place.read_head("a/small", 4) == (b"0123", 10)
    assert place.read_head("a/small", 4096) == (SMALL, 10)
    assert place.read_whole("a/small", 10) == SMALL
    assert place.read_whole("a/empty", 10) == b""
    data, tag = place.read_tagged("a/small", 10)
    assert (data, tag) == (SMALL, {key: tag for some in place.names() for key, _, tag in some}["a/small"])


def test_what_is_not_there_or_too_short_or_too_long_says_so(place):
    place.put("small", SMALL)
    place.put("empty", b"")
    reads = (
        lambda key: place.read(key, 0, 11),
        lambda key: place.read(key, 20, 30),
        lambda key: list(place.stream(key, 5, 11)),
        lambda key: list(place.stream(key, 20, 30)),
    )
    for read in reads:
        with pytest.raises(CorruptError, match="small has 10 bytes, at least"):
            read("small")
    with pytest.raises(CorruptError, match="small is larger than the 9 bytes"):
        place.read_whole("small", 9)
    with pytest.raises(CorruptError, match="empty has 0 bytes"):
        place.read_head("empty", 4)
    for read in (*reads, place.size, lambda key: place.read_head(key, 4), lambda key: place.read_whole(key, 9)):
        with pytest.raises(StoreNotFoundError, match=r"no such object.*acts/nothing"):
            read("nothing")


def test_what_is_there_already_stays_unless_it_may_be_replaced(place, large, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(LARGE[::-1])
    assert place.put("small", SMALL, replace=False)
    assert not place.put("small", b"other", replace=False)
    assert not place.put("small", SMALL, replace=False)
    assert place.read_whole("small", 99) == SMALL
    assert place.put("small", b"other")
    assert place.read_whole("small", 99) == b"other"
    assert place.upload("large", large)
    assert not place.upload("large", other)
    assert bytes(place.read("large", 0, len(LARGE))) == LARGE
    assert place.upload("large", other, replace=True)
    assert bytes(place.read("large", 0, len(LARGE))) == LARGE[::-1]


def test_of_several_that_create_an_object_one_does(place, large):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: place.put("small", str(n).encode() * 10, replace=False), range(8)))
        assert made.count(True) == 1
        assert place.read_whole("small", 99) == str(made.index(True)).encode() * 10
        assert list(pool.map(lambda _: place.upload("large", large), range(3))).count(True) == 1
    assert listed(place) == [("large", len(LARGE)), ("small", 10)]


def test_objects_go_and_what_is_not_there_is_no_matter(place):
    for key in ("a/1", "a/2", "b"):
        place.put(key, SMALL)
    place.delete(["nothing", "a/1", "neither", "b"])
    assert listed(place) == [("a/2", 10)]
    place.delete([])
    place.delete([f"{n}" for n in range(1500)] + ["a/2"])
    assert listed(place) == []


def test_uploads_that_were_left_are_not_listed(place):
    place.put(".uploads/0123", SMALL)
    place.put("here", SMALL)
    assert listed(place) == [("here", 10)]


def test_a_tag_that_is_an_md5_is_compared_and_nothing_is_read_back(s3_proxy, s3_server, large):
    where = ObjectStore(s3_server.url("acts"))
    where.put("small", SMALL)
    where.upload("large", large)
    assert s3_proxy.n_requests("GET") == 0
    assert s3_server.objects() == {"acts/small": SMALL, "acts/large": LARGE}
    assert s3_server.uploads() == []


def test_where_the_tag_is_no_md5_it_is_read_back(s3_proxy, s3_server, large, monkeypatch):
    where = ObjectStore(s3_server.url("acts"))
    real = where._obstore
    answering(monkeypatch, where, put=lambda *args, **kw: real.put(*args, **kw) | {"e_tag": None})
    where.put("small", SMALL)
    where.upload("large", large)
    assert s3_proxy.bytes_sent("GET") == len(SMALL) + len(LARGE)


@pytest.mark.parametrize("replace", [True, False])
def test_what_arrives_damaged_is_sent_again_or_told(place, large, monkeypatch, replace):
    monkeypatch.setattr(object_store, "PATIENCE", 0.6)
    damaged, real = [], place._obstore

    def put(store, key, data, **options):
        wrong = data[:-1] + b"!" if isinstance(data, bytes) else [part[:-1] + b"!" for part in data]
        damaged.append(key)
        return real.put(store, key, wrong if len(damaged) < enough else data, **options)

    answering(monkeypatch, place, put=put)
    enough = 1000
    for send in (
        lambda: place.put("small", SMALL, replace=replace),
        lambda: place.upload("large", large, replace=replace),
    ):
        with pytest.raises(RemoteError, match=r"acts/(small|large).*what arrived is not what"):
            send()
    assert "large" not in dict(listed(place))
    # Damaged once, and whole at the second time.
    damaged.clear()
    enough = 2
    assert place.put("again", SMALL, replace=replace)
    assert place.read_whole("again", 99) == SMALL
    assert len(damaged) == 2


def test_a_listing_comes_in_pages(monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    monkeypatch.setattr(object_keys, "_LISTED", 10)
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    with fake_s3.serve_s3() as server, fake_s3.FaultProxy(server.host, server.port) as proxy:
        for name, value in server.env(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        where, keys = ObjectStore(server.url("acts")), {f"a/{n:02}" for n in range(35)}
        for key in keys:
            server.client().put_object(Bucket=server.bucket, Key=f"acts/{key}", Body=b"")
        assert [key for some in where.names() for key, *_ in some] == sorted(keys)
        assert proxy.n_requests(substring="list-type") == 4
        for kind in ("close", "cut_response", "short", "slow_down"):
            proxy.plan(kind, substring="continuation-token", skip=1, count=2)
            found = [[key for key, *_ in some] for some in where.names()]
            assert {key for some in found for key in some} == keys
            assert found[0] == sorted(keys)[:10]
            proxy.reset()
        # A page that never comes is no listing that never ends.
        proxy.plan("error_500", substring="continuation-token", skip=1, count=10**6)
        with pytest.raises(RemoteError, match=r"acts/.*no whole answer"):
            list(where.names())


def all_of(where, key):
    size, coming = where.whole(key)
    return size, b"".join(coming)


# What is asked of an object, and whether the answer is right.
READS = {
    "read": lambda where, _: bytes(where.read("there/small", 2, 9)) == SMALL[2:9],
    "stream": lambda where, _: b"".join(where.stream("there/large", 5, len(LARGE))) == LARGE[5:],
    "all": lambda where, _: all_of(where, "there/large") == (len(LARGE), LARGE),
    "head": lambda where, _: where.read_head("there/small", 4) == (SMALL[:4], 10),
    "whole": lambda where, _: where.read_whole("there/small", 99) == SMALL,
    "size": lambda where, _: where.size("there/small") == 10,
    "names": lambda where, _: listed(where, "there") == [("there/large", len(LARGE)), ("there/small", 10)],
}
WRITES = {
    "put": lambda where, _: where.put("new/put", SMALL) and SMALL,
    "create": lambda where, _: where.put("new/create", SMALL, replace=False) is not None and SMALL,
    "upload": lambda where, large: where.upload("new/upload", large) is not None and LARGE,
    "delete": lambda where, _: where.delete(["there/small"]),
}


def prepared(server):
    for key, data in (("small", SMALL), ("large", LARGE)):
        server.client().put_object(Bucket=server.bucket, Key=f"acts/there/{key}", Body=data)
    return ObjectStore(server.url("acts"))


@pytest.mark.parametrize("kind", [kind for kind in fake_s3.KINDS if kind != "forbidden"])
def test_whatever_befalls_a_request_the_answer_is_right(kind, s3_proxy, s3_server, large):
    where, s3_proxy.hang_s = prepared(s3_server), 0.1
    for name, work in READS.items():
        s3_proxy.plan(kind)
        assert work(where, large), name
        s3_proxy.reset()
    for name, work in WRITES.items():
        for skip in (1, 4) if name == "upload" else (0,):
            s3_server.client().delete_object(Bucket=s3_server.bucket, Key=f"acts/new/{name}")
            s3_proxy.plan(kind, skip=skip)
            data = work(where, large)
            s3_proxy.reset()
            if data:
                assert s3_server.objects("acts/new/") == {f"acts/new/{name}": data}, (name, skip)
                s3_server.client().delete_object(Bucket=s3_server.bucket, Key=f"acts/new/{name}")
    assert set(s3_server.objects("acts/there")) == {"acts/there/large"}


@pytest.mark.parametrize("kind", fake_s3.KINDS)
def test_what_never_works_names_the_object_in_time(kind, s3_proxy, s3_server, large, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 0.4)
    where, s3_proxy.hang_s = prepared(s3_server), 0.2
    s3_proxy.plan(kind, count=10**6)
    error, possible = (AccessError if kind == "forbidden" else RemoteError), {**READS, **WRITES}
    if kind == "cut_response":
        possible = {"names": READS["names"]}  # the others get on by half of what is left each time
    elif kind == "short":
        possible = {name: READS[name] for name in ("read", "head", "whole", "names")}
    elif kind == "cut_request":
        possible = {name: work for name, work in WRITES.items() if name != "upload"}

    def told(name):
        with pytest.raises(error) as raised:
            possible[name](where, large)
        assert f"{where.url}/{'there' if name in READS or name == 'delete' else 'new'}" in str(raised.value)
        return True

    began = time.monotonic()
    with ThreadPoolExecutor(len(possible)) as pool:
        assert all(pool.map(told, possible))
    assert time.monotonic() - began < 30
    if kind == "forbidden":
        assert len(s3_proxy.requests) <= len(possible) + 1


def test_a_stream_that_is_cut_goes_on_from_where_it_was(s3_proxy, s3_server):
    where = prepared(s3_server)
    for cut in (1, 2):
        s3_proxy.reset()
        s3_proxy.plan("cut_response", "GET", "large", count=cut)
        assert b"".join(where.stream("there/large", 0, len(LARGE))) == LARGE
        starts = [int(asked.range[6:].split("-")[0]) for asked in s3_proxy.requests]
        assert starts == sorted(set(starts))
        assert len(starts) == cut + 1
        # What came, less than a piece before each cut, did not come again.
        assert len(LARGE) <= s3_proxy.bytes_sent() <= len(LARGE) + cut * object_store._PIECE_BYTES


def test_a_server_that_is_gone_for_a_second_holds_up_but_breaks_nothing(s3_proxy, s3_server, large, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 20.0)
    where = prepared(s3_server)
    coming = where.stream("there/large", 0, len(LARGE))
    begun = bytes(next(coming))
    s3_proxy.down()
    works = [*READS.values(), *WRITES.values(), lambda *_: begun + b"".join(coming) == LARGE]
    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(work, where, large) for work in works[:-2] + works[-1:]]
        time.sleep(1)
        assert not any(future.done() for future in running)
        s3_proxy.up()
        assert all(future.result() for future in running)
    assert s3_server.objects("acts/new") == {
        "acts/new/put": SMALL, "acts/new/create": SMALL, "acts/new/upload": LARGE
    }  # fmt: skip


@FORKS
def test_a_forked_process_is_told_and_a_pickled_one_works(s3_server, large):
    where = prepared(s3_server)
    where.read("there/small", 0, 1)

    def work():
        for work in (READS | WRITES).values():
            with pytest.raises(RemoteError, match=r"forked.*spawn"):
                work(where, large)

    began = time.monotonic()
    assert forked(work) == 0
    assert time.monotonic() - began < 30
    again = pickle.loads(pickle.dumps(where))  # noqa: S301 -- ours
    assert bytes(again.read("there/small", 0, 10)) == SMALL


def test_who_asks_now_and_then_whether_to_go_on_ends_what_waits_for_a_server(s3_proxy, s3_server, large, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 60.0)
    where = prepared(s3_server)
    s3_proxy.down()
    ended = threading.Event()

    def alive():
        if ended.is_set():
            raise InterruptedError

    for work in (
        lambda: where.put("new/put", SMALL, alive),
        lambda: where.size("there/small", alive),
        lambda: where.upload("new/upload", large, alive),
    ):
        ended.clear()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work)
            time.sleep(0.3)
            began = time.monotonic()
            ended.set()
            with pytest.raises(InterruptedError):
                running.result()
        # Far sooner than patience is over: a request or two, each tried a few times.
        assert time.monotonic() - began < 20


def test_who_ends_an_upload_half_way_leaves_nothing(place, large, request):
    asked = []

    def alive():
        asked.append(True)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        place.upload("large", large, alive)
    assert listed(place) == []
    if place.url.startswith("s3"):
        server = request.getfixturevalue("s3_server")
        assert (server.uploads(), server.objects()) == ([], {})
