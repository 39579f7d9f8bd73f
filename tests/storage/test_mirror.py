"""What is here of a store in a bucket is what the bucket has, byte for byte, or it is not here."""

import json
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
import remote_stores
from mmcache.errors import ArgumentError, BucketNotFoundError, CorruptError, IncompleteError, StoreNotFoundError
from mmcache.format.manifest import read_manifest
from mmcache.format.shard import HEADER_BYTES, Layout, parse_header
from mmcache.storage import mirror as mirror_module
from mmcache.storage import object_store
from mmcache.storage.mirror import CHECKSUM_BYTES, Mirror, ShardObjects
from mmcache.storage.shard_bytes import FileBytes, ObjectBytes
from mmcache.storage.shard_check import StreamCheck
from mmcache.storage.shard_folder import ShardFolder
from random_shards import METADATA, encoded, layouts, random_rows
from stores_and_processes import flip, python, tree, without_sync

KEY = "c.0.0.0"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)
    monkeypatch.setattr(object_store, "PATIENCE", 3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return remote_stores.make(tmp_path_factory.mktemp("made") / "acts")


@pytest.fixture
def url(made, s3_server):
    return remote_stores.upload(s3_server, made)


def stubs(mirror):
    """Give the names of the shards that there are said to be."""
    found = {file.relative_to(mirror.folder).as_posix(): file for file in mirror.folder.rglob("c.*")}
    assert all(file.stat().st_size == 0 for file in found.values())
    return set(found)


def shards_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("c.*")}


def metadata(folder):
    return {key: data for key, data in tree(folder).items() if data and not key.split("/")[-1].startswith((".", "c."))}


def checking(mirror, array="a", key=KEY):
    """Give what looks at a header: it has to be the one that belongs there, but for the tokens' digest."""
    manifest = read_manifest(mirror.folder)
    folder = ShardFolder(mirror.folder, manifest, array, manifest.rows(array))
    return partial(check_header, folder, key)


def check_header(folder, key, head, size):
    spec = folder.spec
    said = json.loads(head[8:])["__metadata__"]
    assert said["key"] == key
    return parse_header(spec, head, size, said, where=key)


def left(mirror):
    """Give what is in the cache of shards."""
    return sorted(path.name for path in mirror.cache.folder.iterdir() if path.name not in (".checked", ".gone"))


def test_the_folder_is_what_the_bucket_has(url, made, s3_server, tmp_path):
    mirror = Mirror(url, tmp_path / "cache")
    assert stubs(mirror) == shards_of(made)
    assert metadata(mirror.folder) == metadata(made)
    assert remote_stores.tidy(tmp_path / "cache")
    for gone in ("a/c.0.0.0", "b/c.1.3.0"):
        s3_server.client().delete_object(Bucket=s3_server.bucket, Key=f"acts/{gone}")
    remote_stores.replace(s3_server, "acts/a/c.0.9.0", b"more")
    expected = (shards_of(made) | {"a/c.0.9.0"}) - {"a/c.0.0.0", "b/c.1.3.0"}
    assert stubs(Mirror(url, tmp_path / "cache")) == expected
    # And the other way round: what is not the bucket's goes.
    (mirror.folder / "a" / "c.7.7.7").touch()
    (mirror.folder / "a" / "c.0.1.0").unlink()
    assert stubs(Mirror(url, tmp_path / "cache")) == expected


