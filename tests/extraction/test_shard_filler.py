"""One worker beside others in the same folder: what others make is left to them, and what they leave is made."""

import os
import shutil

import pytest

import mmcache
from mmcache.errors import LockedError, PlanMismatchError
from mmcache.extraction import runner, scheduling
from mmcache.format.signed_json import ROOT
from mmcache.system.atomic import AtomicFile, publish

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(14)]
SETTINGS = {"sites": ("mlp_in", "mlp_out"), "context_length": 24, "batch_size": 3, "shard_tokens": 64}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here could see a sync, and nobody should wait for a second."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(runner, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(scheduling, "_PATIENCE", 0.02)


def extract(path, **changes):
    return mmcache.extract(small.llama(), small.byte_tokenizer(), TEXTS, path, **SETTINGS | changes)


@pytest.fixture(params=["token", "layer"])
def layout(request):
    return request.param


@pytest.fixture
def complete(tmp_path, layout):
    extract(tmp_path / "complete", layout=layout)
    return tmp_path / "complete"


def block_of(file):
    return int(file.name.split(".")[2])


def shards(path, first=0):
    return [file for file in sorted(path.glob("mlp_*/c.*")) if block_of(file) >= first]


@pytest.fixture
def begun(complete, tmp_path):
    """The same store, of which only the first block is there."""
    shutil.copytree(complete, tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "statistics")
    for file in shards(tmp_path / "begun", 1):
        file.unlink()
    return tmp_path / "begun"


class Watch:
    """Hears of the progress, and does something once so many batches were run."""

    def __init__(self, batches, act):
        self.batches, self.act, self.told = batches, act, []

    def __call__(self, at):
        self.told.append(at)
        if at.phase == "extract" and len(self.told) == self.batches:
            self.act()


def test_blocks_that_others_make_meanwhile_are_not_made_again(complete, begun, layout):
    placed = {}

    def others():
        for file in shards(complete, 5):
            target = begun / file.relative_to(complete)
            shutil.copy2(file, target)
            placed[target] = target.stat().st_ino

    watch = Watch(1, others)
    extract(begun, layout=layout, progress=watch)
    assert len(placed) > 8
    assert {target: target.stat().st_ino for target in placed} == placed
    assert watch.told[-1].run_tokens < 8 * 64 < watch.told[-1].total
    small.assert_same_store(begun, complete)


def test_what_a_live_worker_holds_is_waited_for_and_made_when_he_dies(complete, begun, layout):
    draft = AtomicFile(begun, "mlp_in/c.0.3.0")
    phases = []

    def progress(at):
        phases.append(at.phase)
        if at.phase == "wait" and phases.count("wait") == 3:
            blocks = {block_of(file) for file in shards(complete)}
            assert {block_of(file) for file in shards(begun)} == blocks - {3}
            # As when his process ends: the lock goes, the file stays.
            draft._maker = 0
            draft._close()

    extract(begun, layout=layout, progress=progress)
    assert phases.count("wait") >= 3
    small.assert_same_store(begun, complete)


def test_a_store_does_not_grow_while_others_fill_it(tmp_path, layout):
    path = tmp_path / "store"
    extract(path, layout=layout, max_tokens=400)
    shards(path)[-1].unlink()
    # As somebody's who is making it at this moment.
    draft = AtomicFile(path, "mlp_out/c.0.5.0")
    before = small.identities(path / "mlp_out")
    with pytest.raises(LockedError, match="other processes are making shards of this store"):
        extract(path, layout=layout)
    assert small.identities(path / "mlp_out") == before
    draft.discard()
    extract(path, layout=layout)
    extract(tmp_path / "once", layout=layout, max_tokens=400)
    extract(tmp_path / "once", layout=layout)
    small.assert_same_store(path, tmp_path / "once")


def test_a_plan_that_became_another_one_ends_the_job_before_it_publishes_more(complete, tmp_path, layout):
    path, there = tmp_path / "store", []

    def become_longer():
        there.extend(shards(path))
        publish(path, ROOT, (complete / ROOT).read_bytes())

    with pytest.raises(PlanMismatchError, match="was given another plan while it was filled"):
        extract(path, layout=layout, max_tokens=400, progress=Watch(2, become_longer))
    # Only what was sealed before: one block at most.
    assert len({block_of(file) for file in shards(path)} - {block_of(file) for file in there}) <= 1
    assert not list(path.rglob("*.tmp"))


def test_a_small_job_takes_small_slots_and_no_slot_is_too_small_for_a_row():
    mebibyte = 1 << 20
    assert runner._slot_bytes(mebibyte, 4096) == 4 * mebibyte
    assert runner._slot_bytes(128 * mebibyte, 4096) == 8 * mebibyte
    assert runner._slot_bytes(1 << 40, 4096) == 16 * mebibyte
    # Whole blocks of sums, as long as they are no larger than a slot of a large job.
    assert runner._slot_bytes(mebibyte, 100_000) == 6_402_048
    assert runner._slot_bytes(mebibyte, 17 * mebibyte + 1) == 17 * mebibyte + 4096
