"""Every operation that changes the disk, under every fault: nothing committed is lost, nothing half-written believed.

Each job runs in a fork, on a disk that goes wrong at one operation (`fault_injection.py`). Then the store is opened as
the next user would, everything that was promised is compared, the same job is run again, and what it leaves must be
what one that was never disturbed leaves. The suite takes a sample; `--slow` takes all of them.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmcache
from damaged_stores import extracted
from fault_injection import after_power_loss, changing_sites, faults_of, in_fork
from mmcache.ops.repair import ASIDE
from mmcache.system import atomic
from mmcache.write import page_cache
from small_models import assert_same_store, contents
from stores_and_processes import Twin, damage, flip, shards, tree

# Points of each job in the suite, and power failures.
SAMPLE = 24
SITES = {"a": 8, "b": 4}


class Grown:
    """A store that is made and appended to, with commits in between."""

    sequences = (5, 300, 1, 120, 90)

    def __init__(self, layout):
        self.layout = layout

    def start(self, path):
        """Nothing is there before."""

    def _data(self, number):
        random_of = torch.Generator().manual_seed(number)
        length = self.sequences[number]
        rows = {site: torch.randn(2, length, width, generator=random_of) for site, width in SITES.items()}
        return torch.randint(0, 9, (length,), generator=random_of), rows

    def run(self, path, ack):
        """Do what is not done yet, as a user's program would that is started again and again."""
        if (path / "zarr.json").exists():
            writer = mmcache.append(path)
        else:
            writer = mmcache.create(
                path, sites=SITES, n_layers=2, layout=self.layout, shard_tokens=256, dtype=torch.float32,
                special_tokens=[3],
            )  # fmt: skip
        with writer:
            for number in range(writer.n_sequences, len(self.sequences)):
                writer.append(*self._data(number))
                if number % 2:
                    writer.commit()
                    ack(number + 1)
        ack(len(self.sequences))

    def check(self, path, acked):
        """All that was promised is there, and right; and what else is there is right too."""
        if not acked and not (path / "zarr.json").exists():
            return
        with mmcache.open(path) as store:
            assert acked <= store.n_sequences <= len(self.sequences)
            twin = Twin(SITES, 2, torch.float32, special=[3])
            for number in range(store.n_sequences):
                twin.append(*self._data(number))
            twin.check(store)

    def same(self, path, right):
        """Shards are named by a store's own random name: what they hold is the same."""
        self.check(path, len(self.sequences))
        assert mmcache.verify(path).ok
        assert sorted(tree(path)) == sorted(tree(right))


class Interrupted(Grown):
    """A store whose writer was killed before, which left drafts and a lock."""

    def start(self, path):
        """Kill a writer in the middle of a shard."""
        path.mkdir()
        told = path.parent / "told"
        ended, _, _ = in_fork(lambda disk: self.run(path, disk.ack), path, fail=(66, "killed before"), told=told)
        assert ended == "killed"
        assert list(path.rglob(".*.tmp"))
        assert (path / ".lock").exists()


class Pushed:
    """A cache, flushed half-way. It cannot be gone on with: the next run begins anew.

    Past the page cache if `direct`, where that is to be had, or else so that nothing stays in it if it is "uncached".
    """

    def __init__(self, direct=None):
        self.direct = direct

    def start(self, path):
        """Nothing is there before."""

    def _layer(self, number):
        return torch.randn(500, 16, generator=torch.Generator().manual_seed(number))

    def run(self, path, ack):
        """Push four layers."""
        with pytest.MonkeyPatch.context() as patch:
            if self.direct:
                patch.setattr(page_cache, "available_memory", lambda: 0)
            if self.direct == "uncached":
                patch.setattr(atomic, "O_DIRECT", 0)
            self._push(path, ack)

    def _push(self, path, ack):
        if path.exists():
            shutil.rmtree(path)
        with mmcache.FullActivationCache.with_capacity(4, path, shard_tokens=256) as cache:
            for number in range(4):
                cache.push(self._layer(number))
                if number == 1:
                    cache.flush()
                    ack(2)
        ack(4)

    def check(self, path, acked):
        """As many layers as were promised, or more."""
        if not acked and not (path / "zarr.json").exists():
            return
        with mmcache.open(path) as store:
            assert store.n_layers >= acked
            for number in store.layers:
                assert torch.equal(store["resid_post"].get_layer(number), self._layer(number))

    def same(self, path, right):
        """The four layers."""
        self.check(path, 4)
        assert mmcache.verify(path).ok
        assert sorted(tree(path)) == sorted(tree(right))