def test_metadata_comes_again_only_where_its_tag_changed(url, made, s3_proxy, s3_server, tmp_path):
    first = Mirror(url, tmp_path / "cache")
    assert s3_proxy.n_requests("GET", "zarr.json") == len(metadata(made))
    s3_proxy.reset()
    Mirror(url, tmp_path / "cache")
    assert [asked.method for asked in s3_proxy.requests] == ["GET"]
    assert s3_proxy.n_requests(substring="list-type") == 1
    s3_proxy.reset()
    changed = (made / "a" / "zarr.json").read_bytes() + b"\n"
    remote_stores.replace(s3_server, "acts/a/zarr.json", changed)
    Mirror(url, tmp_path / "cache")
    assert (first.folder / "a" / "zarr.json").read_bytes() == changed
    assert s3_proxy.n_requests("GET", "zarr.json") == 1
    # What is missing here comes again, and what is not readable of what is known is forgotten.
    for damage in ("", "[1]", "null", "7", "{", '{"a": '):
        (first.folder / ".tags.json").write_text(damage)
        (first.folder / "b" / "zarr.json").unlink()
        Mirror(url, tmp_path / "cache")
        assert metadata(first.folder) == metadata(made) | {"a/zarr.json": changed}


def test_keys_that_are_no_stores_are_no_files(url, made, s3_server, tmp_path):
    strange = [
        "a/.c.0", ".hidden/zarr.json", "a/deep/c.0.0.0", "deep/er/zarr.json", "unknown/c.0.0.0", "a/other", "other",
        "a/c." + "n" * 300, "n" * 300 + "/zarr.json", "a/c.0\u2028", "statistics/.x", "a/c.0.0.0/below",
        "statistics/" + "/".join("abcdefghij"), "a/%2E%2E", "tokenizer/a/..%2F/b",
    ]  # fmt: skip
    for key in strange:
        remote_stores.replace(s3_server, f"acts/{key}", b"strange")
    # What stands for a folder, as some tools make, is none of its files.
    remote_stores.replace(s3_server, "acts/statistics/there", b"")
    remote_stores.replace(s3_server, "acts/statistics/there/file", b"file")
    before = set(tmp_path.rglob("*"))
    mirror = Mirror(url, tmp_path / "cache")
    assert stubs(mirror) == shards_of(made)
    found = metadata(mirror.folder)
    assert found.pop("statistics/there/file") == b"file"
    assert {key for key in found if key not in metadata(made)} <= {"unknown/zarr.json", "tokenizer/a/..%2F/b"}
    outside = [path for path in set(tmp_path.rglob("*")) - before if tmp_path / "cache" not in path.parents]
    assert outside == [tmp_path / "cache"]
    with pytest.warns(UserWarning, match="keys that no store has"):
        store = mmcache.open(url, cache_dir=tmp_path / "cache")
    with mmcache.open(made) as right:
        assert (store["a"].get_position(0, 3) == right["a"].get_position(0, 3)).all()


def test_no_store_no_bucket_and_a_damaged_root_say_so(url, made, s3_server, tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"no mmcache store there.*activations/other"):
        Mirror(s3_server.url("other"), tmp_path / "cache")
    with pytest.raises(BucketNotFoundError, match=r"no such bucket.*s3://nowhere/acts"):
        Mirror("s3://nowhere/acts", tmp_path / "cache")
    for cache_bytes in (0, -1):
        with pytest.raises(ArgumentError, match=f"cache_bytes is {cache_bytes}"):
            Mirror(url, tmp_path / "cache", cache_bytes)
    root = (made / "zarr.json").read_bytes()
    for damaged in (b"", b"{}", root[:-20], root.replace(b'"store"', b'"stare"'), b"[" * 100_000):
        remote_stores.replace(s3_server, "acts/zarr.json", damaged)
        with pytest.raises(CorruptError, match=f"{url}/zarr.json"):
            Mirror(url, tmp_path / "cache")
    remote_stores.replace(s3_server, "acts/zarr.json", root)
    assert metadata(Mirror(url, tmp_path / "cache").folder) == metadata(made)
    assert remote_stores.tidy(tmp_path / "cache")
    s3_server.client().delete_object(Bucket=s3_server.bucket, Key="acts/zarr.json")
    with pytest.raises(StoreNotFoundError):
        Mirror(url, tmp_path / "cache")


