"""A store made for a bucket, in a folder of this machine: bounded, resumed, refused, shared. The bucket is a folder."""

import contextlib
import itertools
import json
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mmcache
from mmcache import cli
from mmcache.cli import extract as extraction
from mmcache.errors import (
    ArgumentError,
    CorruptError,
    DiskFullError,
    LockedError,
    PlanMismatchError,
    ReadOnlyError,
    RemoteError,
    StoreExistsError,
    WriteError,
)
from mmcache.extraction import bucket_plan, bucket_upload, runner, scheduling, staging_claims
from mmcache.extraction.bucket_plan import BucketFolder
from mmcache.extraction.bucket_upload import staging_folder
from mmcache.extraction.job import Extraction
from mmcache.extraction.staging_claims import STAGING, Claims, claimed
from mmcache.format.manifest import read_manifest
from mmcache.format.signed_json import ROOT
from mmcache.storage import object_store
from mmcache.storage.object_store import ObjectStore
from mmcache.system.atomic import publish
from mmcache.system.files import list_names
from mmcache.system.launcher import Rank
from stores_and_processes import ended_uploads

pytest.importorskip("transformers")
pytest.importorskip("obstore")
small = pytest.importorskip("small_models")

TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(14)]
SETTINGS = {"sites": ("mlp_in", "mlp_out"), "context_length": 24, "batch_size": 3, "shard_tokens": 64}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Nothing here could see a sync, and nobody should wait for a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MMCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module, name, value in (
        (runner, "_LOOK_AGAIN", 0.01), (scheduling, "_PATIENCE", 0.02),
        (object_store, "PATIENCE", 0.4), (bucket_upload, "_LOOK_AT_UPLOADS", 0.01),
        (bucket_upload, "_AGAIN", 0.01), (bucket_plan, "_LIST_AGAIN", 0.05), (bucket_plan, "_SHARE", 0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def there(tmp_path):
    """The bucket, as a folder."""
    return tmp_path / "bucket"


@pytest.fixture
def url(there):
    return f"file://{there}"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The store that one process makes in a folder, of each layout."""
    folder, before = tmp_path_factory.mktemp("local"), torch.get_num_threads()
    torch.set_num_threads(1)
    for layout in ("token", "layer"):
        extract(folder / layout, layout=layout)
    torch.set_num_threads(before)
    return folder


def extract(path, texts=TEXTS, **changes):
    with ended_uploads():
        return mmcache.extract(small.llama(), small.byte_tokenizer(), texts, path, **SETTINGS | changes)


def shards(folder):
    """The shards of sites below a folder, by name, with their bytes."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.glob("*/c.*.0"))
        if file.name.count(".") == 3
    }


class Stopping:
    """Hears of the progress, and ends the job after so many batches."""

    class Error(Exception):
        pass

    def __init__(self, batches):
        self.left = batches

    def __call__(self, at):
        self.left -= at.phase == "extract"
        if not self.left:
            raise self.Error


def interrupted(path, batches, **changes):
    with pytest.raises(Stopping.Error):
        extract(path, progress=Stopping(batches), **changes)


def no_uploads(monkeypatch):
    """Let nothing be sent but the plan, as when the network is slow."""
    monkeypatch.setattr(
        ObjectStore, "upload", lambda _, __, ___, alive: time.sleep(0.05) or alive() or no_upload(alive)
    )


def no_upload(alive):
    while True:
        time.sleep(0.01)
        alive()


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_the_bucket_has_what_a_folder_has_and_nothing_is_left_here(there, url, local, tmp_path, layout):
    phases = []
    store = extract(url, layout=layout, progress=lambda at: phases.append(at.phase))
    small.assert_same_store(there, local / layout)
    assert store.where == url
    kept = mmcache.open(local / layout)
    assert torch.equal(store["mlp_in"][1, 0:70], kept["mlp_in"][1, 0:70])
    assert torch.equal(store["mlp_in"].statistics.mean, kept["mlp_in"].statistics.mean)
    staging = staging_folder(url, None)
    assert staging.is_relative_to(tmp_path / "cache" / "staging")
    assert [file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file()] == [".staging/url"]
    assert set(phases) <= {"tokenise", "extract", "upload"}
    # It finds the plan again in the bucket, and has nothing to do.
    before = small.identities(there)
    batches = []
    extract(url, layout=layout, progress=batches.append)
    assert small.identities(there) == before
    assert [at.phase for at in batches if at.phase == "extract"] == []


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_it_goes_on_from_what_is_in_the_bucket_and_what_is_here(there, url, local, tmp_path, layout, monkeypatch):
    with monkeypatch.context() as patch:
        no_uploads(patch)
        interrupted(url, 5, layout=layout, staging_bytes=1 << 24)
    staging = staging_folder(url, None)
    staged = {name for name, size in shards(staging).items() if size}
    assert staged
    assert not shards(there)
    interrupted(url, 4, layout=layout)
    sent, before = shards(there), small.identities(there)
    assert staged <= set(sent)
    assert len(sent) < len(shards(local / layout))
    # Neither what is there nor what is here is made again.
    made = []
    extract(url, layout=layout, progress=lambda at: made.append(at.run_tokens))
    after = small.identities(there)
    assert {name: after[name] for name in sent} == {name: before[name] for name in sent}
    assert made[-1] < 840 - 64
    small.assert_same_store(there, local / layout)
    # On another machine nothing is here.
    for name in list(shards(there))[3:]:
        (there / name).unlink()
    shutil.rmtree(there / "statistics")
    extract(url, layout=layout, staging=tmp_path / "another")
    small.assert_same_store(there, local / layout)


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_a_store_grows_and_is_given_sites(there, url, tmp_path, layout):
    for path in (url, tmp_path / "local"):
        extract(path, max_tokens=400, layout=layout)
        extract(path, max_tokens=700, layout=layout)
        extract(path, layout=layout, sites=("resid_post",), max_tokens=700)
    small.assert_same_store(there, tmp_path / "local")


def test_killed_while_it_grows_it_grows_again(there, url, tmp_path, monkeypatch):
    extract(tmp_path / "local", max_tokens=400)
    extract(tmp_path / "local")
    extract(url, max_tokens=400)
    root, sent = (there / ROOT).read_bytes(), shards(there)

    def dies(*_, **__):
        raise Stopping.Error

    # Before anything is sent; behind the shards that were dropped; and before the root.
    for name in ("delete", "put"):
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, name, dies)
            with pytest.raises(Stopping.Error):
                extract(url)
        assert (there / ROOT).read_bytes() == root
    assert 0 < len(shards(there)) < len(sent)
    put = ObjectStore.put
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", lambda of, key, *a, **k: dies() if key == ROOT else put(of, key, *a, **k))
        with pytest.raises(Stopping.Error):
            extract(url)
    assert (there / ROOT).read_bytes() == root
    extract(url)
    small.assert_same_store(there, tmp_path / "local")


