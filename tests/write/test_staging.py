"""Staging and the pipeline: what reaches the disk is what `shard.encode` writes, and failures reach the caller."""

import errno
import fcntl
import itertools
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.format.dtypes import activation_dtype
from mmcache.format.shard import ShardSpec, encode
from mmcache.stats.moments import WHOLE_ROWS, Moments
from mmcache.system import atomic as draft_module
from mmcache.system.atomic import AtomicFile
from mmcache.system.files import O_DIRECT
from mmcache.system.syscalls import LINUX
from mmcache.write import staging
from mmcache.write.page_cache import PageCachePolicy
from mmcache.write.pipeline import SLOT_BYTES, Pipeline
from mmcache.write.shard_writer import Seal, ShardWriter
from mmcache.write.staging import Stager
from stores_and_processes import DTYPES, numpy_dtype, random_bits, raw, without_sync

METADATA = {"format": "mmcache/1", "array": "a", "key": "c.0.0.0"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


@pytest.fixture
def pipeline():
    made = Pipeline(SLOT_BYTES)
    yield made
    made.close()


def spec_of(dtype, width, *, layers=0, shard=64, chunk=16):
    """Describe shards of rows `[width]`, or `[layers, width]` where `layers` is not 0."""
    row = (layers, width) if layers else (width,)
    return ShardSpec("activations", activation_dtype(dtype), row, shard, chunk, max(layers, 1))


def shard_writer(path, spec, *, first_token=0, rows=None, direct=False):
    policy = PageCachePolicy(busy=direct)
    return ShardWriter(path.parent, path.name, spec, METADATA, first_token, rows=rows, policy=policy, durable=True)


def parts_of(spec, rows):
    """Cut rows into what `stage` takes: a `[n, d_model]` tensor a layer."""
    return list(rows.unbind(1)) if len(spec.row_shape) == 2 else [rows]


def encoded(spec, rows, keep, first_token=0, overflow=None):
    """Write the shard in memory, the simple way."""
    data = np.frombuffer(raw(rows), numpy_dtype(rows.dtype)).reshape(rows.shape)
    moments = Moments(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows)
    moments.add(data.reshape(len(data), spec.stat_layers, spec.row_shape[-1]), keep)
    if overflow is not None:
        moments.add_overflow(overflow)
    return encode(spec, data, METADATA, moments.arrays(first_token))


@st.composite
def shards(draw):
    """Draw a shard's description, how many rows it gets, how they are split, and which of them count."""
    dtype = draw(st.sampled_from(DTYPES))
    width, layers = draw(st.sampled_from([1, 3, 8, 129, 1024])), draw(st.integers(0, 3))
    chunk = draw(st.sampled_from([1, 4, 32]))
    shard = chunk * draw(st.integers(1, 8))
    rows = draw(st.integers(1, shard))
    cuts = draw(st.lists(st.integers(0, rows), max_size=5))
    masked = draw(st.booleans())
    return spec_of(dtype, width, layers=layers, shard=shard, chunk=chunk), rows, sorted({0, *cuts, rows}), masked


@given(shards(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_what_is_written_is_what_encode_writes(tmp_path_factory, drawn, direct, reserve, seed):
    spec, count, cuts, masked = drawn
    path = tmp_path_factory.mktemp("shard") / "c.0.0.0"
    rows = random_bits(count, *spec.row_shape, dtype=spec.dtype.torch, seed=seed)
    keep = np.random.default_rng(seed).random(count) < 0.7 if masked else np.ones(count, bool)
    pipeline = Pipeline(SLOT_BYTES)
    stager = Stager(pipeline)
    shard = shard_writer(path, spec, first_token=7, rows=count if reserve else None, direct=direct)
    for start, stop in itertools.pairwise(cuts):
        stager.stage(shard, parts_of(spec, rows[start:stop]), keep[start:stop])
        if seed % 2:
            # Each piece in a slot of its own.
            stager.flush()
    stager.flush()
    pipeline.submit(Seal([shard], durable=True))
    pipeline.drain()
    pipeline.close()
    assert path.read_bytes() == encoded(spec, rows, keep, first_token=7)
    assert [file.name for file in path.parent.iterdir()] == ["c.0.0.0"]
    assert path.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("width", "rows"), [(1000, 3000), (4096, 700), (1025, 4001)])
def test_shards_larger_than_a_slot(tmp_path, direct, width, rows):
    # Pieces that end in the middle of a page, and whole ones that may go past the page cache.
    small = Pipeline(1 << 20)
    spec = spec_of(torch.float32, width, shard=4096, chunk=512)
    values = random_bits(rows, width, dtype=torch.float32)
    stager = Stager(small)
    shard = shard_writer(tmp_path / "c", spec, rows=rows, direct=direct)
    keep = np.random.default_rng(0).random(rows) < 0.5
    stager.stage(shard, [values[:10]], keep[:10])
    stager.stage(shard, [values[10:]], keep[10:])
    stager.flush()
    small.submit(Seal([shard], durable=True))
    small.drain()
    small.close()
    assert (tmp_path / "c").read_bytes() == encoded(spec, values, keep)


def test_pieces_of_a_shard_begin_on_pages(tmp_path, monkeypatch):
    # Otherwise all but the first would go through the page cache, however large they are.
    offsets, write = [], AtomicFile.write

    def record(draft, data, offset, **options):
        offsets.append(offset)
        write(draft, data, offset, **options)

    monkeypatch.setattr(AtomicFile, "write", record)
    pipeline = Pipeline(1 << 20)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 1000, shard=4096, chunk=512)
    shard = shard_writer(tmp_path / "c", spec)
    stager.stage(shard, [torch.zeros(1500, 1000)])
    stager.flush()
    pipeline.drain()
    pipeline.close()
    shard.discard()
    assert len(offsets) > 4
    assert [offset % 4096 for offset in offsets] == [0] * len(offsets)


@pytest.mark.parametrize(("slot", "block"), [(5 << 20, 1024), (1 << 20, WHOLE_ROWS)])
def test_a_full_slot_ends_with_a_block_of_sums_where_it_has_room_for_one(tmp_path, monkeypatch, slot, block):
    pieces, add = [], Moments.add
    monkeypatch.setattr(
        Moments, "add", lambda moments, rows, keep: (pieces.append(len(rows)), add(moments, rows, keep))
    )
    pipeline = Pipeline(slot)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 1000, shard=4096, chunk=2048)
    shard = shard_writer(tmp_path / "c", spec)
    for rows in (300, 1700, 1000):
        stager.stage(shard, [torch.zeros(rows, 1000)])
    stager.flush()
    pipeline.drain()
    pipeline.close()
    shard.discard()
    ends = np.cumsum(pieces)
    assert ends[-1] == 3000
    assert (ends[:-1] % block == 0).all()


