"""`create`, `append`, `commit`: what goes in comes out, and what fails, or crashes, leaves the last commit."""

import errno
import json
import os
import threading
import time

import numpy as np
import pytest
import torch

import mmcache
from mmcache.system.atomic import AtomicFile
from mmcache.write.token_columns import publish_columns
from stores_and_processes import (
    DTYPES,
    FORKS,
    Recorder,
    Twin,
    abandon,
    damage,
    file_descriptors,
    fill,
    flip,
    forked,
    python,
    random_bits,
    raw,
    same,
    shards,
    tree,
    without_sync,
)

pytestmark = pytest.mark.portable

LAYOUTS = ("layer", "token")
SITES = {"mlp_in": 8, "mlp_out": 24}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "acts"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


def make(path, sites=None, n_layers=2, dtype=torch.float32, special=(), **options):
    """Create a store and its twin."""
    sites = sites or SITES
    writer = mmcache.create(path, sites=sites, n_layers=n_layers, dtype=dtype, special_tokens=special, **options)
    return writer, Twin(sites, n_layers, dtype, special)


def random_batch(twin, *shape, seed=0, dtype=None):
    """Give random activations for tokens of a shape: `[n_layers, *shape, d_model]` a site."""
    return {
        site: random_bits(twin.n_layers, *shape, width, dtype=dtype or twin.dtype, seed=seed + number)
        for number, (site, width) in enumerate(twin.sites.items())
    }


# What goes in comes out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_many_sequences_come_back_bit_for_bit(path, layout, dtype, n_layers):
    writer, twin = make(path, {"a": 1, "b": 7, "c": 64}, n_layers, dtype, layout=layout)
    with writer:
        for number, length in enumerate([1, 5, 300, 2]):
            tokens, rows = torch.arange(length), random_batch(twin, length, seed=number * 10)
            writer.append(tokens, rows)
            twin.append(tokens, rows)
        assert (writer.n_tokens, writer.n_sequences) == (308, 4)
    twin.check_path(path)
    with mmcache.open(path) as store:
        assert (store.layout, store.n_layers) == (layout, n_layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_run_over_the_edges_of_shards(path, layout):
    writer, twin = make(path, layout=layout, shard_tokens=256)
    with writer:
        for number, length in enumerate([255, 1, 1, 256, 700, 256, 3]):
            fill(twin, writer, length, seed=number)
    assert len(shards(path / "mlp_in")) == 6 * (2 if layout == "layer" else 1)
    twin.check_path(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 77, 255, 256, 257])
