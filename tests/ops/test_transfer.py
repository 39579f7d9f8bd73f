"""Stores that are copied to object storage and back: whole, in parts, gone on with, and never believed half-way."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr

import damaged_stores
import fake_s3
import mmcache
from mmcache.ops import copy_shards, endpoints
from mmcache.ops.transfer import blocks_of
from mmcache.read.tokens import Sequences
from mmcache.storage import mirror, object_store
from mmcache.storage.object_store import ObjectStore
from mmcache.system.atomic import AtomicFile
from mmcache.system.locks import FolderLock
from small_models import contents, identities
from stores_and_processes import damage, flip, python, raw, same, shards, threads_named, wait_for, without_sync

FOLDER, S3 = "folder", "s3"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    with fake_s3.serve_s3() as server:
        yield server


class Remote:
    """A prefix of its own, on either kind of storage, seen past mmcache."""

    def __init__(self, url, server=None, folder=None):
        self.url, self._server, self._folder = url, server, folder

    def objects(self):
        if self._server is None:
            return contents(self._folder) if self._folder.exists() else {}
        prefix = self.url.split("/", 3)[3] + "/"
        return {key.removeprefix(prefix): data for key, data in self._server.objects(prefix).items()}

    def change(self, key, change):
        self.write(key, change(self.objects()[key]))

    def write(self, key, data):
        if self._server is None:
            (self._folder / key).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / key).write_bytes(data)
        else:
            prefix = self.url.split("/", 3)[3]
            self._server.client().put_object(Bucket=self._server.bucket, Key=f"{prefix}/{key}", Body=data)

    def delete(self, *keys):
        ObjectStore(self.url).delete(keys)


@pytest.fixture(params=[FOLDER, S3])
def remote(request, tmp_path, monkeypatch):
    without_sync(monkeypatch)
    if request.param == FOLDER:
        yield Remote(f"file://{tmp_path}/remote", folder=tmp_path / "remote")
        return
    server = request.getfixturevalue("server")
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    yield Remote(server.url(f"{request.node.name}/acts"), server)
    server.clear()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Stores that no test changes."""
    made = {}
    for name, make in damaged_stores.MAKERS.items():
        made[name] = tmp_path_factory.mktemp("source") / "acts"
        make(made[name]).close()
    return made


@pytest.fixture
def planned(sources):
    return sources["planned, token"]


@pytest.fixture
def grown(tmp_path, monkeypatch):
    without_sync(monkeypatch)
    damaged_stores.grown(tmp_path / "grown").close()
    return tmp_path / "grown"


def assert_same(found, expected):
    # What an upload that was killed has left is no part of a store.
    found = {name: data for name, data in found.items() if not name.startswith(".uploads/")}
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("name", damaged_stores.MAKERS)
def test_a_store_comes_back_byte_for_byte(sources, name, remote, tmp_path):
    source, back = sources[name], tmp_path / "back"
    pushed = mmcache.push(source, remote.url)
    assert_same(remote.objects(), contents(source))
    assert (pushed.source, pushed.destination) == (str(source), remote.url)
    assert pushed.shards == len(list(source.glob("*/c.*")))
    assert pushed.bytes == sum(map(len, contents(source).values()))
    pulled = mmcache.pull(remote.url, back)
    assert_same(contents(back), contents(source))
    assert (pulled.shards, pulled.there, pulled.bytes, pulled.missing) == (pushed.shards, 0, pushed.bytes, 0)
    assert mmcache.verify(back).ok
    before = identities(back)
    for again in (mmcache.push(source, remote.url), mmcache.pull(remote.url, back)):
        assert (again.shards, again.there, again.bytes) == (0, pushed.shards, 0)
    assert identities(back) == before
    with mmcache.open(source) as ours:
        for site in ours.sites:
            data = zarr.open_array(str(back / site), mode="r")[:]
            for place, layer in enumerate(ours.layers):
                assert raw(data[place]) == raw(ours[site].get_layer(layer))