def test_other_settings_are_refused_and_name_the_address(there, url, tmp_path):
    extract(url)
    before = small.identities(there)
    with pytest.raises(PlanMismatchError, match=rf"^{re.escape(url)} was planned with another identity") as refused:
        extract(url, dtype=torch.float32)
    assert str(tmp_path / "cache") not in str(refused.value)
    with pytest.raises(PlanMismatchError, match="another corpus"):
        extract(url, texts=["something else"] * 14)
    with pytest.raises(PlanMismatchError, match="batch_size"):
        extract(url, batch_size=2)
    assert small.identities(there) == before
    extract(url, batch_size=2, accept_numerics=True)
    assert [accepted["batch_size"] for accepted in mmcache.open(url).source["accepted"]] == [2]


def test_what_is_in_the_way_in_the_bucket_is_refused(there, url, local, tmp_path):
    (there / "mlp_in").mkdir(parents=True)
    (there / "mlp_in" / "notes.txt").write_text("mine")
    with pytest.raises(StoreExistsError, match=r"mlp_in/notes\.txt is in its way"):
        extract(url)
    assert list(small.contents(there)) == ["mlp_in/notes.txt"]
    shutil.rmtree(there)
    # What another machine, killed before it sent the root, has left is the same and no matter.
    shutil.copytree(local / "token" / "tokens", there / "tokens")
    extract(url)
    small.assert_same_store(there, local / "token")
    (there / "resid_post").mkdir()
    (there / "resid_post" / "c.0.0.0").write_text("mine")
    with pytest.raises(PlanMismatchError, match=r"resid_post/c\.0\.0\.0 is in the way of resid_post"):
        extract(url, sites=("resid_post",))
    shutil.rmtree(there)
    shutil.copytree(local / "token" / "tokens", there / "tokens")
    with pytest.raises(StoreExistsError, match=r"tokens/.* is in the way of a new store"):
        extract(url, texts=TEXTS[1:])
    writer = mmcache.create(tmp_path / "grown", sites={"mlp_in": 4}, n_layers=1)
    writer.append(torch.zeros(1, 2, dtype=torch.int64), {"mlp_in": torch.zeros(1, 1, 2, 4)})
    writer.close()
    with pytest.raises(ReadOnlyError, match="not made by extract"):
        extract(f"file://{tmp_path / 'grown'}")


