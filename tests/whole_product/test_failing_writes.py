"""One call of the system fails while a store is written, and all is tried again: kept, or refused in so many words."""

import contextlib
import itertools
import random
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

import damaged_stores
import mmcache
import small_models
from failing_calls import KINDS, FailOnce
from mmcache.extraction import tokenization
from mmcache.write import page_cache
from stores_and_processes import Twin, at_opcode, widened

SITES = {"a": 32, "b": 16}
SHARD = 256
# Lengths of sequences, None for a commit: a new store, and what ends before, at and behind the end of a shard.
FILLS = {
    "first": [10, None],
    "more of a shard": [100, None, 30, 5, None, 20],
    "full": [250, None, 6, None, 3],
    "past the end": [200, None, 100, None, 1],
    "several shards": [100, None, 700, 3, None, 212],
    "longer and longer": [40, None, -60, None, -400, 5],
}
ENDS = (mmcache.MmcacheError, OSError, KeyboardInterrupt, MemoryError)


def sequence(twin, number, length):
    """Tokens and rows, a function of the number alone."""
    random_of = torch.Generator().manual_seed(number)
    rows = {
        site: torch.randn(twin.n_layers, length, width, generator=random_of).to(twin.dtype)
        for site, width in twin.sites.items()
    }
    return torch.randint(0, 9, (length,), generator=random_of), rows


class ToldError(AssertionError):
    """What an error should not have been."""


def refused(error):
    """Check that an error is the one that was made, or says what to do, and accuses no file."""
    if isinstance(error, (KeyboardInterrupt, MemoryError)) or type(error) is OSError:
        return
    if not isinstance(error, (mmcache.WriteError, mmcache.ReadError)) or "aside" in str(error):
        raise ToldError(repr(error)) from error


class Tried:
    """What is done in steps, each tried again where it fails; `given_up` are the errors behind which it ended."""

    def __init__(self, path):
        self.path, self.given_up, self.closing = path, [], False

    def tried(self, step):
        """Do a step, twice if it fails: whether it was done. The writer refuses it for good otherwise."""
        for last in (False, True):
            try:
                step()
            except ENDS as error:
                refused(error)
                if last:
                    self.given_up.append(error)
            else:
                return True
        return False

    def end(self, writer):
        """Close a writer, once."""
        self.closing = not self.given_up
        try:
            writer.close()
        except ENDS as error:
            refused(error)
            self.given_up.append(error)
            # Where an interrupt came in between, the next one ends it.
            writer.close()

    def told(self, fault):
        """Whether what was given up may be: lost in the background, in the middle of an append, or by closing."""
        half_way = any("half-way" in str(error) for error in self.given_up)
        return not self.given_up or fault.in_background or half_way or self.closing


def at_each_of_some_points(begin, path, count):
    """Let something fail once at some of its calls to the system: how many were tried, and how many given up."""
    begin(path).run(counted := FailOnce(None, ""))
    shutil.rmtree(path)
    points = list(itertools.product(range(counted.count), KINDS))
    points = random.Random(path.name).sample(points, min(len(points), count))  # noqa: S311
    given_up = 0
    for at, kind in points:
        history, fault = begin(path), FailOnce(at, kind)
        try:
            history.run(fault)
            history.check()
            assert history.told(fault), history.given_up
        except BaseException as error:
            error.add_note(f"{kind} at call {at} of {counted.count}: {fault.met}; {history.given_up}")
            raise
        given_up += bool(history.given_up)
        shutil.rmtree(path)
    return len(points), given_up