def test_a_root_that_changes_while_it_is_listed_is_listed_anew(url, made, s3_server, tmp_path, monkeypatch):
    root = replace(read_manifest(made), metadata={"now": "another"}).to_json()
    real = object_store.ObjectStore.read_tagged
    times = []

    def read_tagged(self, key, limit):
        times.extend([key] * (key == "zarr.json"))
        if key == "zarr.json" and len(times) == 1:
            remote_stores.replace(s3_server, "acts/a/c.0.9.0", b"new")
            remote_stores.replace(s3_server, "acts/zarr.json", root)
        return real(self, key, limit)

    monkeypatch.setattr(object_store.ObjectStore, "read_tagged", read_tagged)
    mirror = Mirror(url, tmp_path / "cache")
    assert len(times) == 2
    assert "a/c.0.9.0" in stubs(mirror)
    assert (mirror.folder / "zarr.json").read_bytes() == root


def test_threads_and_processes_that_look_at_once_see_the_same(url, made, tmp_path):
    code = """
import sys
from mmcache.storage.mirror import Mirror
for _ in range(5):
    mirror = Mirror(sys.argv[1], sys.argv[2])
print(sum(1 for _ in mirror.folder.rglob("c.*")), len(mirror.fetch_later(len, "abc").result() * "x"))
"""
    with ThreadPoolExecutor(4) as pool:
        processes = [pool.submit(python, code, url, tmp_path / "cache") for _ in range(2)]
        mirrors = list(pool.map(lambda _: Mirror(url, tmp_path / "cache"), range(6)))
    for process in processes:
        assert (process.result().stderr, process.result().stdout) == ("", f"{len(shards_of(made))} 3\n")
    assert all(stubs(mirror) == shards_of(made) for mirror in mirrors)
    assert metadata(mirrors[0].folder) == metadata(made)
    again = pickle.loads(pickle.dumps(mirrors[0]))  # noqa: S301 -- ours
    assert (again.folder, again.cache.folder) == (mirrors[0].folder, mirrors[0].cache.folder)
    assert remote_stores.tidy(tmp_path / "cache")


def test_a_shard_comes_once_for_all_who_want_it(url, made, s3_proxy, tmp_path):
    mirror, right = Mirror(url, tmp_path / "cache"), (made / "a" / KEY).read_bytes()
    s3_proxy.reset()
    assert mirror.find("a", KEY, checking(mirror)) is None
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: mirror.fetch("a", KEY, checking(mirror)), range(4)))
    assert files == {mirror.find("a", KEY, checking(mirror))}
    assert files.pop().read_bytes() == right
    parts = [asked for asked in s3_proxy.requests if asked.sent != HEADER_BYTES]
    assert sum(asked.sent for asked in parts) == len(right)
    s3_proxy.reset()
    mirror.fetch("a", KEY, checking(mirror))
    assert s3_proxy.requests == []
    with pytest.raises(IncompleteError, match=f"the bucket has no shard {url}/a/c.0.7.0"):
        mirror.fetch("a", "c.0.7.0", checking(mirror))
    with pytest.raises(ArgumentError, match="cache_bytes="):
        Mirror(url, tmp_path / "small", 4096).fetch("a", KEY, checking(mirror))
    assert remote_stores.tidy(tmp_path / "cache")


PARTS = (
    "header",
    "activations",
    "padding",
    "crc32c",
    "mean",
    "norms",
    "overflow",
    "statistics_crc32c",
    "fill",
    "index",
)