def test_a_shard_of_another_size_is_no_shard(there, url):
    extract(url)
    name = list(shards(there))[2]
    (there / name).chmod(0o644)
    (there / name).write_bytes((there / name).read_bytes()[:-4096])
    with pytest.raises(CorruptError, match=rf"{name} has \d+ bytes, and the shard that belongs there \d+"):
        extract(url)


def test_a_folder_of_something_else_is_refused(there, url, tmp_path):
    extract(tmp_path / "plain", max_tokens=100)
    before = small.identities(tmp_path / "plain")
    with pytest.raises(StoreExistsError, match="this holds something else"):
        extract(url, staging=tmp_path / "plain")
    assert small.identities(tmp_path / "plain") == before
    extract(url, staging=tmp_path / "theirs")
    with pytest.raises(StoreExistsError, match=rf"staging folder of {re.escape(url)}, not of {re.escape(url)}-2"):
        extract(f"{url}-2", staging=tmp_path / "theirs")
    with pytest.raises(ArgumentError, match="staging is for a store in a bucket"):
        extract(tmp_path / "folder", staging=tmp_path / "theirs")
    assert there.exists()


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_what_waits_is_bounded(there, url, local, layout, monkeypatch):
    block = sum(size for name, size in shards(local / layout).items() if name.split(".")[-2] == "0")
    staging, most, ended = staging_folder(url, None), [], threading.Event()
    upload = ObjectStore.upload
    monkeypatch.setattr(ObjectStore, "upload", lambda *of, **how: time.sleep(0.01) or upload(*of, **how))

    def watch():
        while not ended.is_set():
            taken = 0
            # Files come and go meanwhile, and in the end the folders.
            for site in ("mlp_in", "mlp_out"):
                for name in list_names(staging / site):
                    with contextlib.suppress(FileNotFoundError):
                        taken += (staging / site / name).stat().st_size * ("c." in name)
            most.append(taken)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        extract(url, layout=layout, staging_bytes=2 * block)
    finally:
        ended.set()
        watching.join()
    assert block <= max(most) <= 2 * block
    small.assert_same_store(there, local / layout)


def test_less_than_a_block_is_refused(url, local):
    block = sum(size for name, size in shards(local / "token").items() if name.split(".")[-2] == "0")
    with pytest.raises(ArgumentError, match=rf"staging_bytes is {block - 1}, and one block of this job takes {block}"):
        extract(url, staging_bytes=block - 1)
    with pytest.raises(ArgumentError, match="staging_bytes is 0"):
        extract(url, staging_bytes=0)
    extract(url, staging_bytes=block)