def test_a_store_without_rows_is_one(remote, tmp_path):
    mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2).close()
    mmcache.push(tmp_path / "acts", remote.url)
    mmcache.pull(remote.url, tmp_path / "back")
    assert_same(contents(tmp_path / "back"), contents(tmp_path / "acts"))
    mmcache.FullActivationCache.with_capacity(2, tmp_path / "cache").close()
    mmcache.push(tmp_path / "cache", f"{remote.url}-cache")
    mmcache.pull(f"{remote.url}-cache", tmp_path / "cache-back")
    assert_same(contents(tmp_path / "cache-back"), contents(tmp_path / "cache"))


def test_large_shards_go_in_parts(remote, tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 512}, n_layers=2, dtype="float32", shard_tokens=8192) as writer:
        writer.append(torch.arange(9000), {"a": torch.randn(2, 9000, 512)})
    seen = []
    mmcache.push(tmp_path / "acts", remote.url, progress=lambda *done: seen.append(done))
    assert_same(remote.objects(), contents(tmp_path / "acts"))
    assert len(seen) > 8
    assert seen[-1][0] == seen[-1][1] == sum(len(file.read_bytes()) for file in (tmp_path / "acts").glob("*/c.*"))
    seen.clear()
    mmcache.pull(remote.url, tmp_path / "back", progress=lambda *done: seen.append(done))
    assert len(seen) > 4
    assert seen[-1][0] == seen[-1][1]
    assert_same(contents(tmp_path / "back"), contents(tmp_path / "acts"))


def test_names_that_addresses_escape(remote, tmp_path):
    site = "model.layers.*.mlp:out %20#?ü"
    with mmcache.create(tmp_path / "acts", sites={site: 8}, n_layers=2) as writer:
        writer.append(torch.arange(40), {site: torch.randn(2, 40, 8)})
    mmcache.push(tmp_path / "acts", remote.url)
    mmcache.pull(remote.url, tmp_path / "back")
    assert_same(contents(tmp_path / "back"), contents(tmp_path / "acts"))


def test_only_what_belongs_to_the_store_is_copied(grown, remote):
    expected = contents(grown)
    (grown / ".set-aside").mkdir()
    for name in (".lock", ".set-aside/c.0.0.0.1", "a/.c.0.0.0.0123.tmp", "a/c.00.0.0", "a/c.0.9.0", "notes.txt"):
        (grown / name).write_text("litter")
    mmcache.push(grown, remote.url)
    assert_same(remote.objects(), expected)


def test_the_root_comes_last_in_both_directions(planned, remote, tmp_path, monkeypatch):
    order, put, publish = [], ObjectStore.put, AtomicFile.publish

    def noted_put(self, key, *data, **how):
        order.append(key)
        return put(self, key, *data, **how)

    def noted_publish(self, *size, **how):
        order.append(str(self.path.relative_to(tmp_path / "back")))
        return publish(self, *size, **how)

    monkeypatch.setattr(ObjectStore, "put", noted_put)
    monkeypatch.setattr(AtomicFile, "publish", noted_publish)
    for copy in (lambda: mmcache.push(planned, remote.url), lambda: mmcache.pull(remote.url, tmp_path / "back")):
        copy()
        assert sorted(order) == sorted(contents(planned))
        assert order[-1] == "zarr.json"
        order.clear()


# Parts.


def test_sites_are_a_store_of_their_own_and_others_join_them(planned, remote, tmp_path):
    mmcache.push(planned, remote.url, sites=["mlp_out"])
    objects = remote.objects()
    assert not [key for key in objects if "mlp_in" in key.split("/")]
    assert_same(objects | {"zarr.json": b""}, {key: objects.get(key) for key in objects} | {"zarr.json": b""})
    mmcache.pull(remote.url, tmp_path / "part")
    with mmcache.open(tmp_path / "part") as part, mmcache.open(planned) as whole:
        assert part.sites == ("mlp_out",)
        assert set(part.source["modules"]) == {"mlp_out"}
        assert same(part["mlp_out"].get_layer(1), whole["mlp_out"].get_layer(1))
    assert mmcache.verify(tmp_path / "part").ok
    assert mmcache.push(planned, remote.url, sites=["mlp_in"]).there == 3
    assert_same(remote.objects(), contents(planned))
    # What a part has is a store, and may go anywhere, and be gone on with.
    mmcache.pull(remote.url, tmp_path / "part", sites=["mlp_in"])
    assert_same(contents(tmp_path / "part"), contents(planned))
    mmcache.push(tmp_path / "part", f"{remote.url}-2", sites=["mlp_in"])
    mmcache.push(planned, f"{remote.url}-2", sites=["mlp_out"])
    mmcache.pull(f"{remote.url}-2", tmp_path / "round")
    assert_same(contents(tmp_path / "round"), contents(planned))