def test_a_block_of_sums_is_not_cut_by_the_end_of_a_slot_if_its_rows_come_one_by_one(tmp_path, monkeypatch):
    held, hold = [], Moments._hold
    monkeypatch.setattr(
        Moments, "_hold", lambda moments, rows, keep: (held.append(len(rows)), hold(moments, rows, keep))
    )
    pipeline = Pipeline(11 << 19)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 1000, shard=4096, chunk=256)
    shards = [shard_writer(tmp_path / name, spec) for name in "ab"]
    for shard in shards:
        for _ in range(16):
            stager.stage(shard, [torch.zeros(128, 1000)])
    stager.flush()
    pipeline.drain()
    pipeline.close()
    for shard in shards:
        shard.discard()
    assert not held


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_block_of_sums_of_several_inner_chunks_is_not_copied(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(Moments, "_hold", lambda *_: pytest.fail("a whole block was held"))
    pipeline = Pipeline(8 << 20)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 30_000, shard=4096, chunk=chunk)
    shard = shard_writer(tmp_path / "c", spec)
    stager.stage(shard, [torch.zeros(128, 30_000)])
    stager.flush()
    pipeline.drain()
    pipeline.close()
    shard.discard()
    assert len(shard._crcs) == 128 // chunk


@pytest.mark.skipif(not LINUX, reason="needs pwritev2's flags")
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown to the system"])
def test_without_direct_writes_the_page_cache_keeps_nothing_either(tmp_path, monkeypatch, pipeline, known):
    monkeypatch.setattr(draft_module, "O_DIRECT", 0)
    flags, write = [], os.pwritev

    def record(fd, buffers, offset, flag=0):
        flags.append(flag)
        if not known:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", record)
    spec, values = spec_of(torch.float32, 1000, shard=4096, chunk=512), random_bits(900, 1000, dtype=torch.float32)
    stager, shard = Stager(pipeline), shard_writer(tmp_path / "c", spec, direct=True)
    stager.stage(shard, [values])
    stager.flush()
    pipeline.submit(Seal([shard], durable=True))
    pipeline.drain()
    assert (tmp_path / "c").read_bytes() == encoded(spec, values, None)
    assert set(flags) == {0x80}
    assert (len(flags) > 1) == known, "asked again after it was refused"