def test_a_full_disk_names_the_numbers_and_only_the_bound_has_to_fit(there, url, local, monkeypatch):
    block = sum(size for name, size in shards(local / "token").items() if name.split(".")[-2] == "0")
    total = sum(shards(local / "token").values())
    for free, asked, needed in ((block * 2 - 1, None, block * 2), (total - 1, total, total)):
        monkeypatch.setattr(bucket_upload, "free_bytes", lambda _, free=free: free)
        with pytest.raises(DiskFullError, match=rf"take {needed} bytes there, and {free} are free") as full:
            extract(url, staging_bytes=asked)
        assert full.value.filename == str(staging_folder(url, None))
    monkeypatch.setattr(bucket_upload, "free_bytes", lambda _: 2 * block)
    monkeypatch.setattr("mmcache.extraction.missing_shards.free_bytes", lambda _: 2 * block)
    extract(f"{url}-2", max_tokens=400)
    extract(f"{url}-2")
    assert len(shards(there.with_name("bucket-2"))) == len(shards(local / "token"))


def test_a_failure_is_told_and_nothing_is_lost(there, url, local, monkeypatch):
    upload, calls, ends, four = ObjectStore.upload, itertools.count(1), itertools.count(1), threading.Event()

    def fails(of, key, *rest):
        # By several threads: what comes behind the first four fails once those have ended.
        if next(calls) > 4:
            assert four.wait(30)
            raise RemoteError(f"{of.where(key)}: no whole answer for 1 s")
        made = upload(of, key, *rest)
        if next(ends) == 4:
            four.set()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "upload", fails)
        with pytest.raises(RemoteError, match=rf"mlp_.*no whole answer.*not sent is in .*{STAGING[1:]}.*goes on"):
            extract(url)
    assert len(shards(there)) == 4
    staged = [name for name, size in shards(staging_folder(url, None)).items() if size]
    assert staged
    extract(url)
    small.assert_same_store(there, local / "token")


def test_what_fails_on_this_machine_is_no_fault_of_the_network(url, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error", "somewhere")

    monkeypatch.setattr(ObjectStore, "upload", fails)
    with pytest.raises(WriteError, match=r"Input/output error\. What was made and not sent is in"):
        extract(url)


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_damaged_file_that_was_left_here_is_made_again(there, url, local, monkeypatch, damage):
    with monkeypatch.context() as patch:
        no_uploads(patch)
        interrupted(url, 6)
    staging = staging_folder(url, None)
    name = next(name for name, size in shards(staging).items() if size)
    data = bytearray((staging / name).read_bytes())
    data[5000] ^= 1
    (staging / name).chmod(0o644)
    (staging / name).write_bytes(data if damage == "flipped" else data[:5000])
    extract(url)
    small.assert_same_store(there, local / "token")


def test_what_a_neighbour_left_when_it_died_is_sent_or_made_again(there, url, local, monkeypatch):
    # It dies behind this one's beginning: what it has made counts as made, until all else is done.
    names = list(shards(local / "token"))[-4:]
    staging, placed = staging_folder(url, None), []

    def progress(at):
        if at.phase == "extract" and not placed:
            for name in names:
                shutil.copy2(local / "token" / name, staging / name)
                placed.append(name)
            (staging / names[-1]).chmod(0o644)
            with (staging / names[-1]).open("r+b") as file:
                file.seek(6000)
                file.write(b"damage")

    made = []
    extract(url, progress=lambda at: progress(at) or made.append(at.run_tokens))
    assert placed
    small.assert_same_store(there, local / "token")
    monkeypatch.setattr(ObjectStore, "upload", lambda *_: pytest.fail("nothing is left to be sent"))
    extract(url)


def test_what_a_living_neighbour_makes_is_waited_for_and_does_not_grow(there, url, local):
    interrupted(url, 3, max_tokens=700)
    staging = staging_folder(url, None)
    extract(url, max_tokens=700)
    neighbour = Claims(staging)
    name = list(shards(there))[1]
    assert neighbour.claim({name: 10}, lambda _: 100)
    with pytest.raises(LockedError, match=f"other processes are making shards of this store .{name}"):
        extract(url)
    # The bucket is as it was.
    extract(url, max_tokens=700)
    neighbour.leave()
    extract(url)
    assert set(shards(there)) == set(shards(local / "token"))


def test_an_emptied_bucket_is_begun_anew_with_whatever_settings(there, url, tmp_path):
    interrupted(url, 6)
    shutil.rmtree(there)
    extract(url, dtype=torch.float32)
    extract(tmp_path / "local", dtype=torch.float32)
    small.assert_same_store(there, tmp_path / "local")


def test_a_plan_that_was_not_sent_goes_on(there, url, local, monkeypatch):
    def dies(*_, **__):
        raise Stopping.Error

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", dies)
        with pytest.raises(Stopping.Error):
            extract(url)
    assert read_manifest(staging_folder(url, None)).n_tokens
    extract(url)
    small.assert_same_store(there, local / "token")


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:-1]])
def test_of_two_machines_that_plan_at_once_one_is_heeded(there, url, local, texts, monkeypatch):
    put = ObjectStore.put

    def late(of, key, data, *alive, replace=True):
        if key == ROOT and not (there / ROOT).exists():
            shutil.copy2(local / "token" / ROOT, there / ROOT)
        return put(of, key, data, *alive, replace=replace)

    monkeypatch.setattr(ObjectStore, "put", late)
    # Texts that can be read once only.
    if texts is TEXTS:
        extract(url, texts=iter(texts))
        small.assert_same_store(there, local / "token")
    else:
        with pytest.raises((PlanMismatchError, StoreExistsError)):
            extract(url, texts=iter(texts))