def test_extract_goes_on_with_a_part(remote, tmp_path):
    damaged_stores.extracted(tmp_path / "acts").close()
    lost = tmp_path / "acts" / "mlp_in" / "c.0.1.0"
    data = lost.read_bytes()
    lost.unlink()
    pushed = mmcache.push(tmp_path / "acts", remote.url, sites=["mlp_in"])
    assert pushed.missing == 1
    assert mmcache.pull(remote.url, tmp_path / "part").missing == 1
    with pytest.raises(mmcache.IncompleteError):
        mmcache.open(tmp_path / "part")
    damaged_stores.extracted(tmp_path / "part", sites=("mlp_in",)).close()
    assert (tmp_path / "part" / "mlp_in" / "c.0.1.0").read_bytes() == data
    assert mmcache.verify(tmp_path / "part").ok
    lost.write_bytes(data)
    assert (mmcache.push(tmp_path / "acts", remote.url, sites=["mlp_in"])).shards == 1
    assert "mlp_in/c.0.1.0" in remote.objects()


def test_sequences_bring_their_blocks_and_nothing_else(planned, remote, tmp_path):
    mmcache.push(planned, remote.url)
    back = tmp_path / "back"
    with mmcache.open(planned) as whole:
        spans, tokens = whole.sequences.numpy(), whole.tokens
        rows = whole["mlp_in"].gather(range(whole.n_tokens))
    wanted = range(3, 5)
    blocks = {b for n in wanted for b in range(spans[n, 0] // 64, (spans[n, 1] - 1) // 64 + 1)}
    assert 0 < len(blocks) < 5
    pulled = mmcache.pull(remote.url, back, sequences=(3, 5), sites=["mlp_in"])
    assert {int(file.name.split(".")[2]) for file in shards(back / "mlp_in")} == blocks
    assert (pulled.shards, pulled.missing) == (3 + len(blocks), 0)
    with pytest.raises(mmcache.IncompleteError):
        mmcache.open(back)
    with mmcache.open(back, partial=True) as part:
        assert same(part.tokens, tokens)
        assert same(part["mlp_in"].sequence(4), rows[spans[4, 0] : spans[4, 1]].transpose(0, 1).contiguous())
    more = mmcache.pull(remote.url, back, sequences=[0, -1, 4], sites=["mlp_in"])
    assert more.there >= 3 + 1
    mmcache.pull(remote.url, back)
    assert_same(contents(back), contents(planned))
    mmcache.push(planned, f"{remote.url}-part", sequences=slice(3, 5))
    found = Remote(f"{remote.url}-part", remote._server, tmp_path / "remote-part").objects()
    expected = {f"{site}/c.0.{block}.0" for site in ("mlp_in", "mlp_out") for block in blocks}
    assert {key for key in found if key.startswith("mlp") and "/c." in key} == expected
    assert found["zarr.json"] == (planned / "zarr.json").read_bytes()


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [
        ((0, 1), [0]),
        ([1], [0, 1, 2]),
        (slice(None), [0, 1, 2, 9]),
        (range(1, 3), [0, 1, 2]),
        ([3, 0, 0], [0, 9]),
        ([-1], [9]),
    ],
)
def test_which_blocks_sequences_lie_in(asked, blocks):
    sequences = Sequences(np.array([[0, 3, 0], [3, 25, 0], [25, 26, 1], [90, 99, 2]]))
    found = blocks_of(sequences, asked, 10)
    assert np.flatnonzero(found.of(np.arange(12))).tolist() == blocks
    assert found.count(10) == len(blocks)
    assert found.count(2) == len([block for block in blocks if block < 2])


@pytest.mark.parametrize(
    ("asked", "error"),
    [([4], IndexError), ([-5], IndexError), ((0, 10**15), IndexError), ([], ValueError), ((3, 1), ValueError),
     ([0.5], ValueError), ((1, 2, 3), ValueError)],
)  # fmt: skip
def test_sequences_that_are_not_there(asked, error):
    sequences = Sequences(np.array([[0, 3, 0], [3, 25, 0], [25, 26, 1], [90, 99, 2]]))
    with pytest.raises(error) as raised:
        blocks_of(sequences, asked, 10)
    assert isinstance(raised.value, mmcache.MmcacheError)


def test_arguments_that_make_no_sense(planned, tmp_path):
    url = f"file://{tmp_path}/remote"
    with pytest.raises(mmcache.UnknownSiteError, match="mlp_in, mlp_out"):
        mmcache.push(planned, url, sites=["nothing"])
    with pytest.raises(mmcache.ArgumentError, match="sites is empty"):
        mmcache.push(planned, url, sites=[])
    with pytest.raises(mmcache.ArgumentError, match="expected an address"):
        mmcache.push(planned, tmp_path / "elsewhere")
    with pytest.raises(mmcache.ArgumentError, match="is an address"):
        mmcache.push(url, url)
    with pytest.raises(mmcache.ArgumentError, match="is an address"):
        mmcache.pull(url, url)
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.push(tmp_path / "nothing", url)
    (tmp_path / "file").write_text("")
    with pytest.raises(mmcache.StoreExistsError, match="needs a folder"):
        mmcache.pull(url, tmp_path / "file")


# What grows.


def test_a_store_that_grew_is_brought_up_to_date(grown, remote, tmp_path):
    back = tmp_path / "back"
    mmcache.push(grown, remote.url)
    mmcache.pull(remote.url, back)
    for length in (10, 700):
        with mmcache.append(grown) as writer:
            for part, continues in ((length, False), (5, True)):
                rows = {"a": torch.randn(2, part, 8), "b": torch.randn(2, part, 4)}
                writer.append(torch.zeros(part, dtype=torch.int64), rows, continues=continues)
        assert mmcache.push(grown, remote.url).there < mmcache.push(grown, remote.url).there
        assert_same(remote.objects(), contents(grown))
        mmcache.pull(remote.url, back)
        assert_same(contents(back), contents(grown))
        assert mmcache.verify(back).ok


def test_a_cache_that_got_more_layers(remote, tmp_path):
    cache = mmcache.FullActivationCache.with_capacity(3, tmp_path / "acts", shard_tokens=256)
    for _ in range(3):
        cache.push(torch.randn(700, 16))
        cache.flush()
        mmcache.push(tmp_path / "acts", remote.url)
        mmcache.pull(remote.url, tmp_path / "back")
        assert mmcache.verify(tmp_path / "back").ok
    cache.close()
    assert_same(contents(tmp_path / "back"), contents(tmp_path / "acts"))


def test_what_did_not_count_there_is_replaced_and_what_counts_is_kept(grown, remote):
    """A push that was killed before the root, and then the store grew."""
    mmcache.push(grown, remote.url)
    remote.delete("zarr.json")
    with mmcache.append(grown) as writer:
        writer.append(torch.zeros(10, dtype=torch.int64), {"a": torch.randn(2, 10, 8), "b": torch.randn(2, 10, 4)})
    mmcache.push(grown, remote.url)
    assert_same(remote.objects(), contents(grown))


def test_a_block_that_is_there_grows_with_its_store_though_other_sequences_are_asked_for(grown, remote, tmp_path):
    back = tmp_path / "back"
    mmcache.push(grown, remote.url)
    mmcache.pull(remote.url, back, sequences=[2])
    assert {file.name for file in shards(back / "a")} == {"c.0.1.0", "c.0.2.0"}
    with mmcache.append(grown) as writer:
        writer.append(torch.zeros(400, dtype=torch.int64), {"a": torch.randn(2, 400, 8), "b": torch.randn(2, 400, 4)})
    mmcache.push(grown, remote.url)
    mmcache.pull(remote.url, back, sequences=[0])
    assert {file.name for file in shards(back / "a")} == {"c.0.0.0", "c.0.1.0", "c.0.2.0"}
    with mmcache.open(back, partial=True) as part, mmcache.open(grown) as whole:
        assert same(part["a"].sequence(2), whole["a"].sequence(2))
    assert {finding.kind for finding in mmcache.verify(back).findings} == {"missing"}


def test_one_root_counts_for_all_sites(grown, remote):
    mmcache.push(grown, remote.url)
    with mmcache.append(grown) as writer:
        writer.append(torch.zeros(10, dtype=torch.int64), {"a": torch.randn(2, 10, 8), "b": torch.randn(2, 10, 4)})
    before = remote.objects()
    with pytest.raises(mmcache.StoreExistsError, match="copy these sites too"):
        mmcache.push(grown, remote.url, sites=["a"])
    assert_same(remote.objects(), before)


def test_an_older_copy_does_not_replace_a_newer_one(grown, remote, tmp_path):
    mmcache.push(grown, remote.url)
    mmcache.pull(remote.url, tmp_path / "old")
    with mmcache.append(grown) as writer:
        writer.append(torch.zeros(10, dtype=torch.int64), {"a": torch.randn(2, 10, 8), "b": torch.randn(2, 10, 4)})
    mmcache.push(grown, remote.url)
    with pytest.raises(mmcache.StoreExistsError, match="n_tokens: 610 there, 600 here"):
        mmcache.push(tmp_path / "old", remote.url)


# What is in the way.


def test_another_store_is_refused_before_anything_is_written(sources, planned, remote, tmp_path):
    mmcache.push(planned, remote.url)
    before = remote.objects()
    damaged_stores.grown(tmp_path / "other").close()
    damaged_stores.extracted(tmp_path / "shorter", damaged_stores.TEXTS[:5]).close()
    for other, differs in ((tmp_path / "other", "store: "), (tmp_path / "shorter", "n_tokens: ")):
        with pytest.raises(mmcache.StoreExistsError, match=differs) as raised:
            mmcache.push(other, remote.url)
        assert raised.value.filename == remote.url
        mine = contents(other)
        with pytest.raises(mmcache.StoreExistsError, match=differs):
            mmcache.pull(remote.url, other)
        assert_same(contents(other), mine)
    with pytest.raises(mmcache.StoreExistsError, match="layout: 'token' there, 'layer' here"):
        mmcache.push(sources["planned, layer"], remote.url)
    assert_same(remote.objects(), before)


def test_a_root_that_cannot_be_read_is_not_overwritten(planned, remote, tmp_path):
    remote.write("zarr.json", b"{}")
    with pytest.raises(mmcache.StoreExistsError, match="cannot be read"):
        mmcache.push(planned, remote.url)
    assert remote.objects() == {"zarr.json": b"{}"}
    with pytest.raises(mmcache.CorruptError, match="no mmcache store's"):
        mmcache.pull(remote.url, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_shard_is_named_and_left(planned, grown, remote):
    """Half-copied stores that others left: no root says whose they are."""
    key = "mlp_in/c.0.0.0"
    foreign = (grown / "a" / "c.0.0.0").read_bytes()
    remote.write(key, foreign)
    with pytest.raises(mmcache.StoreExistsError, match="delete it, or push to another address") as raised:
        mmcache.push(planned, remote.url)
    assert raised.value.filename == f"{remote.url}/{key}"
    assert remote.objects() == {key: foreign}
    # The same plan, another run: one bit of the statistics differs.
    remote.change(key, lambda _: (planned / key).read_bytes())
    remote.change(key, flip(-3000))
    with pytest.raises(mmcache.StoreExistsError, match="another run's"):
        mmcache.push(planned, remote.url)


def test_a_shard_of_another_store_in_the_folder_is_left(planned, grown, remote, tmp_path):
    mmcache.push(planned, remote.url)
    mine = tmp_path / "back" / "mlp_in" / "c.0.0.0"
    mine.parent.mkdir(parents=True)
    mine.write_bytes((grown / "a" / "c.0.0.0").read_bytes())
    with pytest.raises(mmcache.StoreExistsError, match="another store's shard"):
        mmcache.pull(remote.url, tmp_path / "back")
    assert contents(tmp_path / "back") == {"mlp_in/c.0.0.0": mine.read_bytes()}


def test_damage_in_the_folder_is_replaced_on_the_way_back(planned, remote, tmp_path):
    mmcache.push(planned, remote.url)
    back = tmp_path / "back"
    mmcache.pull(remote.url, back)
    damage(back / "mlp_in" / "c.0.0.0", flip(100))  # header
    damage(back / "mlp_in" / "c.0.1.0", lambda data: data[:-4096])
    damage(back / "mlp_out" / "c.0.0.0", flip(-3000))  # statistics
    damage(back / "mlp_out" / "c.0.1.0", lambda _: b"")
    (back / "zarr.json").unlink()
    assert mmcache.pull(remote.url, back).shards == 4
    assert_same(contents(back), contents(planned))


def test_a_pull_waits_for_nobody(planned, remote, tmp_path):
    mmcache.push(planned, remote.url)
    (tmp_path / "back").mkdir()
    lock = FolderLock(tmp_path / "back")
    with pytest.raises(mmcache.LockedError):
        mmcache.pull(remote.url, tmp_path / "back")
    lock.release()
    mmcache.pull(remote.url, tmp_path / "back")


# What is damaged, missing, or does not fit.


@pytest.mark.parametrize("at", [100, 5000, -9000, -3])
def test_damage_does_not_travel(grown, remote, at):
    damage(grown / "a" / "c.0.1.0", flip(at))
    with pytest.raises(mmcache.CorruptError, match="mmcache verify") as raised:
        mmcache.push(grown, remote.url)
    assert str(grown / "a" / "c.0.1.0") in str(raised.value)
    assert "a/c.0.1.0" not in remote.objects()
    assert "zarr.json" not in remote.objects()


@pytest.mark.parametrize("key", ["tokens/c.0", "a/zarr.json", "tokens/zarr.json"])
def test_damage_of_other_files_does_not_travel(grown, remote, key):
    damage(grown / key, flip(60))
    with pytest.raises(mmcache.CorruptError, match=key):
        mmcache.push(grown, remote.url)
    assert "zarr.json" not in remote.objects()


def test_merged_statistics_and_the_tokenizer_are_checked(remote, tmp_path):
    store = damaged_stores.extracted(tmp_path / "acts")
    for key in ("statistics/mlp_in/dimensions/c/0/0/0", "tokenizer/tokenizer.json"):
        whole = (store.path / key).read_bytes()
        damage(store.path / key, flip(50))
        with pytest.raises(mmcache.CorruptError, match=r"damaged|not the tokenizer"):
            mmcache.push(store.path, remote.url)
        damage(store.path / key, lambda _, whole=whole: whole)
    mmcache.push(store.path, remote.url)
    for key in ("statistics/mlp_in/dimensions/c/0/0/0", "tokenizer/tokenizer.json", "mlp_in/zarr.json"):
        whole = remote.objects()[key]
        remote.change(key, flip(50))
        with pytest.raises(mmcache.CorruptError, match=re.escape(remote.url)):
            mmcache.pull(remote.url, tmp_path / "back")
        assert contents(tmp_path / "back") == {}
        remote.change(key, lambda _, whole=whole: whole)
    remote.delete("tokens/zarr.json")
    with pytest.raises(mmcache.CorruptError, match=r"tokens/zarr\.json is not there"):
        mmcache.pull(remote.url, tmp_path / "back")


def test_the_files_of_merged_statistics_are_all_of_them(planned):
    assert set(contents(planned / "statistics" / "mlp_in")) == set(endpoints.SUMMARY)


@pytest.mark.parametrize(
    ("change", "says"),
    [(flip(100), "header"), (flip(5000), "inner chunk 0"), (flip(-3000), "statistics"), (flip(-3), "index"),
     (lambda data: data[:-4096], "bytes"), (lambda data: data + bytes(4096), "bytes"), (lambda _: b"", "bytes"),
     (lambda data: data[:100], "bytes")],
)  # fmt: skip
def test_a_damaged_object_gets_no_name(planned, remote, tmp_path, change, says):
    mmcache.push(planned, remote.url)
    remote.change("mlp_in/c.0.1.0", change)
    with pytest.raises(mmcache.CorruptError, match=says) as raised:
        mmcache.pull(remote.url, tmp_path / "back")
    assert f"{remote.url}/mlp_in/c.0.1.0" in str(raised.value)
    found = contents(tmp_path / "back")
    assert "mlp_in/c.0.1.0" not in found
    assert "zarr.json" not in found
    assert not [name for name in found if name.endswith(".tmp")]


def test_what_was_damaged_on_the_way_is_fetched_once_more(planned, remote, tmp_path, monkeypatch):
    mmcache.push(planned, remote.url)
    whole, met = ObjectStore.whole, []

    def noisy(self, key):
        size, coming = whole(self, key)
        if not key.startswith("mlp") or key in met:
            return size, coming
        met.append(key)
        return size, (piece for piece in [memoryview(flip(5000)(b"".join(coming)))])

    monkeypatch.setattr(ObjectStore, "whole", noisy)
    pulled = mmcache.pull(remote.url, tmp_path / "back")
    assert len(met) == 10
    assert pulled.shards == 13
    assert_same(contents(tmp_path / "back"), contents(planned))


def test_what_became_shorter_on_the_way_is_fetched_once_more(planned, remote, tmp_path, monkeypatch):
    mmcache.push(planned, remote.url)
    whole, met = ObjectStore.whole, []

    def ending(key, coming):
        yield next(coming)[:5000]
        raise mmcache.CorruptError(f"{key} has 5000 bytes, more belong there")

    def shorter(self, key):
        size, coming = whole(self, key)
        if not key.startswith("mlp") or key in met:
            return size, coming
        met.append(key)
        return size, ending(key, coming)

    monkeypatch.setattr(ObjectStore, "whole", shorter)
    told = []
    pulled = mmcache.pull(remote.url, tmp_path / "back", progress=lambda *done: told.append(done))
    assert (len(met), pulled.shards) == (10, 13)
    assert told[-1][0] == told[-1][1]
    assert_same(contents(tmp_path / "back"), contents(planned))


def test_a_shard_of_other_tokens_gets_no_name(remote, tmp_path):
    """The same name, header and size; only `ids` tells that another corpus begins alike."""
    texts = [*damaged_stores.TEXTS[:5], *(text.upper() for text in damaged_stores.TEXTS[5:])]
    one, other = damaged_stores.extracted(tmp_path / "one"), damaged_stores.extracted(tmp_path / "other", texts)
    assert one.manifest.store == other.manifest.store
    mmcache.push(one.path, remote.url)
    key = "mlp_in/c.0.4.0"
    remote.change(key, lambda _: (other.path / key).read_bytes())
    with pytest.raises(mmcache.CorruptError, match="other tokens"):
        mmcache.pull(remote.url, tmp_path / "back")


def test_no_store_no_plan_and_what_cannot_be_done_without(planned, grown, remote, tmp_path):
    with pytest.raises(mmcache.StoreNotFoundError, match="no mmcache store there"):
        mmcache.pull(remote.url, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    mmcache.push(planned, remote.url)
    remote.delete("tokens/c.0")
    with pytest.raises(mmcache.IncompleteError, match="tokens"):
        mmcache.pull(remote.url, tmp_path / "back")
    assert not (tmp_path / "back" / "mlp_in").exists()
    remote.delete("sequences/c.0.0")
    with pytest.raises(mmcache.IncompleteError, match=r"sequences/c\.0\.0"):
        mmcache.pull(remote.url, tmp_path / "back", sequences=[1])
    (grown / "tokens" / "c.0").unlink()
    with pytest.raises(mmcache.IncompleteError, match="tokens"):
        mmcache.push(grown, f"{remote.url}-2")


def test_a_plan_that_is_not_done_is_no_store_to_copy(remote, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmcache.extraction.plan._published", interrupted)
    with pytest.raises(KeyboardInterrupt):
        damaged_stores.extracted(tmp_path / "acts")
    with pytest.raises(mmcache.IncompleteError, match="still being planned"):
        mmcache.push(tmp_path / "acts", remote.url)
    remote.write("zarr.json", (tmp_path / "acts" / "zarr.json").read_bytes())
    with pytest.raises(mmcache.IncompleteError, match="still being planned"):
        mmcache.pull(remote.url, tmp_path / "back")


def test_no_room(planned, remote, tmp_path, monkeypatch):
    mmcache.push(planned, remote.url)
    monkeypatch.setattr("mmcache.ops.transfer.free_bytes", lambda _: 1000)
    with pytest.raises(mmcache.DiskFullError, match=r"take \d+ bytes .* and 1000 .* are free"):
        mmcache.pull(remote.url, tmp_path / "back")
    assert contents(tmp_path / "back") == {}


# Interrupted.

_PUSH = "import sys, mmcache; mmcache.push(*sys.argv[1:])"
_PULL = "import sys, mmcache; mmcache.pull(*sys.argv[1:])"
_KILLED = """
import os, sys, threading, mmcache
from mmcache.{module} import {kind} as kind
carry, left = kind._carry, [int(sys.argv.pop())]
def die(self, shard):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
    return carry(self, shard)
kind._carry = die
"""


def test_killed_in_the_middle_it_goes_on(planned, remote, tmp_path):
    at = 8
    dying = _KILLED.format(module="ops.copy_shards", kind="Uploader") + _PUSH
    assert python(dying, planned, remote.url, at).returncode == -signal.SIGKILL
    assert "zarr.json" not in remote.objects()
    pushed = mmcache.push(planned, remote.url)
    assert pushed.shards + pushed.there == 13
    assert pushed.there >= at - 3
    assert_same(remote.objects(), contents(planned))
    back = tmp_path / "back"
    dying = _KILLED.format(module="ops.copy_shards", kind="Downloader") + _PULL
    assert python(dying, remote.url, back, at).returncode == -signal.SIGKILL
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.open(back)
    pulled = mmcache.pull(remote.url, back)
    assert pulled.there >= at - copy_shards.Downloader.copies
    assert_same(contents(back), contents(planned))


def test_an_interrupt_leaves_no_thread_no_draft_and_no_lock(planned, remote, tmp_path):
    def interrupt(done, _):
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mmcache.push(planned, remote.url, progress=interrupt)
    assert "zarr.json" not in remote.objects()
    mmcache.push(planned, remote.url)
    with pytest.raises(KeyboardInterrupt):
        mmcache.pull(remote.url, tmp_path / "back", progress=interrupt)
    assert not list((tmp_path / "back").rglob(".*"))
    mmcache.pull(remote.url, tmp_path / "back")
    assert_same(contents(tmp_path / "back"), contents(planned))
    wait_for(lambda: not threads_named("transfer"))


def test_a_failing_network_changes_nothing(planned, server, tmp_path, monkeypatch):
    without_sync(monkeypatch)
    rates = dict.fromkeys(("close", "cut_request", "cut_response", "short", "error_500", "slow_down", "lost"), 0.03)
    with fake_s3.FaultProxy(server.host, server.port, seed=1, rates=rates) as proxy:
        for name, value in server.env(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        url = server.url("failing/acts")
        mmcache.push(planned, url)
        mmcache.pull(url, tmp_path / "back")
        assert proxy.met().total() > 3
    assert_same(contents(tmp_path / "back"), contents(planned))
    server.clear()


def test_no_such_bucket_and_no_right(planned, server, tmp_path, monkeypatch):
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(mmcache.BucketNotFoundError, match="no such bucket"):
        mmcache.push(planned, "s3://nowhere/acts")
    with pytest.raises(mmcache.BucketNotFoundError, match="no such bucket"):
        mmcache.pull("s3://nowhere/acts", tmp_path / "back")


def test_import_mmcache_needs_no_object_storage():
    code = "import sys, mmcache, mmcache.ops.transfer; print('obstore' in sys.modules, 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_several_are_under_way_and_few_bytes_in_memory():
    assert 2 <= copy_shards.ShardCopier.copies <= 4
    assert 2 <= copy_shards.Downloader.copies <= 16
    # Two windows a stream, and the piece that is on its way into one.
    assert copy_shards.Downloader.copies * (2 * mirror._WINDOW + object_store._PIECE_BYTES) <= 160 * MIB