class History(Tried):
    """Appends and commits of one store, and its twin."""

    def __init__(self, path, fill, layout, dtype):
        super().__init__(path)
        self.steps = FILLS[fill]
        self.options = {"sites": SITES, "n_layers": 2, "dtype": dtype, "layout": layout, "shard_tokens": SHARD}
        self.twin = Twin(SITES, 2, dtype, special=[3])
        self.states = [self.twin.copy()]
        self.writer = None

    def create(self):
        """Make the store."""
        self.writer = mmcache.create(self.path, **self.options, special_tokens=[3])

    def run(self, fault):
        """Do all steps on a system that fails once."""
        with fault:
            self.tried(self.create)
            for number, length in enumerate(self.steps):
                if length is None:
                    self.tried(self.writer.commit)
                elif self.tried(lambda number=number, length=length: self._append(number, length)):
                    self._note(number, length)
                if self.given_up:
                    break
            self.end(self.writer)

    def _append(self, number, length):
        self.writer.append(*sequence(self.twin, number, abs(length)), continues=length < 0)

    def _note(self, number, length):
        self.twin.append(*sequence(self.twin, number, abs(length)), continues=length < 0)
        self.states.append(self.twin.copy())

    def check(self):
        """What counts is all that was appended, or behind a refusal all up to the end of an append; more can follow."""
        assert mmcache.verify(self.path).ok, mmcache.verify(self.path).findings
        with mmcache.open(self.path) as store:
            whole = [state for state in self.states if len(state.tokens) == store.n_tokens]
            assert whole, store
            whole[0].check(store)
        if not self.given_up:
            assert len(whole[0].tokens) == len(self.twin.tokens)
        assert not list(self.path.rglob("*.tmp"))
        self.go_on(whole[0].copy())

    def go_on(self, twin):
        """Append once more, with a new writer."""
        with mmcache.append(self.path) as writer:
            writer.append(*sequence(twin, 99, 33))
            twin.append(*sequence(twin, 99, 33))
        twin.check_path(self.path)