@pytest.mark.parametrize("width", [100, 129, 384])
def test_all_but_the_pages_at_the_ends_of_a_piece_go_to_the_device(tmp_path, monkeypatch, pipeline, width):
    # Sequences of any length, in turn to two shards: pieces begin and end anywhere in a page.
    if not O_DIRECT:
        pytest.skip("no direct writes here")
    through, direct = [], []

    def write_all(fd, view, offset, write=AtomicFile._write_all):
        (direct if fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT else through).append(len(view))
        write(fd, view, offset)

    monkeypatch.setattr(AtomicFile, "_write_all", staticmethod(write_all))
    spec = spec_of(torch.bfloat16, width, shard=8192, chunk=512)
    values = random_bits(4000, width, dtype=torch.bfloat16)
    stager, made = Stager(pipeline), [shard_writer(tmp_path / name, spec, direct=True) for name in "ab"]
    for start in range(0, 4000, 777):
        for shard in made:
            stager.stage(shard, [values[start : start + 777]])
    stager.flush()
    pipeline.submit(Seal(made, durable=True))
    pipeline.drain()
    for name in "ab":
        assert (tmp_path / name).read_bytes() == encoded(spec, values, None)
    if not direct:
        pytest.skip("the file system has no direct writes")
    tail = (tmp_path / "a").stat().st_size - 4000 * width * 2
    assert sum(direct) > 0.8 * 2 * 4000 * width * 2
    assert max(through) <= max(4096, tail)


def test_slots_wait_for_each_other_only_while_the_ring_has_room(tmp_path, monkeypatch):
    # The caller's copies come first; but a ring that is full has to be emptied.
    notes, pipeline = [], Pipeline(1 << 18)
    copy, submit = staging._copy_plain, pipeline.submit
    monkeypatch.setattr(staging, "_copy_plain", lambda *given: (notes.append("copy"), copy(*given))[1])
    monkeypatch.setattr(pipeline, "submit", lambda job: (notes.append("submit"), submit(job)))
    stager, spec = Stager(pipeline), spec_of(torch.float32, 1024, shard=4096, chunk=512)
    shard = shard_writer(tmp_path / "c", spec)
    slot_rows = (1 << 18) // 4096
    stager.stage(shard, [torch.zeros(2 * slot_rows, 1024)])
    assert notes == ["copy", "copy", "submit"]  # the second may have room for other rows
    stager.flush()
    pipeline.drain()
    notes.clear()
    stager.stage(shard, [torch.zeros(40 * slot_rows, 1024)])
    stager.flush()
    assert [notes.count("copy"), notes.count("submit")] == [40, 40]
    assert "submit" in notes[:5]
    submit(Seal([shard], durable=True))
    pipeline.drain()
    pipeline.close()
    assert (tmp_path / "c").read_bytes() == encoded(spec, torch.zeros(42 * slot_rows, 1024), None)


