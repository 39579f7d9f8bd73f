"""Extraction into a bucket of a real S3 server: killed, cut off, by several workers, it is the store of a folder."""

import os
import random
import re
import shutil
import signal

import pytest
import torch

import mmcache
from mmcache.errors import RemoteError
from mmcache.extraction import bucket_plan, bucket_upload, scheduling
from mmcache.extraction import runner as fill
from mmcache.extraction.bucket_upload import staging_folder
from mmcache.storage import connection, object_store
from stores_and_processes import ended_uploads, wait_for

pytest.importorskip("transformers")
pytest.importorskip("obstore")
small = pytest.importorskip("small_models")
kills = pytest.importorskip("killed_jobs")

TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(14)]
SETTINGS = {"sites": ("mlp_in", "mlp_out"), "context_length": 24, "batch_size": 3, "shard_tokens": 64}
# Shards of more than one part, the last one shorter.
LONG = ["abcdefgh " * 1400]
LARGE = {"sites": ("resid_post",), "context_length": 128, "dtype": torch.float64, "shard_tokens": 1 << 14, "pack": True}
both_layouts = pytest.mark.parametrize("layout", ["token", "layer"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, no syncs that nobody sees, and no second that nobody needs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module, name, value in (
        (fill, "_LOOK_AGAIN", 0.01), (scheduling, "_PATIENCE", 0.02),
        (connection, "_PAUSE", 0.01), (bucket_upload, "_LOOK_AT_UPLOADS", 0.01),
        (bucket_upload, "_AGAIN", 0.01), (bucket_plan, "_LIST_AGAIN", 0.1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    yield
    torch.set_num_threads(before)


def extract(path, texts=TEXTS, **changes):
    with ended_uploads():
        return mmcache.extract(small.llama(), small.byte_tokenizer(), texts, path, **SETTINGS | changes)


def fetched(server, prefix, folder):
    """Write the objects below a prefix to a folder; what an upload that was killed has left is no part of a store."""
    for key, data in server.objects(f"{prefix}/").items():
        name = key.removeprefix(f"{prefix}/")
        if not name.startswith(".uploads/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def keys(server, prefix="acts"):
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=f"{prefix}/")
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def shards(server):
    return [key for key in keys(server) if re.search("/(mlp_in|mlp_out|resid_post)/c\\.", key)]


@both_layouts
def test_the_bucket_has_the_objects_that_a_folder_has_as_files(s3_server, tmp_path, layout):
    extract(tmp_path / "local", layout=layout, max_tokens=500)
    extract(s3_server.url("acts"), layout=layout, max_tokens=500)
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "one"), tmp_path / "local")
    extract(tmp_path / "local", layout=layout)
    store = extract(s3_server.url("acts"), layout=layout, staging=tmp_path / "another")
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "two"), tmp_path / "local")
    assert torch.equal(
        store["mlp_out"].gather([5, 700, 3]), mmcache.open(tmp_path / "local")["mlp_out"].gather([5, 700, 3])
    )
    assert not s3_server.uploads()


def test_large_shards_go_in_parts_through_a_network_that_fails(request, s3_server, s3_proxy, tmp_path):
    extract(tmp_path / "local", LONG, **LARGE)
    for seed in range(12 if request.config.getoption("--slow") else 1):
        s3_proxy._seed, s3_proxy.hang_s = seed, 0.2
        s3_proxy.set_rates(
            close=0.05, cut_request=0.08, lost=0.05, error_500=0.05, slow_down=0.05, short=0.03, hang=0.02
        )
        extract(s3_server.url(f"large-{seed}"), LONG, **LARGE)
        s3_proxy.set_rates()
        assert {"cut_request", "lost"} & set(s3_proxy.met())
        small.assert_same_store(fetched(s3_server, f"large-{seed}", tmp_path / f"{seed}"), tmp_path / "local")
    assert not [key for key in keys(s3_server, "large-0") if "/.uploads/" in key]


@both_layouts
def test_faults_at_random_cost_nothing(s3_server, s3_proxy, tmp_path, layout):
    extract(tmp_path / "local", layout=layout)
    s3_proxy.hang_s = 0.2
    s3_proxy.set_rates(
        close=0.03, cut_response=0.03, cut_request=0.03, lost=0.03, error_500=0.03, slow_down=0.03, short=0.03
    )
    extract(s3_server.url("acts"), layout=layout, staging_bytes=1 << 18)
    s3_proxy.set_rates()
    assert len(s3_proxy.met()) >= 4
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), tmp_path / "local")


def test_a_server_that_is_gone_ends_the_job_which_goes_on_when_it_is_back(s3_server, s3_proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    url = s3_server.url("acts")

    def progress(at):
        if at.phase == "extract" and at.run_tokens > 300:
            s3_proxy.down()

    with pytest.raises(RemoteError, match=rf"{url}/mlp_\w+/c\.0\.\d+\.0: no whole answer") as failed:
        extract(url, progress=progress)
    staging = staging_folder(url, None)
    assert f"What was made and not sent is in {staging}; the same command goes on from there" in str(failed.value)
    assert [file for file in staging.glob("mlp_*/c.*") if file.stat().st_size]
    s3_proxy.up()
    monkeypatch.setattr(object_store, "PATIENCE", 60)
    extract(url)
    extract(tmp_path / "local")
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), tmp_path / "local")


# Below, real processes, which a server forks: its environment is that of the first test that asks for it.