@pytest.fixture(scope="module")
def folder():
    """A folder in memory where there is one."""
    memory = Path("/dev/shm")  # noqa: S108 -- a folder of our own in it
    with tempfile.TemporaryDirectory(prefix="mmcache-failing-", dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.mark.parametrize(
    ("layout", "dtype", "direct"), [("layer", torch.float32, False), ("token", torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("fill", FILLS)
def test_what_fails_once_is_kept_by_trying_again_or_refused(
    fill, layout, dtype, direct, folder, request, monkeypatch, record_property
):
    if direct:
        monkeypatch.setattr(page_cache, "available_memory", lambda: 0)
    begin = partial(History, fill=fill, layout=layout, dtype=dtype)
    path = folder / f"{fill}, {layout}"
    record_property("tried", at_each_of_some_points(begin, path, widened(request, (2, 200))))


def layer(number):
    """A layer, a function of its number."""
    return torch.randn(500, 16, generator=torch.Generator().manual_seed(number))


class Pushes(Tried):
    """A cache that is pushed to and flushed, each step tried again where it fails."""

    def __init__(self, path):
        super().__init__(path)
        self.pushed, self.cache = 0, None

    def _push(self):
        self.cache.push(layer(self.pushed))
        self.pushed += 1

    def _read(self):
        assert torch.equal(self.cache.get_layer(self.pushed - 1), layer(self.pushed - 1))

    def create(self):
        """Make the cache."""
        self.cache = mmcache.FullActivationCache.with_capacity(4, self.path, shard_tokens=256)

    def run(self, fault):
        """Push four layers on a system that fails once."""
        with fault:
            self.tried(self.create)
            flush = self.cache.flush
            for step in (self._push, flush, self._push, self._read, self._push, flush, flush, self._push):
                if not self.given_up:
                    self.tried(step)
            self.end(self.cache)

    def check(self):
        """All layers are there, or, behind a refusal, the first of them."""
        assert mmcache.verify(self.path).ok
        with mmcache.FullActivationCache.open(self.path) as cache:
            assert cache.n_layers == self.pushed == 4 or self.given_up
            assert all(torch.equal(cache.get_layer(number), layer(number)) for number in range(cache.n_layers))
        assert not list(self.path.rglob("*.tmp"))


def test_a_push_or_flush_that_fails_once_is_kept_by_trying_again_or_refused(folder, request):
    at_each_of_some_points(Pushes, folder / "cache", widened(request, (40, 1000)))


# Where the caller's own thread passes while it appends or commits.
WATCHED = (
    "system/atomic",
    "write/base_writer",
    "write/pipeline",
    "write/shard_writer",
    "write/staging",
    "write/token_columns",
    "write/writer",
)


def interrupting(at):
    """A trace function that raises KeyboardInterrupt at a step of the interpreter in the writer's modules."""

    def interrupt():
        raise KeyboardInterrupt

    def watched(code):
        # What a finaliser raises is lost, so a signal that meets one is not the question here.
        return code.co_name != "__del__" and code.co_filename.removesuffix(".py").endswith(
            tuple(f"/mmcache/{name}" for name in WATCHED)
        )

    return at_opcode(at, watched, interrupt)


def interrupted(at, step):
    """Do a step that is interrupted at a step of the interpreter: whether it was, and how many steps there were."""
    trace, steps = interrupting(at)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        return True, steps()
    finally:
        sys.settrace(before)
    return False, steps()


def begun(path, layout):
    """A writer with something committed and something appended, over the end of a shard, and its twin."""
    history = History(path, "first", layout, torch.float32)
    history.create()
    for number, length in ((0, 200), (1, 100)):
        history._append(number, length)
        history._note(number, length)
        if number == 0:
            history.writer.commit()
    return history


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_a_commit_that_is_interrupted_between_any_two_steps_can_be_repeated_or_gone_on_from(folder, layout, request):
    path = folder / "commit"
    history = begun(path, layout)
    _, steps = interrupted(0, history.writer.commit)
    history.writer.close()
    assert steps > 2000
    for turn, at in enumerate(range(5, steps, widened(request, (steps // 10, 7)))):
        shutil.rmtree(path)
        history = begun(path, layout)
        assert interrupted(at, history.writer.commit) == (True, at)
        if turn % 2:
            # With or without another append in between.
            history._append(2, 80)
            history._note(2, 80)
        history.writer.commit()
        history.twin.check_path(path)
        history.writer.close()
        history.check()
    shutil.rmtree(path)


@pytest.mark.parametrize("length", [30, 700])
@pytest.mark.parametrize("layout", ["layer", "token"])
def test_an_append_that_is_interrupted_is_there_whole_or_not_at_all_or_told_of(folder, layout, length, request):
    path = folder / "append"
    history = begun(path, layout)
    _, steps = interrupted(0, lambda: history._append(2, length))
    history.writer.close()
    ends = set()
    for at in range(5, steps, widened(request, (steps // 8, 7))):
        shutil.rmtree(path)
        history = begun(path, layout)
        was, before = interrupted(at, lambda history=history: history._append(2, length)), history.writer.n_sequences
        if not was[0]:
            # Threads take steps too, now more, now fewer: this one came behind the last.
            assert at > steps // 2
            history._note(2, length)
            history.writer.close()
            continue
        try:
            history._append(3, 40)
        except mmcache.WriteError as error:
            ends.add("told")
            history.given_up.append(error)
            with pytest.raises(mmcache.WriteError, match="half-way"):
                history.writer.close()
        else:
            for number, size in ((2, length), (3, 40))[3 - before :]:
                history._note(number, size)
            ends.add("whole" if before == 3 else "not at all")
            history.writer.close()
        history.check()
    assert {"told", "not at all"} <= ends
    shutil.rmtree(path)


def test_a_plan_whose_tokens_fail_once_is_made_by_the_same_command(folder, request, monkeypatch):
    # Many commits of the columns, where one has up to four million tokens.
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 40)
    damaged_stores.extracted(folder / "right")
    path = folder / "plan"

    class PlannedError(Exception):
        """The plan is there, and not a shard."""

    def stop(progress):
        if progress.phase == "extract":
            raise PlannedError

    def plan(fault):
        with fault, contextlib.suppress(PlannedError):
            damaged_stores.extracted(path, progress=stop)

    plan(counted := FailOnce(None, ""))
    shutil.rmtree(path)
    points = list(itertools.product(range(counted.count), KINDS))
    for at, kind in random.Random(2).sample(points, min(len(points), widened(request, (2, 100)))):  # noqa: S311
        with contextlib.suppress(*ENDS):
            plan(FailOnce(at, kind))
        damaged_stores.extracted(path)
        small_models.assert_same_store(path, folder / "right")
        shutil.rmtree(path)