def test_appending_in_pieces_is_appending_at_once(tmp_path, layout, step):
    total = 600 if step > 1 else 260
    whole, twin = make(tmp_path / "whole", layout=layout, shard_tokens=256)
    with whole:
        fill(twin, whole, total, seed=5)
    pieces, _ = make(tmp_path / "pieces", layout=layout, shard_tokens=256)
    with pieces:
        for start in range(0, total, step):
            part = slice(start, start + step)
            rows = {site: rows[:, part] for site, rows in twin.rows.items()}
            pieces.append(twin.tokens[part], rows, continues=start > 0)
    twin.check_path(tmp_path / "pieces")
    with mmcache.open(tmp_path / "whole") as one, mmcache.open(tmp_path / "pieces") as other:
        for site in twin.sites:
            for name, found in vars(one[site].statistics).items():
                assert raw(found) == raw(getattr(other[site].statistics, name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_its_rows(path, layout):
    writer, twin = make(path, layout=layout)
    tokens = torch.arange(12).view(3, 4)
    rows = random_batch(twin, 3, 4)
    with writer:
        writer.append(tokens, rows)
    for row in range(3):
        twin.append(tokens[row], {site: values[:, row] for site, values in rows.items()})
    twin.check_path(path)


FORMS = {
    "tensor": lambda values: values,
    "int32 tensor": lambda values: values.to(torch.int32),
    "lists": lambda values: values.tolist(),
    "numpy": lambda values: values.numpy(),
    "numpy uint16": lambda values: values.numpy().astype(np.uint16),
    "list of arrays": lambda values: list(values.numpy()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batched", [False, True])
def test_tokens_masks_and_flags_in_any_form(path, form, batched):
    shape = (2, 6) if batched else (6,)
    tokens = torch.arange(12 if batched else 6).view(shape)
    flags, mask = tokens * 16 % 256, torch.ones(shape, dtype=torch.int64)
    writer, twin = make(path)
    rows = random_batch(twin, *shape)
    with writer:
        writer.append(FORMS[form](tokens), rows, attention_mask=FORMS[form](mask), flags=FORMS[form](flags))
    for row in range(2 if batched else 1):
        pick = (slice(None), row) if batched else slice(None)
        inner = row if batched else slice(None)
        twin.append(tokens[inner], {site: values[pick] for site, values in rows.items()}, flags[inner])
    twin.check_path(path)


ACTIVATIONS = {
    "a list of layers": list,
    "a tuple of layers": tuple,
    "transposed": lambda rows: rows.transpose(1, -1).contiguous().transpose(1, -1),
    "layers last": lambda rows: rows.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other row of a larger one": lambda rows: rows.repeat_interleave(2, dim=1)[:, ::2],
    "with grad": lambda rows: rows.clone().requires_grad_(),
    "layers of a graph": lambda rows: [layer.clone().requires_grad_() * 1 for layer in rows],
}


@pytest.mark.parametrize("form", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_activations_in_any_form(path, form, layout, shape):
    writer, twin = make(path, layout=layout)
    rows = {site: torch.randn(2, *shape, width) for site, width in SITES.items()}
    with writer:
        writer.append(
            torch.zeros(shape, dtype=torch.int64), {site: ACTIVATIONS[form](values) for site, values in rows.items()}
        )
    for row in range(shape[0] if len(shape) == 2 else 1):
        twin.append([0] * 6, {site: values[:, row] if len(shape) == 2 else values for site, values in rows.items()})
    twin.check_path(path)


MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "both": [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["int64", "bool", "lists"])
def test_padding_is_not_stored(path, kind, layout, form):
    mask = torch.tensor(MASKS[kind])
    tokens = torch.arange(15).view(3, 5)
    writer, twin = make(path, layout=layout, special=[0, 2, 7])
    rows = random_batch(twin, 3, 5)
    given = {"int64": mask, "bool": mask.bool(), "lists": mask.tolist()}[form]
    with writer:
        writer.append(tokens, rows, attention_mask=given, flags=tokens * 8)
    for row in range(3):
        kept = mask[row].bool()
        twin.append(
            tokens[row][kept], {site: values[:, row][:, kept] for site, values in rows.items()}, tokens[row][kept] * 8
        )
    twin.check_path(path)


def test_flags_mark_the_special_tokens(path):
    writer, _ = make(path, {"a": 2}, 1, special=[0, 9])
    with writer:
        writer.append([0, 5, 9, 6], {"a": torch.zeros(1, 4, 2)})
        writer.append([5, 0, 6], {"a": torch.zeros(1, 3, 2)}, flags=[1, 128, 2])
        # Going on with a sequence begins none.
        writer.append([9, 5], {"a": torch.zeros(1, 2, 2)}, continues=True)
        writer.append([9], {"a": torch.zeros(1, 1, 2)})
    with mmcache.open(path) as store:
        assert store.flags.tolist() == [7, 0, 2, 0, 4 | 1, 128 | 2, 2, 2, 0, 7]
        assert [tuple(span) for span in store.sequences] == [(0, 4, 0), (4, 9, 1), (9, 10, 2)]


def test_statistics_leave_special_tokens_out(path):
    rows = torch.randn(1, 300, 4, dtype=torch.float64)
    rows[0, ::10] *= 1e6
    tokens = torch.ones(300, dtype=torch.int64)
    tokens[::10] = 0
    flags = torch.zeros(300, dtype=torch.int64)
    flags[7] = 1  # the user's own BOS
    flags[8] = 64  # the user's own bit, which hides nothing
    for layout in LAYOUTS:
        writer, _ = make(path / layout, {"a": 4}, 1, torch.float64, special=[0], layout=layout)
        with writer:
            writer.append(tokens[:150], {"a": rows[:, :150]}, flags=flags[:150])
            writer.commit()
            # The rest extends the shard: its first half is counted again from what is on disk.
            writer.append(tokens[150:], {"a": rows[:, 150:]}, flags=flags[150:])
        kept = rows[0][(tokens != 0) & (flags != 1)]
        with mmcache.open(path / layout) as store:
            found = store["a"].statistics
            assert found.rows.tolist() == [269]
            # A mean may lie as close to zero as chance will: it is right to the last bits of the rows, not its own.
            torch.testing.assert_close(found.mean[0], kept.mean(dim=0), rtol=0, atol=1e-14)
            torch.testing.assert_close(found.std[0], kept.std(dim=0, correction=0), rtol=1e-12, atol=0)
            torch.testing.assert_close(found.max_norm[0], kept.norm(dim=1).max(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow_is_counted_once_however_often_the_shard_is_rewritten(path, layout):
    writer, _ = make(path, {"a": 3}, 2, torch.float16, layout=layout)
    rows = torch.ones(2, 5, 3)
    rows[1, 2, 0] = rows[1, 4, 1] = 1e6
    with writer:
        for _ in range(3):
            writer.append([1] * 5, {"a": rows})
            writer.commit()
    with mmcache.open(path) as store:
        assert store["a"].statistics.overflow.tolist() == [0, 6]


def test_activations_are_cast_to_the_stores_dtype(path):
    writer, twin = make(path, dtype=torch.bfloat16)
    with writer:
        for number, dtype in enumerate(DTYPES):
            fill(twin, writer, 5, seed=number, dtype=dtype)
        mixed = {site: [torch.randn(3, width), torch.randn(3, width).double()] for site, width in SITES.items()}
        writer.append([1, 2, 3], mixed)
        twin.append(
            [1, 2, 3], {site: torch.stack([layer.bfloat16() for layer in layers]) for site, layers in mixed.items()}
        )
    twin.check_path(path)


def test_tensors_may_be_reused_after_append(path):
    writer, twin = make(path, {"a": 64}, 2)
    buffer = torch.empty(2, 500, 64)
    with writer:
        for number in range(6):
            writer.append([number] * 500, {"a": buffer.fill_(number)})
            twin.append([number] * 500, {"a": buffer.clone()})
        buffer.fill_(-1)
    twin.check_path(path)


def test_unknown_token_ids_are_minus_one(path):
    writer, _ = make(path, {"a": 2}, 1)
    with writer:
        writer.append([-1, 2**31 - 1], {"a": torch.zeros(1, 2, 2)})
    with mmcache.open(path) as store:
        assert store.tokens.tolist() == [-1, 2**31 - 1]


def test_metadata_comes_back(path):
    metadata = {"model": "gpt2", "nested": {"list": [1, 2.5, None, True], "text": "é"}}
    mmcache.create(path, sites={"a": 1}, n_layers=1, metadata=metadata).close()
    store = mmcache.open(path)
    assert store.metadata == metadata
    store.metadata["nested"]["list"].append("mine")
    assert store.metadata == metadata


def test_wide_rows_and_many_layers(path):
    # A row of the token layout is larger than a staging slot: 100 layers of 44,000 numbers.
    writer, _ = make(path, {"a": 44_000}, 100, torch.float32, layout="token")
    rows = torch.arange(100.0)[:, None, None].expand(100, 2, 44_000)
    with writer:
        writer.append([1, 2], {"a": rows})
    with mmcache.open(path) as store:
        assert torch.equal(store["a"].gather([1])[0], rows[:, 1])


def test_a_name_so_long_that_the_header_has_no_room_is_refused_at_once(path):
    with pytest.raises(mmcache.ArgumentError, match="header"):
        mmcache.create(path, sites={"é" * 90: 2}, n_layers=700, layout="token")
    assert not path.exists()


# Commit, extend, go on


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reopen", [False, True])
def test_partly_filled_shards_are_extended(path, layout, reopen):
    writer, twin = make(path, layout=layout, shard_tokens=256, special=[3])
    for number, length in enumerate([10, 1, 200, 45, 300, 1, 255]):
        fill(twin, writer, length, seed=number, continues=number in (2, 5))
        writer.commit()
        twin.check_path(path)
        if reopen:
            writer.close()
            writer = mmcache.append(path)
            assert (writer.n_tokens, writer.n_sequences) == (len(twin.tokens), len(twin.spans))
    writer.close()
    twin.check_path(path)


def test_commit_counts_and_append_alone_does_not(path):
    writer, twin = make(path)
    with writer:
        with mmcache.open(path) as store:
            assert (store.n_tokens, store.n_sequences) == (0, 0)
        fill(twin, writer, 5, seed=0)
        with mmcache.open(path) as store:
            assert (store.n_tokens, store.n_sequences) == (0, 0)
        writer.commit()
        twin.check_path(path)
        before = twin.copy()
        fill(twin, writer, 3, seed=1)
        before.check_path(path)
    twin.check_path(path)


def test_a_new_store_is_empty_but_has_its_shape(path):
    writer, twin = make(path, layout="layer", shard_tokens=512)
    writer.close()
    with mmcache.open(path) as store:
        twin.check(store)
        assert store.shard_tokens == 512
        assert store["mlp_out"].shape == (2, 0, 24)
        assert store["mlp_out"].get_layer(1).shape == (0, 24)
        assert store["mlp_out"].gather([]).shape == (0, 2, 24)


def test_shard_tokens_are_remembered_before_the_first_row(path):
    writer, twin = make(path, shard_tokens=256)
    writer.close()
    with mmcache.append(path) as writer:
        fill(twin, writer, 600, seed=0)
    assert mmcache.open(path).shard_tokens == 256
    twin.check_path(path)


def test_append_after_nothing_is_lost_or_changed(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 9, seed=0)
    before = tree(path)
    mmcache.append(path).close()
    assert tree(path) == before


def test_a_commit_without_news_writes_nothing(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 9, seed=0)
        writer.commit()
        before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
        writer.commit()
        assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_commit_makes_durable_before_it_renames_and_counts_last(path, monkeypatch, layout):
    writer, twin = make(path, layout=layout, shard_tokens=256)
    with writer:
        fill(twin, writer, 300, seed=0)
        writer.commit()
        recorder = Recorder(monkeypatch, path)
        fill(twin, writer, 300, seed=1)
        writer.commit()
        names = recorder.check(recorder.events)
    assert {"mlp_in/c.0.1.0", "mlp_out/c.0.2.0", "tokens/c.0", "flags/c.0", "sequences/c.0.0"} <= set(names)


def test_continues_goes_on_with_the_last_sequence_after_reopening(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 4, seed=0)
        fill(twin, writer, 4, seed=1)
    with mmcache.append(path) as writer:
        fill(twin, writer, 5, seed=2, continues=True)
    assert [tuple(span) for span in mmcache.open(path).sequences] == [(0, 4, 0), (4, 13, 1)]
    twin.check_path(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_shard_is_not_laundered(path, layout):
    # Extending a shard computes new checksums: old rows must be held to the old ones first.
    writer, twin = make(path, layout=layout, shard_tokens=256)
    with writer:
        fill(twin, writer, 100, seed=0)
    victim = shards(path / "mlp_out")[0]
    damage(victim, flip(4096 + 50))
    before = tree(path)
    writer = mmcache.append(path)
    with pytest.raises(mmcache.CorruptError, match=f"{victim.name}.*checksum"):
        fill(twin, writer, 10, seed=1)
    # Nothing was begun: the writer is as it was before.
    assert writer.n_tokens == 100
    writer.close()
    assert tree(path) == before


@pytest.mark.parametrize("array", ["tokens", "flags", "sequences"])
def test_damaged_columns_are_not_laundered(path, array):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 100, seed=0)
    damage(shards(path / array)[0], flip(4096 + 5))
    with pytest.raises(mmcache.CorruptError, match=array):
        mmcache.append(path)
    # The refusal let go of the lock.
    with pytest.raises(mmcache.CorruptError, match=array):
        mmcache.append(path)


def test_a_shard_that_is_gone_refuses_append(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 5, seed=0)
    shards(path / "mlp_in")[0].unlink()
    with pytest.raises(mmcache.CorruptError, match="1 of 1 shards of mlp_in are gone"):
        mmcache.append(path)


# One writer


def test_a_second_writer_is_refused(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 5, seed=0)
        before = tree(path)
        with pytest.raises(mmcache.LockedError, match=str(os.getpid())) as caught:
            mmcache.append(path)
        assert isinstance(caught.value, BlockingIOError)
        with pytest.raises(mmcache.StoreExistsError):
            mmcache.create(path, sites=SITES, n_layers=2)
        assert tree(path) == before
        fill(twin, writer, 5, seed=1)
    twin.check_path(path)
    mmcache.append(path).close()


@FORKS
def test_a_writer_in_another_process_is_named(path):
    writer, _ = make(path)
    parent = os.getpid()

    def refused():
        with pytest.raises(mmcache.LockedError, match=f'"pid": {parent}'):
            mmcache.append(path)

    with writer:
        assert forked(refused) == 0


@FORKS
def test_a_forked_process_leaves_the_writer_to_its_parent(path):
    # A data loader forks while a store is being written: the child must neither commit, nor wait for threads
    # that it does not have, nor let go of the lock.
    writer, twin = make(path)
    fill(twin, writer, 5, seed=0)

    def child():
        with pytest.raises(mmcache.ClosedError):
            writer.commit()
        with pytest.raises(mmcache.ClosedError):
            fill(twin, writer, 5, seed=1)
        writer.close()
        writer.__del__()

    assert forked(child) == 0
    with pytest.raises(mmcache.LockedError):
        mmcache.append(path)
    fill(twin, writer, 5, seed=1)
    writer.close()
    twin.check_path(path)


@FORKS
def test_the_lock_is_free_after_close_though_a_forked_process_lives(path):
    writer, twin = make(path)
    end, child_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(child_end)
        os.read(end, 1)
        os._exit(0)
    fill(twin, writer, 5, seed=0)
    writer.close()
    mmcache.append(path).close()
    os.close(child_end)
    os.waitpid(child, 0)
    os.close(end)


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_are_not(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 5, seed=0)
    litter = [
        path / folder / f".{name}.0123abcd.tmp"
        for folder, name in [(".", "zarr.json"), ("mlp_in", "c.0.0.0"), ("tokens", "c.0")]
    ]
    for file in litter:
        file.write_bytes(b"half")
    alive = AtomicFile(path, "mlp_in/c.9.9.9")
    mmcache.append(path).close()
    assert [file for file in litter if file.exists()] == []
    assert len([file for file in (path / "mlp_in").iterdir() if file.suffix == ".tmp"]) == 1
    alive.discard()
    twin.check_path(path)


# Crashes

CRASHES = """
import json, os, sys, torch, mmcache

torch.set_num_threads(1)
root, layout, seed, stops = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
SITES = {"a": 8, "b": 24}


def rows(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(2, length, width, generator=generator) for site, width in SITES.items()}


def job(path, done):
    writer = mmcache.create(path, sites=SITES, n_layers=2, dtype=torch.float32, layout=layout, shard_tokens=256,
                            special_tokens=[1])
    done()
    for number, steps in enumerate(json.loads(sys.argv[5])):
        for length, continues, step in steps:
            writer.append([step % 7] * length, rows(length, step), continues=continues)
        writer.commit()
        done()
    writer.close()


def counted(real, state):
    def call(*args, **options):
        state[0] -= 1
        if state[0] < 0:
            os._exit(9)
        return real(*args, **options)
    return call


for stop in stops:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        state = [stop]
        os.fsync = lambda fd: None
        for name in ("pwrite", "fsync", "rename", "ftruncate"):
            setattr(os, name, counted(getattr(os, name), state))
        tell = os.write
        try:
            job(f"{root}/{stop}", lambda: tell(write, b"."))
        except BaseException as error:
            print(stop, repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        print(json.dumps({"stop": stop, "used": stop - state[0]}), flush=True)
        os._exit(0)
    os.close(write)
    told = b""
    while part := os.read(read, 100):
        told += part
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"stop": stop, "committed": len(told), "code": code}), flush=True)
"""
# (tokens, continues, a number for the content): three commits that extend shards, sequences and blocks.
JOB = [[[100, False, 0], [30, True, 1]], [[20, True, 2], [300, False, 3]], [[5, False, 4], [600, True, 5]]]


def job_states():
    """Give what the store may hold after a crash: nothing yet, and after each commit."""
    twin = Twin({"a": 8, "b": 24}, 2, torch.float32, [1])
    states = [twin.copy()]
    for steps in JOB:
        for length, continues, step in steps:
            generator = torch.Generator().manual_seed(step)
            rows = {site: torch.randn(2, length, width, generator=generator) for site, width in twin.sites.items()}
            twin.append([step % 7] * length, rows, continues=continues)
        states.append(twin.copy())
    return states


def crashes(tmp_path, layout, stops):
    done = python(CRASHES, tmp_path, layout, 0, json.dumps(stops), json.dumps(JOB))
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_crash_anywhere_leaves_the_last_commit(tmp_path, layout, request):
    [used] = [said["used"] for said in crashes(tmp_path, layout, [10**6]) if "used" in said]
    assert used > 100
    stops = list(range(used))
    if not request.config.getoption("--slow"):
        # The first ones are the creation, the last ones a commit; the rest from all over.
        stops = sorted({*range(0, 24, 6), *range(used - 12, used, 4), *range(0, used, used // 9 | 1)})
    states = job_states()
    seen = set()
    for said in crashes(tmp_path, layout, stops):
        path = tmp_path / str(said["stop"])
        assert said["code"] == 9
        committed = said["committed"]
        try:
            store = mmcache.open(path)
        except mmcache.StoreNotFoundError:
            # Before its creation was over there is no store, and nothing in the way of making one.
            assert committed == 0
            mmcache.create(path, sites={"a": 8, "b": 24}, n_layers=2, dtype=torch.float32).close()
            continue
        with store:
            # What a commit returned from is there; the one under way is there whole or not at all.
            found = [number for number, twin in enumerate(states) if len(twin.tokens) == store.n_tokens]
            assert found[0] - committed in ((-1, 0) if committed else (0,)), (said, store)
            states[found[0]].check(store)
        seen.add(found[0])
        twin = states[found[0]].copy()
        with mmcache.append(path) as writer:
            fill(twin, writer, 40, seed=77, continues=bool(twin.spans) and said["stop"] % 2 == 0)
            writer.commit()
            fill(twin, writer, 300, seed=78)
        twin.check_path(path)
        assert not list(path.rglob("*.tmp"))
        with mmcache.open(path) as store:
            assert store["a"].statistics.rows.tolist() == [sum(not flag & 7 for flag in twin.flags)] * 2
    assert {0, 1, 2} <= seen


@pytest.mark.parametrize("continues", [False, True])
def test_a_sequence_that_a_crash_took_back_in_part_ends_where_it_ended(path, continues):
    writer, twin = make(path)
    fill(twin, writer, 10, seed=0)
    writer.commit()
    fill(twin.copy(), writer, 5, seed=1, continues=True)
    # As far as a crash may come before the commit: the small arrays are there already.
    writer._block.seal(writer._pipeline, writer._stager)
    writer._block = None
    writer._pipeline.drain()
    for column in writer._columns.values():
        publish_columns(path, [column])
    abandon(writer)
    twin.check_path(path)
    with mmcache.append(path) as writer:
        fill(twin, writer, 3, seed=2, continues=continues)
    twin.check_path(path)


def test_overflow_of_rows_that_a_crash_took_back_is_not_counted(path):
    writer, _ = make(path, {"a": 2}, 1, torch.float16)
    writer.append([1, 2], {"a": torch.tensor([[[1.0, 1e6], [1, 1]]])})
    writer.commit()
    writer.append([3, 4], {"a": torch.tensor([[[1e6, 1e6], [1, 1]]])})
    writer._block.seal(writer._pipeline, writer._stager)
    writer._block = None
    abandon(writer)
    with mmcache.append(path) as writer:
        writer.append([3, 4], {"a": torch.tensor([[[1e6, 1e6], [1, 1]]])})
    with mmcache.open(path) as store:
        assert store["a"].statistics.overflow.tolist() == [3]


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_torn_append_is_not_committed(path, monkeypatch, calls):
    # Control-C in the middle of an append that stages four pieces: two blocks of two sites.
    writer, twin = make(path, layout="token", shard_tokens=256)
    fill(twin, writer, 200, seed=0)
    writer.commit()
    stage, left = writer._stager.stage, [calls]

    def interrupted(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        stage(*args, **options)

    monkeypatch.setattr(writer._stager, "stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(twin.copy(), writer, 500, seed=1)
    monkeypatch.undo()
    for use in (lambda: fill(twin.copy(), writer, 1, seed=2), writer.commit, writer.close):
        with pytest.raises(mmcache.WriteError, match=r"append .* was interrupted half-way"):
            use()
    twin.check_path(path)
    with mmcache.append(path) as writer:
        fill(twin, writer, 500, seed=1)
    twin.check_path(path)
    assert not list(path.rglob("*.tmp"))


def test_an_interrupt_ends_a_with_block_as_itself(path, monkeypatch):
    writer, twin = make(path)
    fill(twin, writer, 5, seed=0)
    writer.commit()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def fail():
        with writer:
            monkeypatch.setattr(writer._stager, "stage", interrupted)
            fill(twin.copy(), writer, 5, seed=1)

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert "interrupted half-way" in caught.value.__notes__[0]
    twin.check_path(path)


# Failures of the disk


def refusing(monkeypatch, call, number, *, when):
    """Let a call to the system fail wherever `when` says so of the thread's name."""
    real = getattr(os, call)

    def refuse(*args, **options):
        if when(threading.current_thread().name):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, call, refuse)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("where", ["behind", "commit"])
def test_a_full_disk_keeps_the_last_commit(path, monkeypatch, call, where):
    writer, twin = make(path, shard_tokens=256)
    fill(twin, writer, 300, seed=0)
    writer.commit()
    background = where == "behind"
    refusing(monkeypatch, call, errno.ENOSPC, when=lambda name: name.startswith("mmcache-") == background)
    fill(twin.copy(), writer, 100, seed=1)
    with pytest.raises(mmcache.DiskFullError) as caught:
        writer.commit()
    assert caught.value.filename.startswith(str(path))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(mmcache.DiskFullError):
        writer.close()
    monkeypatch.undo()
    twin.check_path(path)
    assert not list(path.rglob("*.tmp"))
    with mmcache.append(path) as writer:
        fill(twin, writer, 100, seed=1)
    twin.check_path(path)


def test_a_commit_that_met_a_full_disk_can_be_repeated(path, monkeypatch):
    # The shards were written; only the small arrays were refused. With room made, nothing is lost.
    writer, twin = make(path)
    fill(twin, writer, 30, seed=0)
    refusing(monkeypatch, "pwrite", errno.ENOSPC, when=lambda name: not name.startswith("mmcache-"))
    with pytest.raises(mmcache.DiskFullError):
        writer.commit()
    monkeypatch.undo()
    writer.commit()
    twin.check_path(path)
    writer.close()
    twin.check_path(path)


def test_many_small_shards_need_few_descriptors(path, monkeypatch):
    # On a disk where a sync takes longer than a write, shards that wait for theirs must not pile up open.
    most = [0]
    fsync = os.fsync

    def slow(fd):
        time.sleep(0.0005)
        most[0] = max(most[0], file_descriptors())
        fsync(fd)

    before = file_descriptors()
    monkeypatch.setattr(os, "fsync", slow)
    writer, twin = make(path, {"a": 8}, 4, layout="layer", shard_tokens=128)
    with writer:
        fill(twin, writer, 128 * 100, seed=0)
    assert len(shards(path / "a")) == 400
    assert most[0] - before < 200
    twin.check_path(path)


# What is refused: with a clear error, and nothing written

GOOD = {"mlp_in": torch.zeros(2, 3, 8), "mlp_out": torch.zeros(2, 3, 24)}
REFUSED = {
    "ragged tokens": (([[1, 2], [3]], GOOD), mmcache.ShapeError, "tokens are rows of different lengths"),
    "float tokens": ((torch.ones(3), GOOD), mmcache.DtypeError, "tokens are float32: expected integers"),
    "text": ((["a", "b", "c"], GOOD), mmcache.DtypeError, "tokens are .*: expected integers"),
    "three dimensions": (
        (torch.ones(1, 1, 3, dtype=torch.int64), GOOD),
        mmcache.ShapeError,
        r"tokens have shape \[1, 1, 3\]",
    ),
    "one token id": ((torch.tensor(1), GOOD), mmcache.ShapeError, r"tokens have shape \[\]"),
    "too large a token": (([1, 2, 2**31], GOOD), mmcache.ArgumentError, "tokens range from 1 to 2147483648"),
    "too small a token": (([1, 2, -2], GOOD), mmcache.ArgumentError, "tokens range from -2"),
    "an unsigned token that would wrap": (
        (np.array([1, 2, 2**64 - 1], np.uint64), GOOD),
        mmcache.ArgumentError,
        "tokens range",
    ),
    "no tokens": (
        ([], {site: torch.zeros(2, 0, width) for site, width in SITES.items()}),
        mmcache.ArgumentError,
        "without tokens",
    ),
    "another length": (
        ([1, 2], GOOD),
        mmcache.ShapeError,
        r"layer 0 of 'mlp_in' has shape \[3, 8\]: expected \[2, 8\]",
    ),
    "no batch in the activations": (([[1, 2, 3]], GOOD), mmcache.ShapeError, r"expected \[1, 3, 8\]"),
    "another width": (
        ([1, 2, 3], GOOD | {"mlp_out": torch.zeros(2, 3, 23)}),
        mmcache.ShapeError,
        r"\[3, 23\]: expected \[3, 24\]",
    ),
    "too many layers": (
        ([1, 2, 3], GOOD | {"mlp_out": torch.zeros(3, 3, 24)}),
        mmcache.ShapeError,
        "have 3 layers: expected 2",
    ),
    "too few layers": (
        ([1, 2, 3], GOOD | {"mlp_out": [torch.zeros(3, 24)]}),
        mmcache.ShapeError,
        "have 1 layers: expected 2",
    ),
    "a number for activations": (
        ([1, 2, 3], GOOD | {"mlp_out": torch.tensor(1.0)}),
        mmcache.ShapeError,
        "are one number",
    ),
    "a missing site": (
        ([1, 2, 3], {"mlp_in": GOOD["mlp_in"]}),
        mmcache.UnknownSiteError,
        r"expected exactly \['mlp_in', 'mlp_out'\]",
    ),
    "another site": (([1, 2, 3], GOOD | {"resid": GOOD["mlp_in"]}), mmcache.UnknownSiteError, "resid"),
    "no dict": (([1, 2, 3], GOOD["mlp_in"]), mmcache.DtypeError, "activations are a Tensor: expected a dict"),
    "integer activations": (
        ([1, 2, 3], GOOD | {"mlp_out": torch.zeros(2, 3, 24, dtype=torch.int64)}),
        mmcache.DtypeError,
        "int64",
    ),
    "array activations": (
        ([1, 2, 3], GOOD | {"mlp_out": np.zeros((2, 3, 24))}),
        mmcache.DtypeError,
        "is a ndarray: expected a torch tensor",
    ),
    "activations without data": (
        ([1, 2, 3], GOOD | {"mlp_out": torch.zeros(2, 3, 24, device="meta")}),
        mmcache.DtypeError,
        "meta",
    ),
    "mask of another shape": (
        ([1, 2, 3], GOOD, [1, 1]),
        mmcache.ShapeError,
        r"attention_mask has shape \[2\]: expected \[3\]",
    ),
    "mask of zeros": (([1, 2, 3], GOOD, [0, 0, 0]), mmcache.ArgumentError, "row 0 of attention_mask is all zeros"),
    "mask of twos": (([1, 2, 3], GOOD, [1, 2, 1]), mmcache.ArgumentError, "attention_mask range from 1 to 2"),
    "an additive mask": (
        ([1, 2, 3], GOOD, torch.tensor([0.0, -1e9, 0.0])),
        mmcache.DtypeError,
        "attention_mask are float32",
    ),
    "flags of another shape": (([1, 2, 3], GOOD, None, [[1, 1, 1]]), mmcache.ShapeError, r"flags has shape \[1, 3\]"),
    "flags too large": (([1, 2, 3], GOOD, None, [0, 256, 0]), mmcache.ArgumentError, "flags range from 0 to 256"),
    "negative flags": (([1, 2, 3], GOOD, None, [0, -1, 0]), mmcache.ArgumentError, "flags range from -1"),
    "two sequences that continue": (
        ([[1], [2]], {site: torch.zeros(2, 2, 1, width) for site, width in SITES.items()}, None, None, True),
        mmcache.ArgumentError,
        "found 1 in the store and 2 in the call",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_append_that_does_not_fit_is_refused(path, kind):
    arguments, error, message = REFUSED[kind]
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 5, seed=0)
        writer.commit()
        before = tree(path)
        with pytest.raises(error, match=message):
            writer.append(*arguments)
        assert tree(path) == before
        # The refusal left nothing behind that could hurt the next one.
        fill(twin, writer, 5, seed=1)
    twin.check_path(path)


def test_the_second_of_two_sites_is_checked_before_the_first_is_kept(path):
    writer, twin = make(path)
    with writer:
        with pytest.raises(mmcache.ShapeError):
            writer.append([1, 2, 3], {"mlp_in": torch.zeros(2, 3, 8), "mlp_out": torch.zeros(2, 3, 8)})
        assert (writer.n_tokens, writer.n_sequences) == (0, 0)
    twin.check_path(path)


def test_continues_needs_a_sequence(path):
    writer, _ = make(path)
    with writer:
        before = tree(path)
        with pytest.raises(mmcache.ArgumentError, match="found 0 in the store and 1 in the call"):
            writer.append([1, 2, 3], GOOD, continues=True)
        assert tree(path) == before


def test_an_empty_batch_is_nothing(path):
    writer, twin = make(path)
    with writer:
        writer.append(
            torch.empty(0, 5, dtype=torch.int64), {site: torch.zeros(2, 0, 5, width) for site, width in SITES.items()}
        )
    twin.check_path(path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sites": {}}, mmcache.ArgumentError),
        ({"sites": {"a": 0}}, mmcache.ArgumentError),
        ({"sites": {"a": -1}}, mmcache.ArgumentError),
        ({"sites": {"a": 1.5}}, mmcache.ArgumentError),
        ({"sites": {"tokens": 4}}, mmcache.ArgumentError),
        ({"sites": {"statistics": 4}}, mmcache.ArgumentError),
        ({"sites": {"a/b": 4}}, mmcache.ArgumentError),
        ({"sites": {"": 4}}, mmcache.ArgumentError),
        ({"sites": {".a": 4}}, mmcache.ArgumentError),
        ({"n_layers": 0}, mmcache.ArgumentError),
        ({"n_layers": 1.0}, mmcache.ArgumentError),
        ({"layout": "tokens"}, mmcache.ArgumentError),
        ({"dtype": torch.int8}, mmcache.DtypeError),
        ({"dtype": "float8"}, mmcache.DtypeError),
        ({"shard_tokens": 0}, mmcache.ArgumentError),
        ({"shard_tokens": 1000}, mmcache.ArgumentError),
        ({"metadata": {"a": torch.ones(1)}}, mmcache.ArgumentError),
        ({"metadata": {"a": float("nan")}}, mmcache.ArgumentError),
        ({"metadata": {1: "a"}}, mmcache.ArgumentError),
    ],
    ids=str,
)
def test_create_refuses_what_makes_no_sense(path, options, error):
    with pytest.raises(error):
        mmcache.create(path, **{"sites": {"a": 4}, "n_layers": 1} | options)
    assert not path.exists()


@pytest.mark.parametrize("name", ["a", "tokens", "zarr.json"])
def test_create_refuses_a_path_that_is_taken(path, name):
    path.mkdir()
    (path / name).write_text("mine")
    with pytest.raises(mmcache.StoreExistsError, match=r"already holds"):
        mmcache.create(path, sites={"a": 4}, n_layers=1)
    assert tree(path) == {name: b"mine"}


def test_append_refuses_what_create_did_not_make(tmp_path, path):
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.append(path)
    assert not path.exists()
    with mmcache.FullActivationCache.with_capacity(1, path) as cache:
        cache.push(torch.ones(2, 2))
    before = tree(path)
    with pytest.raises(mmcache.ReadOnlyError, match="made by a FullActivationCache"):
        mmcache.append(path)
    assert tree(path) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.append(tmp_path / "file")


def test_a_closed_writer_refuses(path):
    writer, twin = make(path)
    fill(twin, writer, 5, seed=0)
    writer.close()
    before = tree(path)
    with pytest.raises(mmcache.ClosedError, match="was closed"):
        fill(twin.copy(), writer, 5, seed=1)
    with pytest.raises(mmcache.ClosedError):
        writer.commit()
    writer.close()
    assert tree(path) == before
    assert repr(writer) == f"Writer({str(path)!r}, closed)"


def test_repr_counts(path):
    writer, twin = make(path)
    with writer:
        fill(twin, writer, 5, seed=0)
        assert repr(writer) == f"Writer({str(path)!r}, n_tokens=5, n_sequences=1)"


def test_a_dropped_writer_commits_with_a_warning(path):
    writer, twin = make(path)
    fill(twin, writer, 5, seed=0)
    with pytest.warns(ResourceWarning, match="never closed"):
        del writer
    twin.check_path(path)


def test_writers_that_are_never_closed_are_closed_when_python_ends(tmp_path):
    # Some of them fail, wherever they stand in the order: the others are committed all the same.
    code = (
        "import sys, torch, mmcache\n"
        "writers = [mmcache.create(f'{sys.argv[1]}/{number}', sites={'a': 2}, n_layers=1) for number in range(12)]\n"
        "for number, writer in enumerate(writers):\n"
        "    writer.append([1], {'a': torch.ones(1, 1, 2)})\n"
        "    writer._torn = 'append' if number % 4 == 0 else None\n"
    )
    done = python(code, tmp_path)
    assert "interrupted half-way" in done.stderr
    assert [mmcache.open(tmp_path / str(number)).n_tokens for number in range(12)] == [0, 1, 1, 1] * 3


def test_a_store_made_by_pieces_is_the_same_wherever_the_rows_came_from(path):
    # What one store gives can be put into another, without a detour.
    writer, twin = make(path / "one")
    with writer:
        fill(twin, writer, 50, seed=0)
    with mmcache.open(path / "one") as store:
        other, copied = make(path / "two", layout="layer")
        with other:
            for number, span in enumerate(store.sequences):
                rows = {site: store[site].sequence(number) for site in store.sites}
                other.append(store.tokens[span.start : span.stop], rows)
                copied.append(store.tokens[span.start : span.stop], rows)
    copied.check_path(path / "two")
    assert same(mmcache.open(path / "two")["mlp_in"].get_layer(0), twin.rows["mlp_in"][0])


def test_a_store_of_nothing_yet_can_be_read(tmp_path):
    mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=2).close()
    with mmcache.open(tmp_path / "acts") as store:
        assert store.tokens.shape == store.flags.shape == (0,)
        assert len(store.sequences) == 0
        assert store["a"].gather([]).shape == (0, 2, 4)
    assert mmcache.verify(tmp_path / "acts").ok