class Extracted:
    """An extraction from nothing, or one that goes on with some shards missing."""

    def __init__(self, *, resumed):
        self.resumed = resumed

    def start(self, path):
        """Make what is gone on with."""
        if self.resumed:
            extracted(path)
            for file in (*shards(path / "mlp_in")[1:3], shards(path / "mlp_out")[-1]):
                file.unlink()
            shutil.rmtree(path / "statistics")

    def run(self, path, ack):
        """Run the same command."""
        extracted(path)
        ack(1)

    def check(self, path, acked):
        """Whatever is there under its name is whole."""
        if not (path / "zarr.json").exists():
            assert not acked
            return
        report = mmcache.verify(path)
        assert {finding.kind for finding in report.findings} <= (set() if acked else {"missing"}), report.findings

    def same(self, path, right):
        """To the last byte."""
        assert_same_store(path, right)


class Longer(Extracted):
    """A plan that is made longer: its last shard is made anew."""

    def __init__(self):
        super().__init__(resumed=False)

    def start(self, path):
        """Make the short one."""
        extracted(path, max_tokens=200)


class Repair:
    """A store with damaged shards and metadata, repaired and extracted again."""

    def start(self, path):
        """Damage it."""
        extracted(path)
        damage(shards(path / "mlp_in")[0], flip(5000))
        damage(shards(path / "mlp_out")[1], lambda data: data[:-1])
        damage(path / "tokens" / "zarr.json", flip(100))

    def run(self, path, ack):
        """Repair, and go on."""
        mmcache.repair(path)
        ack(1)
        extracted(path)

    def check(self, path, acked):
        """Nothing but what was damaged before is wrong, and its bytes are somewhere."""
        kinds = Counter(finding.kind for finding in mmcache.verify(path).findings)
        assert set(kinds) <= ({"missing"} if acked else {"missing", "damaged", "foreign", "metadata"})
        assert kinds["damaged"] <= 1
        assert kinds["foreign"] <= 1
        sizes = [file.stat().st_size % 4096 for file in path.rglob("c.*")]
        assert 4095 in sizes, "the shard that was cut short is gone"

    def same(self, path, right):
        """To the last byte, but for what was set aside."""
        found, wanted = (
            {name: data for name, data in contents(folder).items() if not name.startswith(ASIDE)}
            for folder in (path, right)
        )
        assert found == wanted