@pytest.mark.parametrize("part", [*PARTS, "shorter", "longer", "empty", "half"])
def test_what_is_damaged_does_not_come(part, url, made, s3_server, tmp_path):
    mirror, dice = Mirror(url, tmp_path / "cache"), random.Random(part)  # noqa: S311
    key = max(shards_of(made / "a"))  # a partly filled one
    right = (made / "a" / key).read_bytes()
    layout = checking(mirror, key=key)(right[:HEADER_BYTES], len(right))
    places = {name: (start, stop) for name, (_, _, start, stop) in layout.tensors.items()} | {"header": (8, 4096)}
    start, stop = places.get(layout.spec.tensor if part == "activations" else part, (0, 0))
    changes = {"shorter": right[:-1], "longer": right + b"\0", "empty": b"", "half": right[: len(right) // 2]}
    offsets = {start, stop - 1, dice.randrange(start, stop)} if stop else set()
    for data in [changes[part]] if part in changes else [flip(offset)(right) for offset in sorted(offsets)]:
        remote_stores.replace(s3_server, f"acts/a/{key}", data)
        check = partial(exactly, checking(mirror, key=key), right)
        with pytest.raises(CorruptError, match=key):
            mirror.fetch("a", key, check)
        assert left(mirror) == []
    remote_stores.replace(s3_server, f"acts/a/{key}", right)
    assert mirror.fetch("a", key, check).read_bytes() == right


def exactly(check, right, head, size):
    """Look at a header as a reader of the store does, who knows what it has to be."""
    if head != right[:HEADER_BYTES] or size != len(right):
        raise CorruptError(f"{json.loads(right[8:HEADER_BYTES])['__metadata__']['key']} is another one")
    return check(head, size)


def test_one_that_is_replaced_while_it_comes_is_noticed(url, made, s3_server, tmp_path, monkeypatch):
    mirror = Mirror(url, tmp_path / "cache")
    key = max(shards_of(made / "a"))
    check, right = checking(mirror, key=key), (made / "a" / key).read_bytes()
    layout = check(right[:HEADER_BYTES], len(right))
    # A longer one, as of a store that grew.
    rows = random_rows(Layout(layout.spec, layout.rows + 10))
    said = json.loads(right[8:HEADER_BYTES])["__metadata__"]
    for name, value in said.items():
        monkeypatch.setitem(METADATA, name, value)
    for name in METADATA.keys() - said.keys():
        monkeypatch.delitem(METADATA, name)
    grown, _ = encoded(Layout(layout.spec, len(rows)), rows)
    real, times = Mirror._download, []

    def download(self, array, key, layout, head, coming, draft):
        if not times:
            times.append(True)
            remote_stores.replace(s3_server, f"acts/a/{key}", grown)
            # What breaks off goes on with what is there then.
            begun, half = b"".join(coming), len(right) // 2
            coming = (memoryview(piece) for piece in (begun[:half], grown[half : len(right)]))
        return real(self, array, key, layout, head, coming, draft)

    monkeypatch.setattr(Mirror, "_download", download)
    assert mirror.fetch("a", key, check).read_bytes() == grown
    # Who finds that what is here is not what belongs there has it brought again, once.
    remote_stores.replace(s3_server, f"acts/a/{key}", right)
    seen = []

    def use(file):
        seen.append(file.read_bytes())
        if seen[-1] != right:
            raise CorruptError("not what belongs there")
        return "used"

    assert mirror.use("a", key, check, use) == "used"
    assert seen == [grown, right]
    remote_stores.replace(s3_server, f"acts/a/{key}", grown)
    mirror.drop("a", key)
    with pytest.raises(CorruptError):
        mirror.use("a", key, check, use)
    assert seen[2:] == [grown, grown]


def test_a_shard_that_comes_slowly_comes_in_parts(s3_server, s3_proxy, tmp_path, monkeypatch):
    made = remote_stores.make(tmp_path / "long", sites={"a": 512}, shard=2048, tokens=2048)
    url, right = remote_stores.upload(s3_server, made, "long"), (made / "a" / KEY).read_bytes()
    monkeypatch.setattr(mirror_module, "_PART_BYTES", 1 << 20)
    monkeypatch.setattr(mirror_module, "STREAMS", 3)
    for quick, parts in ((True, 1), (False, 4)):
        monkeypatch.setattr(ShardObjects, "quick", property(lambda _, said=quick: said, lambda *_: None), raising=False)
        mirror = Mirror(url, tmp_path / f"cache-{quick}")
        s3_proxy.reset()
        assert mirror.fetch("a", KEY, checking(mirror)).read_bytes() == right
        # Of the first request, what lies behind its part is left.
        assert s3_proxy.n_requests() == parts
    # Damage is found in whichever part it is.
    for at in (5000, len(right) // 2, len(right) - 9000):
        remote_stores.replace(s3_server, f"long/a/{KEY}", right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
        mirror = Mirror(url, tmp_path / f"cache-{at}")
        with pytest.raises(CorruptError, match="match"):
            mirror.fetch("a", KEY, checking(mirror))
        assert left(mirror) == []


def test_extents_and_pieces_are_the_objects_bytes(url, made, tmp_path):
    mirror, right = Mirror(url, tmp_path / "cache"), (made / "a" / KEY).read_bytes()
    for start, stop in ((0, 1), (4096, 4096 * 5), (5, len(right)), (len(right) - 1, len(right))):
        file = mirror.extent("a", KEY, start, stop)
        assert file.read_bytes()[:-CHECKSUM_BYTES] == right[start:stop]
        assert mirror.extent("a", KEY, start, stop) == file
        assert bytes(mirror.read("a", KEY, start, stop)) == b"".join(mirror.stream("a", KEY, start, stop))
    before = left(mirror)
    with pytest.raises(CorruptError, match=KEY):
        mirror.extent("a", KEY, 5, len(right) + 1)
    with pytest.raises(IncompleteError):
        mirror.extent("a", "c.0.7.0", 0, 5)
    assert left(mirror) == before
    with (made / "a" / KEY).open("rb") as file:
        # Whoever reads a shard sees no difference.
        ours = (FileBytes(os.dup(file.fileno()), len(right)), ObjectBytes(mirror, "a", KEY))
        for piece in ours:
            assert (piece.size, piece.head()) == (len(right), right[:HEADER_BYTES])
            piece.scattered()
            into = bytearray(100)
            assert piece.read(memoryview(into), 4090)
            assert into == right[4090:4190]
            assert piece.read(memoryview(into), len(right) - 100)
            assert not piece.read(memoryview(into), len(right) - 99)
            assert not piece.read(memoryview(into), len(right) + 50)
            assert piece.read(memoryview(b"").cast("B"), 0)
            piece.close()
    with pytest.raises(IncompleteError, match="no shard"):
        ObjectBytes(mirror, "a", "c.0.7.0")


def arrive(layout, data, size, piece, order):
    """Have a shard come in parts, each by the piece; give what is said to be wrong."""
    arriving = StreamCheck(layout, data[0][:HEADER_BYTES], size)
    spans = [(part.at, stop) for part, stop in arriving.parts]
    assert [start for start, _ in spans] + [layout.size] == [0, *(stop for _, stop in spans)]
    coming = list(arriving.parts)
    while coming:
        part, stop = coming[order.randrange(len(coming))]
        end = min(stop, part.at + piece)
        part.add(memoryview(data[1])[part.at : end])
        coming = [(part, stop) for part, stop in coming if part.at < stop]
    return arriving.problem()


@given(layouts(), st.integers(1, 50_000), st.integers(1, 20_000), st.randoms(use_true_random=False))
def test_what_arrives_in_any_parts_and_pieces_is_what_was_made(layout, size, piece, dice):
    data, _ = encoded(layout, random_rows(layout, dice.randrange(1000)))
    assert len(data) == layout.size
    assert arrive(layout, (data, data), size, max(piece, 50), dice) == ""
    at = dice.choice([dice.randrange(layout.size), dice.randrange(layout.data_end - HEADER_BYTES) + HEADER_BYTES])
    damaged = bytearray(data)
    damaged[at] ^= 1 << dice.randrange(8)
    assert arrive(layout, (data, bytes(damaged)), size, max(piece, 50), dice)
    for edge in (HEADER_BYTES - 1, layout.data_end, layout.chunks_end, layout.size - 1):
        if edge < layout.size:
            assert arrive(layout, (data, flip(edge)(data)), size, max(piece, 50), dice)