def test_several_shards_share_slots(tmp_path, pipeline):
    # As the layer layout does: a piece for each shard, again and again.
    spec = spec_of(torch.float16, 33)
    values = [random_bits(64, 33, dtype=torch.float16, seed=number) for number in range(5)]
    stager = Stager(pipeline)
    made = [shard_writer(tmp_path / f"c{number}", spec) for number in range(5)]
    for start in range(0, 64, 7):
        for shard, rows in zip(made, values, strict=True):
            stager.stage(shard, [rows[start : start + 7]])
    stager.flush()
    pipeline.submit(Seal(made, durable=True))
    pipeline.drain()
    for number, rows in enumerate(values):
        assert (tmp_path / f"c{number}").read_bytes() == encoded(spec, rows, None)


def test_a_cast_counts_what_overflows(tmp_path, pipeline):
    spec = spec_of(torch.float16, 4, layers=3)
    rows = torch.randn(20, 3, 4)
    rows[2, 0, 1] = rows[3, 2, 0] = rows[19, 2, 3] = 1e6
    rows[4, 1, 0] = torch.inf
    stager, shard = Stager(pipeline), shard_writer(tmp_path / "c", spec)
    stager.stage(shard, parts_of(spec, rows[:10]))
    stager.stage(shard, parts_of(spec, rows[10:]))
    stager.flush()
    pipeline.submit(Seal([shard], durable=True))
    pipeline.drain()
    assert (tmp_path / "c").read_bytes() == encoded(spec, rows.half(), None, overflow=np.array([1, 0, 2]))


def test_mixed_dtypes_and_strides_of_the_layers_of_a_row(tmp_path, pipeline):
    spec = spec_of(torch.float32, 6, layers=3)
    layers = [torch.randn(9, 6).double(), torch.randn(6, 9).T, torch.randn(1, 6).bfloat16().expand(9, 6)]
    stager, shard = Stager(pipeline), shard_writer(tmp_path / "c", spec)
    stager.stage(shard, layers)
    stager.flush()
    pipeline.submit(Seal([shard], durable=True))
    pipeline.drain()
    expected = torch.stack([layer.float() for layer in layers], dim=1)
    assert (tmp_path / "c").read_bytes() == encoded(spec, expected, None)


# The pipeline


class Note:
    """A job that notes where it has been, and may fail there."""

    files = 1

    def __init__(self, name, notes, fails=None, error=None):
        self.name, self.notes, self.fails, self.error = name, notes, fails, error or ValueError("asked to fail")

    def _pass(self, stage):
        if self.fails == stage:
            raise self.error
        self.notes.append((stage, self.name, threading.current_thread().name))

    def digest(self):
        self._pass("digest")

    def write(self):
        self._pass("write")

    def publish(self):
        self._pass("publish")

    def abandon(self):
        self.notes.append(("abandon", self.name, threading.current_thread().name))


STAGES = ("digest", "write", "publish")


def test_jobs_pass_every_stage_in_order(pipeline):
    notes = []
    for number in range(50):
        pipeline.submit(Note(number, notes))
    pipeline.drain()
    for stage in STAGES:
        passed = [name for at, name, _ in notes if at == stage]
        assert (sorted(passed) if stage == "write" else passed) == list(range(50))
        assert {thread for at, _, thread in notes if at == stage} == {f"mmcache-{stage}"}
    for number in range(50):
        assert [at for at, name, _ in notes if name == number] == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_failure_stops_everything(stage):
    notes = []
    pipeline = Pipeline(SLOT_BYTES)
    pipeline.submit(Note("before", notes))
    pipeline.drain()
    pipeline.submit(Note("fails", notes, fails=stage))
    for number in range(5):
        pipeline.submit(Note(number, notes))
    for use in (pipeline.drain, pipeline.check, pipeline.acquire):
        with pytest.raises(mmcache.WriteError, match=r"in the background.*asked to fail") as caught:
            use()
        assert isinstance(caught.value.__cause__, ValueError)
    pipeline.close()
    assert ("publish", "before", "mmcache-publish") in notes
    # What came after was not published, and was told so; by one thread, after all that came before it.
    assert [name for at, name, _ in notes if at == "publish"] == ["before"]
    assert [name for at, name, _ in notes if at == "abandon"] == ["fails", *range(5)]
    assert {thread for at, _, thread in notes if at == "abandon"} == {"mmcache-publish"}