def test_what_another_machine_sends_meanwhile_is_not_made(there, url, local):
    made, placed = [], []

    def progress(at):
        made.append(at.run_tokens)
        if at.phase == "extract" and not placed:
            placed.extend(list(shards(local / "token")))
            for name in placed:
                (there / name).parent.mkdir(exist_ok=True)
                if not (there / name).exists():
                    shutil.copy2(local / "token" / name, there / name)
            time.sleep(0.1)

    extract(url, progress=progress)
    assert made[-1] < 400
    small.assert_same_store(there, local / "token")


def test_a_plan_that_another_machine_changes_ends_the_job(there, url, local):
    def progress(at):
        if at.phase == "extract":
            publish(there, ROOT, (local / "token" / ROOT).read_bytes())
            time.sleep(0.1)

    with pytest.raises(PlanMismatchError, match="was given another plan while it was filled"):
        extract(url, max_tokens=400, progress=progress)


def test_stubs_follow_the_bucket(there, url, local):
    shutil.copytree(local / "token", there)
    folder = BucketFolder(ObjectStore(url), staging_folder(url, None))
    folder.mark(("mlp_in", "mlp_out"))
    assert folder.fetch(("mlp_in", "mlp_out")) == []
    manifest = read_manifest(folder.folder)
    assert shards(folder.folder) == dict.fromkeys(shards(there), 0)
    gone = list(shards(there))[4]
    (there / gone).unlink()
    time.sleep(0.15)
    folder._next = 0
    folder.refresh(manifest)
    assert set(shards(folder.folder)) == set(shards(there))
    # What is here itself is nobody's to remove, nor is what was sent since the listing began.
    shutil.copy2(local / "token" / gone, folder.folder / gone)
    folder._next = 0
    folder.refresh(manifest)
    assert folder.unsent(manifest) == {gone: (local / "token" / gone).stat().st_size}
    (folder.folder / gone).unlink()
    (folder.folder / gone).touch()
    folder._next = 0
    folder.refresh(manifest)
    assert gone in shards(folder.folder)
    folder._next = time.monotonic() + 100
    shutil.rmtree(there)
    folder.refresh(manifest)
    folder._next = 0
    with pytest.raises(PlanMismatchError, match="or was removed"):
        folder.refresh(manifest)