JOBS = {
    "append, token": Grown("token"),
    "append, layer": Grown("layer"),
    "append, interrupted before": Interrupted("token"),
    "push": Pushed(),
    "push, direct": Pushed("direct"),
    "push, uncached": Pushed("uncached"),
    "extract": Extracted(resumed=False),
    "resume": Extracted(resumed=True),
    "longer plan": Longer(),
    "repair": Repair(),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run models as the forks do: the number of threads belongs to a plan."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder():
    """A folder in memory where there is one: thousands of syncs take their time on a disk."""
    memory = Path("/dev/shm")  # noqa: S108 -- a folder of our own in it
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mmcache-faults-", dir=parent) as made:
        yield Path(made)


@pytest.fixture(scope="module", params=JOBS)
def job(request, folder):
    """A job, what it began with, what an undisturbed run leaves, and what that did to the disk."""
    job, base = JOBS[request.param], folder / request.param.replace(", ", "-")
    base.mkdir()
    job.start(base / "before")
    if not (base / "before").exists():
        (base / "before").mkdir()
    copied = shutil.copytree(base / "before", base / "right")
    before = tree(copied, locks=True)

    def work(disk):
        job.run(copied, disk.ack)

    ended, calls, log = in_fork(work, copied, contents=True)
    assert ended == "done", ended
    yield job, base, before, calls, log
    shutil.rmtree(base)


def begin(base, name):
    """Copy what the job begins with."""
    path = base / name
    shutil.rmtree(path, ignore_errors=True)
    return shutil.copytree(base / "before", path)


def points(calls, request):
    """Choose points (number of the call, fault): all of them, or a sample in which every call site is."""
    every = [(number, fault) for number, call in enumerate(calls) for fault in faults_of(call.name)]
    if request.config.getoption("--slow"):
        return every
    dice = random.Random(1)  # noqa: S311
    sites = {}
    for number, call in enumerate(calls):
        sites.setdefault((call.site, call.name), []).append(number)
    chosen = [(dice.choice(numbers), dice.choice(faults_of(name))) for (_, name), numbers in sites.items()]
    return chosen + dice.sample(every, min(SAMPLE, len(every)))


def test_a_fault_at_any_operation_loses_nothing(job, request, record_property):
    work_of, base, _, calls, _ = job
    seen = set()
    for number, fault in points(calls, request):
        seen |= undisturbed_after(work_of, base, (number, fault))
    if isinstance(work_of, Interrupted):
        # What is tidied up behind a fault meets another one.
        for fault in faults_of("unlink"):
            seen |= undisturbed_after(work_of, base, (len(calls) - 40, "EIO"), then=("unlink", fault))
    # The suite's summary adds them up.
    record_property("faults", sorted(seen))


def undisturbed_after(work_of, base, fail, then=None):
    """Run a job on a disk with a fault, look at what is there, and run it again to its end; give the points met."""
    path, acks, told = begin(base, "faulty"), base / "acks", base / "told"
    acks.write_text("0")
    told.write_text("")

    def work(_disk):
        work_of.run(path, lambda done: acks.write_text(str(done)))

    ended, _, _ = in_fork(work, path, fail=fail, told=told, then=then)
    where = f"{fail}, {told.read_text()!r}: {ended}"
    known = ended in ("done", "killed") or ended.startswith("mmcache.errors.")
    assert known, where
    try:
        work_of.check(path, int(acks.read_text()))
        work_of.run(path, lambda _: None)
        work_of.same(path, base / "right")
    except BaseException as error:
        error.add_note(where)
        raise
    return set(told.read_text().splitlines())


def test_a_power_failure_at_any_moment_loses_nothing(job, request):
    work_of, base, before, _, log = job
    moments = [(place, how) for place in range(len(log) + 1) for how in ("lost", "kept", "mixed", "mixed")]
    if not request.config.getoption("--slow"):
        moments = random.Random(2).sample(moments, min(SAMPLE, len(moments)))  # noqa: S311
    for seed, (place, how) in enumerate(moments):
        path = base / "after"
        shutil.rmtree(path, ignore_errors=True)
        after_power_loss(before, log[:place], path, how, seed)
        acked = max((entry[1] for entry in log[:place] if entry[0] == "ack"), default=0)
        try:
            work_of.check(path, acked)
            work_of.run(path, lambda _: None)
            work_of.same(path, base / "right")
        except BaseException as error:
            error.add_note(f"behind operation {place} of {len(log)} ({log[place - 1][:2]}), {how}, seed {seed}")
            raise


def test_every_place_that_changes_the_disk_is_in_one_of_the_jobs(folder):
    met = set()
    for number, job in enumerate(JOBS.values()):
        base = folder / f"met-{number}"
        base.mkdir()
        job.start(base / "store")
        told = base / "told"
        told.write_text("")
        # Undisturbed, and with a fault near the end, behind which is tidied up.
        for fail in (None, (40, "EIO")):
            path = base / f"run-{fail is None}"
            if (base / "store").exists():
                shutil.copytree(base / "store", path)
            else:
                path.mkdir()
            _, calls, _ = in_fork(lambda _disk, job=job, path=path: job.run(path, print), path, fail=fail, told=told)
            met |= {call.site for call in calls}
    missing = {f"{module}:{line}" for module, line in changing_sites()} - met
    assert not missing, missing