@pytest.fixture(scope="module")
def runner(_s3_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _s3_process.env().items():
            patch.setenv(name, value)
        patch.setenv("MMCACHE_CACHE", str(folder / "cache"))
        made = kills.Runner(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def never(runner, tmp_path_factory):
    """A store in a folder, made without interruption, and how long a store in a bucket takes."""
    path = tmp_path_factory.mktemp("bucket") / "never"
    assert runner.run(path) == 0, runner.errors.read_text()
    return path


def test_killed_at_its_nth_write_again_and_again(s3_server, runner, never, tmp_path):
    # The writes of the plan, of shards, and of the empty files that take their place once they are sent.
    number = 0
    while True:
        number += 11
        code = runner.run(s3_server.url("acts"), writes=number, after=number % 2 == 0)
        if code == 0:
            break
        assert code == -signal.SIGKILL, runner.errors.read_text()
    assert number > 30
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), never)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_once_at_each_write(s3_server, runner, never, tmp_path, after):
    number = 0
    while True:
        number += 1
        prefix = f"acts-{number}"
        code = runner.run(s3_server.url(prefix), writes=number, after=after)
        if code == 0:
            break
        assert code == -signal.SIGKILL, runner.errors.read_text()
        assert runner.run(s3_server.url(prefix)) == 0, runner.errors.read_text()
        small.assert_same_store(fetched(s3_server, prefix, tmp_path / prefix), never)
        shutil.rmtree(tmp_path / prefix)
    assert number > 30


def test_growth_and_sites_killed_at_their_nth_write(request, s3_server, runner, tmp_path):
    steps = [["--max-tokens", "400"], ["--max-tokens", "900"], ["--max-tokens", "900", "--sites", "resid_post"]]
    slow = request.config.getoption("--slow")
    for step in steps:
        assert runner.run(tmp_path / "once", *step) == 0, runner.errors.read_text()
    for step in steps:
        for number in range(3, 400, 2 if slow else 47):
            code = runner.run(s3_server.url("acts"), *step, writes=number, after=number % 2 == 0)
            if code == 0:
                break
            assert code == -signal.SIGKILL, runner.errors.read_text()
        assert number > 3
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), tmp_path / "once")


def test_stopped_at_random_moments_it_says_where_the_rest_is(request, s3_server, runner, never, tmp_path):
    chance = random.Random(4)  # noqa: S311
    wanted = 100 if request.config.getoption("--slow") else 4
    url, stopped = s3_server.url("acts"), 0
    for number in range(wanted):
        how = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[number % 3]
        code, lived = runner.killed(url, how, chance.uniform(0.05, 1.2))
        assert lived < kills.SETTLED
        if code == 0:
            continue
        assert code == (-how if how == signal.SIGKILL else 128 + how), runner.errors.read_text()
        if how != signal.SIGKILL:
            stopped += 1
            staging = runner.folder / "cache" / "staging"
            said = f"What is finished is in {url}, what was not sent yet in {staging}/"
            assert said in runner.errors.read_text()
            assert "; run the same command to resume" in runner.errors.read_text()
    assert stopped
    assert runner.run(url) == 0, runner.errors.read_text()
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), never)


@pytest.mark.parametrize("folders", [["one", "one"], ["one", "two"]])
def test_two_workers_of_one_machine_or_of_two(s3_server, runner, never, tmp_path, folders):
    url = s3_server.url("acts")
    both = [runner.start(url, "--staging", str(tmp_path / name)) for name in folders]
    assert [runner.wait(pid) for pid in both] == [0, 0], runner.errors.read_text()
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), never)
    # Whoever leaves last takes everything along.
    for name in folders:
        left = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
        assert [file.name for file in left] == ["url"]


@pytest.mark.parametrize("folders", [["one", "one"], pytest.param(["one", "two"], marks=pytest.mark.slow)])
def test_one_of_two_workers_is_killed(s3_server, runner, never, tmp_path, folders):
    url = s3_server.url("acts")
    one, two = (["--staging", str(tmp_path / name), "--staging-bytes", str(1 << 17)] for name in folders)
    both = [runner.start(url, *one, hang=("shard", 4))]
    # In the middle, with shards that it holds, which the other one waits for.
    wait_for(lambda: len(shards(s3_server)) == 3, kills.HANGING)
    both.append(runner.start(url, *two))
    os.kill(both[0], signal.SIGKILL)
    assert [runner.wait(pid) for pid in both] == [-signal.SIGKILL, 0], runner.errors.read_text()
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), never)


def test_killed_in_the_middle_of_an_upload(s3_server, runner, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(LONG[0])
    options = ["--sites", "resid_post", "--dtype", "float64", "--context-length", "128"]

    options += ["--shard-tokens", str(1 << 14), "--pack", "--batch-size", "8"]
    assert run(runner, text, tmp_path / "local", options) == 0, runner.errors.read_text()
    url = s3_server.url("acts")
    runner.errors.write_text("")
    pid = start(runner, text, url, options, hang=("part", 2))
    wait_for(s3_server.uploads, kills.HANGING)
    os.kill(pid, signal.SIGKILL)
    assert runner.wait(pid) == -signal.SIGKILL
    assert not shards(s3_server)
    assert run(runner, text, url, options) == 0, runner.errors.read_text()
    small.assert_same_store(fetched(s3_server, "acts", tmp_path / "fetched"), tmp_path / "local")


def start(runner, text, path, options, **how):
    arguments = ["extract", str(runner.folder / "model"), str(text), "--out", str(path), *options]
    return runner.start_job(arguments, **how)


def run(runner, text, path, options):
    return runner.wait(start(runner, text, path, options))