@pytest.mark.parametrize(
    ("error", "kind", "number"),
    [
        (mmcache.DiskFullError(errno.ENOSPC, "no room", "c.0"), mmcache.DiskFullError, errno.ENOSPC),
        (mmcache.WriteError(errno.EIO, "bad", "c.0"), mmcache.WriteError, errno.EIO),
        (mmcache.CorruptError("bad bytes"), mmcache.CorruptError, None),
        (ZeroDivisionError("a bug"), mmcache.WriteError, None),
        (KeyboardInterrupt(), mmcache.WriteError, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_keeps_its_class_and_number(error, kind, number):
    pipeline = Pipeline(SLOT_BYTES)
    pipeline.submit(Note("fails", [], fails="write", error=error))
    with pytest.raises(mmcache.MmcacheError) as caught:
        pipeline.drain()
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    if number is not None:
        assert (caught.value.errno, caught.value.filename) == (number, "c.0")
    # Asked again, it says so again.
    with pytest.raises(kind):
        pipeline.check()
    pipeline.close()


def test_two_are_written_at_once_and_published_in_order_however_they_end(pipeline):
    both, later, notes = threading.Barrier(2), threading.Event(), []

    class Slow(Note):
        def write(self):
            both.wait(30)  # for ever, if they were written one after the other
            if self.name == 0:
                later.wait(30)
            super().write()
            later.set()

    for number in range(2):
        pipeline.submit(Slow(number, notes))
    pipeline.drain()
    passed = [(stage, name) for stage, name, _ in notes if stage != "digest"]
    assert passed == [("write", 1), ("write", 0), ("publish", 0), ("publish", 1)]


@pytest.mark.parametrize("fails", ["digest", "write", "publish"])
def test_nothing_is_abandoned_while_it_is_written(fails):
    begun, go, notes = threading.Event(), threading.Event(), []

    class Before(Note):
        def publish(self):
            begun.wait(30)
            super().publish()

    class Held(Note):
        def write(self):
            begun.set()
            go.wait(30)
            super().write()

    pipeline = Pipeline(SLOT_BYTES)
    pipeline.submit(Before("before", notes, fails="publish" if fails == "publish" else None))
    pipeline.submit(Held("held", notes))
    assert begun.wait(30)
    pipeline.submit(Note("fails", notes, fails=fails))
    deadline = time.monotonic() + 30
    while pipeline._failure is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert ("abandon", "held") not in [note[:2] for note in notes]
    go.set()
    with pytest.raises(mmcache.WriteError, match="asked to fail"):
        pipeline.drain()
    pipeline.close()
    assert [note[:2] for note in notes if note[0] == "abandon"][-2:] == [("abandon", "held"), ("abandon", "fails")]


def test_what_the_end_of_python_cancels_is_a_failure():
    go, notes = threading.Event(), []

    class Held(Note):
        def write(self):
            go.wait(30)
            super().write()

    pipeline = Pipeline(SLOT_BYTES)
    for number in range(3):
        pipeline.submit(Held(number, notes))
    while not pipeline._jobs.empty():
        time.sleep(0.001)
    time.sleep(0.05)
    pipeline._writers.close()
    go.set()
    with pytest.raises(mmcache.ClosedError, match="Python ended"):
        pipeline.drain()
    assert [name for stage, name, _ in notes if stage == "publish"] == [0, 1]
    assert [name for stage, name, _ in notes if stage == "abandon"][:1] == [2]
    pipeline.close()


def test_drain_waits_for_all_that_came_before(pipeline):
    gate, notes = threading.Event(), []

    class Held(Note):
        def publish(self):
            gate.wait(30)
            super().publish()

    pipeline.submit(Held("held", notes))
    opener = threading.Thread(target=gate.set)
    opener.start()
    pipeline.drain()
    opener.join()
    assert notes[-1] == ("publish", "held", "mmcache-publish")


def test_close_ends_the_threads_and_refuses_more():
    before = set(threading.enumerate())
    notes = []
    pipeline = Pipeline(SLOT_BYTES)
    assert set(threading.enumerate()) == before, "threads start with the first job"
    pipeline.submit(Note(0, notes))
    assert {thread.name for thread in set(threading.enumerate()) - before} == {f"mmcache-{stage}" for stage in STAGES}
    pipeline.close()
    pipeline.close()
    assert ("publish", 0, "mmcache-publish") in notes
    assert set(threading.enumerate()) == before
    with pytest.raises(mmcache.ClosedError):
        pipeline.submit(Note(1, notes))


def test_slots_come_back_and_are_used_again(tmp_path):
    # Forty times what the ring has: it never gets more than its few slots.
    pipeline = Pipeline(1 << 18)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 1024, shard=1 << 16, chunk=1024)
    rows = torch.zeros(1 << 9, 1024)
    shard = shard_writer(tmp_path / "c", spec)
    addresses = set()
    for _ in range(20):
        stager.stage(shard, [rows])
        addresses |= {slot.memory.ctypes.data for slot in pipeline.ring._slots}
    stager.flush()
    pipeline.submit(Seal([shard], durable=True))
    pipeline.drain()
    assert len(addresses) == len(pipeline.ring._slots) <= 4
    # All of them are free again.
    taken = {pipeline.acquire().memory.ctypes.data for _ in range(4)}
    assert len(taken) == 4
    pipeline.close()


def test_waiting_for_a_slot_ends_when_the_pipeline_fails():
    pipeline = Pipeline(page := 4096)
    assert {len(pipeline.acquire().memory) for _ in range(4)} == {page}
    pipeline.submit(Note("fails", [], fails="digest"))
    with pytest.raises(mmcache.WriteError, match="asked to fail"):
        pipeline.acquire()
    pipeline.close()


def test_many_files_wait_for_their_sync_but_not_all(pipeline):
    # Each shard that waits for its sync holds descriptors: whoever submits more waits as well.
    gate, notes, most = threading.Event(), [], []

    class Held(Note):
        def publish(self):
            gate.wait(30)
            super().publish()

    def submit():
        for number in range(400):
            pipeline.submit(Held(number, notes))
            most.append(pipeline._open_files)

    thread = threading.Thread(target=submit)
    thread.start()
    while thread.is_alive() and pipeline._open_files < 128:
        time.sleep(0.001)
    gate.set()
    thread.join()
    pipeline.drain()
    assert max(most) <= 128
    assert pipeline._open_files == 0
    assert [name for at, name, _ in notes if at == "publish"] == list(range(400))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "rename", "fchmod"])
def test_a_shard_that_fails_leaves_nothing(tmp_path, monkeypatch, call):
    pipeline = Pipeline(SLOT_BYTES)
    stager, spec = Stager(pipeline), spec_of(torch.float32, 8)
    made = [shard_writer(tmp_path / f"c{number}", spec) for number in range(3)]
    real = getattr(os, call)

    def refuse(*args, **options):
        if threading.current_thread().name.startswith("mmcache-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    monkeypatch.setattr(os, call, refuse)
    for shard in made:
        stager.stage(shard, [torch.zeros(64, 8)])
    stager.flush()
    seal = Seal(made, durable=True)
    pipeline.submit(seal)
    with pytest.raises(mmcache.WriteError, match=r"c0"):
        pipeline.drain()
    pipeline.close()
    monkeypatch.undo()
    assert seal.done.is_set(), "whoever waits for the shard waits for ever"
    assert list(tmp_path.iterdir()) == []