def test_claims_are_of_the_living(tmp_path):
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / staging_claims.MARKER).write_text("file:///somewhere")
    one, two = Claims(tmp_path), Claims(tmp_path)
    seen = []
    assert one.claim({"a/c.0.0.0": 60}, lambda processes: seen.append(processes) or 100)
    assert not two.claim({"a/c.0.1.0": 50}, lambda processes: seen.append(processes) or 100)
    assert two.claim({"a/c.0.1.0": 40}, lambda _: 100)
    assert seen == [2, 2]
    assert sorted(claimed(tmp_path)) == ["a/c.0.0.0", "a/c.0.1.0"]
    assert two.adopt({"a/c.0.0.0": 60, "a/c.0.1.0": 40, "a/c.0.2.0": 7}) == ["a/c.0.2.0"]
    one.release(["a/c.0.0.0", "never"])
    assert two.adopt({"a/c.0.0.0": 60}) == ["a/c.0.0.0"]
    last = []
    # As when its process ends: the lock goes, the file stays.
    os.close(one._fd)
    two.leave(lambda: last.append("two"))
    two.leave(lambda: last.append("again"))
    assert last == ["two"]
    assert claimed(tmp_path) == []
    assert claimed(tmp_path / "elsewhere") == []
    assert [file.name for file in (tmp_path / STAGING).iterdir()] == [staging_claims.MARKER]


def test_a_server_that_is_gone_holds_up_nobody_who_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 60)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "c.0.0.0").write_bytes(b"data")
    sending = bucket_upload.UploadQueue(ObjectStore("s3://nowhere/acts"), tmp_path, Claims(tmp_path))
    sending.send("c.0.0.0")
    time.sleep(0.2)
    sending.stop()
    began = time.monotonic()
    sending.wait()
    assert time.monotonic() - began < 30
    assert (tmp_path / "c.0.0.0").read_bytes() == b"data"


def test_the_batch_size_and_threads_of_the_bucket_are_heeded(url, tmp_path):
    extract(url, batch_size=5)
    job = Extraction(
        small.llama(), small.byte_tokenizer(), url, staging=tmp_path / "new", **SETTINGS | {"batch_size": "auto"}
    )
    assert job._batch_size == 5
    assert not (tmp_path / "new").exists()
    assert bucket_upload.planned_in_bucket(url, None).source["numerics"]["threads"] == 1
    assert bucket_upload.planned_in_bucket(str(tmp_path), None) is None


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a text of some length, " * 40)
    monkeypatch.setattr(extraction, "find_rank", Rank)

    def run(*options):
        arguments = ["extract", "demo", str(tmp_path / "text.txt"), "--context-length", "64", *map(str, options)]
        return CliRunner().invoke(cli.main, arguments)

    return run


def test_the_command_line(command, there, url, tmp_path):
    said = command("--out", url, "--dry-run")
    assert said.exit_code == 0, said.output
    assert not list(there.rglob("*"))
    assert not (tmp_path / "cache").exists()
    assert re.search(rf"free +\S+ \w+ in\s+{re.escape(str(staging_folder(url, None))[:20])}", said.output), said.output
    survey = json.loads(command("--out", url, "--dry-run", "--json", "--staging", tmp_path / "s").stdout)
    assert survey["staging"] == str(tmp_path / "s")
    done = command("--out", url, "--json", "--staging", tmp_path / "s", "--staging-bytes", 1 << 30)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["path"], found["complete"]) == (url, True)
    refused = command("--out", url, "--ray")
    assert refused.exit_code == 2
    assert "start the same command on each machine" in " ".join(refused.output.replace("│", " ").split())
    assert "for a store in a bucket" in command("--out", tmp_path / "plain", "--staging", tmp_path / "s").output
    with pytest.raises(ArgumentError, match=r"call mmcache\.extract on each machine"):
        mmcache.cluster.extract("demo", "demo", ["text"], url)
    assert np.isfinite(mmcache.open(url)["mlp_in"].statistics.mean.numpy()).all()
