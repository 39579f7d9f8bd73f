"""Who makes which block: every one is made, by one worker where nothing goes wrong, by others where something does."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.extraction import scheduling
from mmcache.extraction.scheduling import BlockScheduler
from mmcache.format.manifest import Manifest
from mmcache.system.atomic import AtomicFile
from mmcache.system.launcher import Rank

SHARD = 2048


def plan(path, blocks, layout="token", sites=("a", "b")):
    manifest = Manifest(
        "planned", "s", layout, "bfloat16", dict.fromkeys(sites, 8), (0, 1), n_tokens=blocks * SHARD - 5
    ).with_geometry(SHARD, blocks * SHARD - 5)
    for site in sites:
        (path / site).mkdir(parents=True)
    return manifest


def make(path, manifest, block):
    for site in manifest.sites:
        for slot in manifest.slots(site):
            (path / site / manifest.shard_key(site, block, slot)).touch()


@pytest.mark.parametrize("layout", ["token", "layer"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 20])
def test_workers_that_begin_together_share_all_blocks(tmp_path, layout, workers):
    manifest = plan(tmp_path, 13, layout)
    make(tmp_path, manifest, 4)
    taken = [BlockScheduler(tmp_path, manifest, Rank(number, workers)).take().tolist() for number in range(workers)]
    assert sorted(block for part in taken for block in part) == [0, 1, 2, 3, *range(5, 13)]
    # In stretches, and as evenly as can be: batches that lie across two parts are run twice.
    assert all(part == sorted(part) for part in taken)
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_a_block_of_which_one_shard_is_missing_is_wanted(tmp_path):
    manifest = plan(tmp_path, 3, "layer")
    for block in range(3):
        make(tmp_path, manifest, block)
    (tmp_path / "b" / "c.1.2.0").unlink()
    found = BlockScheduler(tmp_path, manifest, Rank())
    assert found.take().tolist() == [2]
    assert {site: shards.tolist() for site, shards in found.missing.items()} == {
        "b": [[False] * 3, [False, False, True]]
    }


def test_what_somebody_is_making_is_left_to_him_until_he_dies(tmp_path):
    manifest = plan(tmp_path, 4)
    draft = AtomicFile(tmp_path, "b/c.0.2.0")
    found = BlockScheduler(tmp_path, manifest, Rank())
    assert found.take().tolist() == [0, 1, 3]
    for block in (0, 1, 3):
        make(tmp_path, manifest, block)
    found.look()
    assert found.wanted.tolist() == [False, False, True, False]
    assert not len(found.take())
    # As when his process ends: the lock is gone, the file is not.
    litter = draft.path.with_name(draft._temporary)
    draft._maker = 0
    draft._close()
    found.look()
    assert found.take().tolist() == [2]
    assert not litter.exists()


def test_fewer_blocks_than_workers_go_to_those_whose_part_they_are_unless_they_do_not_come(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scheduling.time, "monotonic", lambda: now[0])
    manifest = plan(tmp_path, 1)
    workers = [BlockScheduler(tmp_path, manifest, Rank(number, 4)) for number in range(4)]
    assert [worker.take().tolist() for worker in workers] == [[], [], [], [0]]
    # The next one behind the owner first, then the others, each for longer.
    now[0] = scheduling._PATIENCE
    assert [worker.take().tolist() for worker in workers[:3]] == [[0], [], []]
    now[0] = 3 * scheduling._PATIENCE
    assert [worker.take().tolist() for worker in workers[:3]] == [[0]] * 3


def test_a_worker_that_was_busy_has_waited_for_nothing(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scheduling.time, "monotonic", lambda: now[0])
    manifest = plan(tmp_path, 3)
    worker = BlockScheduler(tmp_path, manifest, Rank(0, 2))
    assert worker.take().tolist() == [0]
    now[0] = 100.0
    make(tmp_path, manifest, 0)
    make(tmp_path, manifest, 2)
    worker.look()
    assert worker.take().tolist() == []
    now[0] += scheduling._PATIENCE
    assert worker.take().tolist() == [1]


@pytest.mark.parametrize("number", [0, 37, 99])
def test_a_task_of_an_array_that_has_a_store_to_itself_soon_takes_all_of_it(tmp_path, number, monkeypatch):
    monkeypatch.setattr(scheduling.time, "monotonic", lambda: pytest.fail("it waits for nobody"))
    manifest = plan(tmp_path, 300, sites=("a",))
    worker, taken = BlockScheduler(tmp_path, manifest, Rank(number, 100)), []
    while worker.wanted.any():
        taken.append(worker.take().tolist())
        for block in taken[-1]:
            make(tmp_path, manifest, block)
        worker.look()
    assert sorted(block for part in taken for block in part) == list(range(300))
    assert len(taken) <= 8


def test_a_sign_of_another_worker_makes_it_one_of_many_again(tmp_path):
    manifest = plan(tmp_path, 300, sites=("a",))
    worker = BlockScheduler(tmp_path, manifest, Rank(0, 100))
    for _ in range(3):
        part = worker.take()
        for block in part.tolist():
            make(tmp_path, manifest, block)
        worker.look()
    assert len(part) > 9
    make(tmp_path, manifest, 250)
    worker.look()
    assert len(worker.take()) == 2


def test_a_complete_site_is_no_business_of_a_job_that_adds_others(tmp_path):
    manifest = plan(tmp_path, 2)
    for block in range(2):
        (tmp_path / "a" / f"c.0.{block}.0").touch()
    found = BlockScheduler(tmp_path, manifest, Rank())
    assert list(found.missing) == ["b"]
    (tmp_path / "a" / "c.0.0.0").unlink()
    found.look()
    assert list(found.missing) == ["b"]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10**6))
def test_whoever_dies_or_dawdles_everything_is_made_and_little_of_it_twice(blocks, workers, seed):
    """A model of workers: at random moments one of them makes a block, looks again, or dies."""
    dice = random.Random(seed)  # noqa: S311 -- a model, no secret
    manifest = Manifest("planned", "s", "token", "bfloat16", {"a": 8}, (0,), n_tokens=blocks * SHARD).with_geometry(
        SHARD, blocks * SHARD
    )
    there, clock, made = np.zeros(blocks, bool), [0.0], []

    class Seen(BlockScheduler):
        def look(self):
            self.missing, self.wanted = {"a": ~there[None]}, ~there
            self.held = np.isin(np.arange(blocks), [job[0] for name, job in jobs.items() if name != self and job])

    jobs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling.time, "monotonic", lambda: clock[0])
        for number in range(workers):
            worker = Seen(None, manifest, Rank(number, workers))
            jobs[worker] = worker.take().tolist()
        for _ in range(400 * blocks):
            if there.all():
                break
            clock[0] += 0.5
            worker = dice.choice(list(jobs))
            if dice.random() < 0.02 and len(jobs) > 1:
                del jobs[worker]
            elif jobs[worker]:
                block = jobs[worker].pop(0)
                made.append(block)
                there[block] = True
                if jobs[worker] and there[jobs[worker][0]]:
                    jobs[worker] = []
            else:
                worker.look()
                jobs[worker] = worker.take().tolist()
    assert there.all()
    assert set(made) == set(range(blocks))
    # Workers that begin a block at the same moment make it twice; nobody follows another block for block.
    assert len(made) <= blocks + workers * 4
