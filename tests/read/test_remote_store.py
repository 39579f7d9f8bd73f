"""A store in a bucket is, for all who read it, the store that it is a copy of."""

import json
import pickle

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mmcache
import remote_stores
from damaged_stores import extracted
from mmcache.cli import main
from mmcache.storage import object_store
from mmcache.view.panels import Source
from page_requests import ask, serving
from stores_and_processes import FORKS, flip, forked, python, same, shards, widened, without_sync

MIB = 1 << 20
KINDS = {
    "float32, token": (torch.float32, "token"),
    "bfloat16, layer": (torch.bfloat16, "layer"),
    "bfloat16, token": (torch.bfloat16, "token"),
    "float32, layer": (torch.float32, "layer"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)
    monkeypatch.setattr(object_store, "PATIENCE", 5.0)


@pytest.fixture(scope="module", params=KINDS)
def local(request, tmp_path_factory):
    """A store of 32 MiB, or half of that in bfloat16, in shards of 1 MiB at most."""
    if request.param in list(KINDS)[2:] and not request.config.getoption("--slow"):
        pytest.skip("slow: run it with --slow")
    dtype, layout = KINDS[request.param]
    path, wide = tmp_path_factory.mktemp("local") / "acts", {"a": 1024, "b": 256}
    return remote_stores.make(path, layout=layout, dtype=dtype, tokens=1630, sites=wide, shard=64)


@pytest.fixture(scope="module")
def small_one(tmp_path_factory):
    """A store of 4.5 MiB."""
    return remote_stores.make(tmp_path_factory.mktemp("small") / "acts")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What `extract` makes, with a tokenizer and merged statistics."""
    path = tmp_path_factory.mktemp("planned") / "acts"
    extracted(path)
    return path


def test_all_that_is_read_through_a_small_cache_is_the_local_stores(local, s3_server, tmp_path):
    right, url = mmcache.open(local), remote_stores.upload(s3_server, local)
    cache = tmp_path / "cache" / "shards"
    with remote_stores.Watch(cache) as watch, mmcache.open(url, cache_bytes=4 * MIB) as found:
        assert (found.url, found.where, found.fits) == (url, url, False)
        remote_stores.compare(found, right, np.random.default_rng(0))
    assert watch.looks > 20
    assert MIB < watch.most <= 4 * MIB
    assert remote_stores.tidy(cache)


@pytest.mark.parametrize("shuffle", ["global", "block", None])
@pytest.mark.filterwarnings("ignore:.*larger cache_bytes:UserWarning")
def test_an_epoch_through_a_small_cache_is_the_local_stores(local, s3_server, tmp_path, shuffle, request):
    name = request.node.callspec.params["local"]
    if name in list(KINDS)[1:] and not request.config.getoption("--slow"):
        pytest.skip("slow: run it with --slow")
    right, url = mmcache.open(local), remote_stores.upload(s3_server, local)
    cache = tmp_path / "cache" / "shards"
    with remote_stores.Watch(cache) as watch, mmcache.open(url, cache_bytes=8 * MIB) as found:
        remote_stores.compare_epoch(found, right, shuffle=shuffle, batch_size=500, buffer_bytes=4 * MIB)
    assert watch.most <= 8 * MIB
    assert remote_stores.tidy(cache)


@pytest.mark.parametrize("kind", ["float32, token", "bfloat16, layer"])
def test_a_store_that_fits_is_brought_here_while_it_is_read(kind, s3_proxy, s3_server, tmp_path):
    dtype, layout = KINDS[kind]
    path = remote_stores.make(tmp_path / "acts", dtype=dtype, layout=layout)
    right, url = mmcache.open(path), remote_stores.upload(s3_server, path)
    with mmcache.open(url) as found:
        assert found.fits
        remote_stores.compare_epoch(found, right, shuffle="global")
        files = [(site, key) for site in right.sites for key in (file.name for file in shards(path / site))]
        remote_stores.wait_for(lambda: all(remote_stores.is_here(found, *file) for file in files))
        sent = s3_proxy.bytes_sent()
        remote_stores.compare_epoch(found, right, shuffle="block", buffer_bytes=MIB)
        assert s3_proxy.bytes_sent() == sent, "all of it is here"


def test_a_block_shuffle_moves_each_byte_once(local, s3_proxy, s3_server):
    right, url = mmcache.open(local), remote_stores.upload(s3_server, local)
    whole = sum(right.site_bytes(site) for site in right.sites)
    with mmcache.open(url, cache_bytes=whole // 2) as found:
        assert not found.fits
        s3_proxy.reset()
        remote_stores.compare_epoch(found, right, shuffle="block", batch_size=4, buffer_bytes=whole // 8)
    # Headers and the columns beside; what lies between two stretches that are wanted.
    assert s3_proxy.bytes_sent() < 1.15 * whole


def test_a_pool_that_has_no_room_is_said(small_one, s3_server):
    right, url = mmcache.open(small_one), remote_stores.upload(s3_server, small_one)
    told = pytest.warns(UserWarning, match="larger cache_bytes, or a")
    with mmcache.open(url, cache_bytes=2 * MIB) as found, told as warned:
        remote_stores.compare_epoch(found, right, shuffle="block", buffer_bytes=4 * MIB)
    # It points at the loop.
    assert {warning.filename for warning in warned} == {remote_stores.__file__}


def test_a_fresh_process_reads_it(request, s3_server, tmp_path):
    mib = widened(request, (32, 512))
    path = remote_stores.make(tmp_path / "acts", tokens=mib * 200, sites={"a": 1024}, dtype=torch.bfloat16)
    url = remote_stores.upload(s3_server, path)
    code = """
import sys, torch, numpy as np, mmcache
sys.path.insert(0, sys.argv[4])
import remote_stores
right, cache = mmcache.open(sys.argv[1]), int(sys.argv[3])
with mmcache.open(sys.argv[2], cache_bytes=cache) as found:
    remote_stores.compare(found, right, np.random.default_rng(0))
    remote_stores.compare_epoch(found, right, shuffle="global", batch_size=1024)
    assert found.remote.cache.used() <= cache
"""
    done = python(code, path, url, mib << 17, request.path.parents[1] / "helpers", timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_kind_of_store_opens(planned, s3_server, tmp_path):
    for path in (
        planned,
        remote_stores.make_cache(tmp_path / "cache-store"),
        remote_stores.make(tmp_path / "acts", tokens=10),
    ):
        right, url = mmcache.open(path), remote_stores.upload(s3_server, path, path.name)
        with mmcache.open(url) as found:
            for site in right.sites:
                assert same(found[site].gather(range(right.n_tokens)), right[site].gather(range(right.n_tokens)))
                assert same(found[site].statistics.mean, right[site].statistics.mean)
            assert same(found.tokens, right.tokens)
            assert found.tokenizer_json() == right.tokenizer_json()
            assert mmcache.open(f"file://{path}")[right.sites[0]].shape == right[right.sites[0]].shape


def test_a_partial_store_says_what_is_missing(small_one, s3_server):
    right = mmcache.open(small_one)
    url = remote_stores.upload(s3_server, small_one, but=lambda key: key == "a/c.0.1.0")
    with pytest.raises(mmcache.CorruptError, match="1 of 4 shards of a are gone"):
        mmcache.open(url)
    with mmcache.open(url, partial=True) as found:
        assert found.missing("a") == 1
        assert same(found["a"].get_position(0, 3), right["a"].get_position(0, 3))
        with pytest.raises(mmcache.IncompleteError, match=r"a/c\.0\.1\.0"):
            found["a"].get_position(0, 300)


def test_checked_reading_compares_each_chunk(small_one, s3_server):
    right, url = mmcache.open(small_one), remote_stores.upload(s3_server, small_one)
    with mmcache.open(url, check=True) as found:
        assert same(found["b"].gather([700, 3]), right["b"].gather([700, 3]))
    damaged = flip(4096 + 77)((small_one / "b" / "c.0.0.0").read_bytes())
    remote_stores.replace(s3_server, "acts/b/c.0.0.0", damaged)
    with mmcache.open(url, check=True) as found, pytest.raises(mmcache.CorruptError, match=r"acts/b/c\.0\.0\.0"):
        found["b"].get_position(0, 0)


@pytest.mark.parametrize("offset", [100, 4096 + 77, -5000, -30], ids=["header", "rows", "tail", "index"])
def test_verify_finds_what_is_wrong_in_the_bucket(offset, small_one, s3_server):
    url = remote_stores.upload(s3_server, small_one)
    assert mmcache.verify(url).ok
    assert mmcache.verify(url, "quick").ok
    with mmcache.open(url) as found:
        found["a"].read_ahead(0, found.n_tokens)  # what is here is not what is looked at
    remote_stores.replace(s3_server, "acts/a/c.0.0.0", flip(offset)((small_one / "a" / "c.0.0.0").read_bytes()))
    report = mmcache.verify(url)
    assert [finding.file for finding in report.findings] == ["a/c.0.0.0"]
    assert report.path == url
    assert mmcache.verify(url, "quick").ok == (offset in (4096 + 77, -5000))


def test_verify_does_not_take_a_server_that_is_down_for_a_damaged_store(small_one, s3_proxy, s3_server, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    url = remote_stores.upload(s3_server, small_one)
    s3_proxy.aim(substring="/a/c.")
    s3_proxy.set_rates(error_500=1.0)
    with pytest.raises(mmcache.RemoteError, match=r"acts/a/c\.0"):
        mmcache.verify(url)


def test_commands_take_addresses(planned, s3_server):
    url = remote_stores.upload(s3_server, planned)

    def told(*arguments):
        done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    here, there = json.loads(told("info", planned, "--json")), json.loads(told(url, "--json"))
    assert there.pop("path") == url
    assert {name: here[name] for name in there} == there
    for command in (
        ("stats", "--site", "mlp_in", "--json"), ("show", 1, 20, "--site", "mlp_out", "--json"), ("verify",),
        ("find", "number", "--json"), ("top", 1, 2, "--site", "mlp_in", "--json"),
    ):  # fmt: skip
        name, *rest = command
        assert told(name, url, *rest).replace(url, "X") == told(name, planned, *rest).replace(str(planned), "X")
    done = CliRunner().invoke(main, ["repair", url])
    assert done.exit_code == 2


def test_the_page_shows_it(planned, s3_server):
    with serving(Source(remote_stores.upload(s3_server, planned))) as page:
        assert json.loads(ask(page, "/overview.json").body)["data"]["n_tokens"] == mmcache.open(planned).n_tokens


def test_a_store_is_sent_to_another_process_by_its_address(small_one, s3_server):
    right, url = mmcache.open(small_one), remote_stores.upload(s3_server, small_one)
    with mmcache.open(url, cache_bytes=3 * MIB) as found:
        again = pickle.loads(pickle.dumps(found))  # noqa: S301 -- our own
        assert (again.url, again.remote.cache.most_bytes) == (url, 3 * MIB)
        assert same(again["a"].get_position(1, 5), right["a"].get_position(1, 5))


@FORKS
def test_a_fork_is_told_what_to_do(small_one, s3_server):
    with mmcache.open(remote_stores.upload(s3_server, small_one)) as found:

        def work():
            with pytest.raises(mmcache.RemoteError, match="multiprocessing_context='spawn'"):
                found["a"].get_position(0, 0)

        assert forked(work) == 0


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader_read_it(small_one, s3_server):
    right, url = mmcache.open(small_one), remote_stores.upload(s3_server, small_one)
    data = mmcache.ActivationDataset(mmcache.open(url), batch_size=64, drop=())
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    seen = []
    for batch in loader:
        assert same(batch["a"], right["a"].gather(batch.positions))
        seen += batch.positions.tolist()
    assert sorted(seen) == list(range(right.n_tokens))


def test_a_cache_for_a_folder_is_refused(small_one, tmp_path):
    with pytest.raises(mmcache.ArgumentError, match="is a folder, and needs no cache"):
        mmcache.open(small_one, cache_dir=tmp_path)
