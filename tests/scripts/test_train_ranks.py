"""Several ranks on one store, as torchrun starts them: each token once, one set of weights, and each byte read once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmcache
from clt_trainer import SCRIPT, command, files, load_script, log, make_store, run
from mmcache.system.syscalls import LINUX
from mmcache.training.token_filter import Split, members
from stores_and_processes import shards, without_sync

PART = Path(__file__).parents[1] / "helpers" / "train_rank.py"
# Two epochs.
STEPS = 66


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture(scope="module", autouse=True)
def _alike():
    # torchrun gives each of its ranks one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        return make_store(tmp_path_factory.mktemp("ranks") / "acts", dtype=torch.bfloat16)


def launch(folder, arguments, *, ranks=2, nodes=1, kill=""):
    """Run `train_rank.py` under torchrun, one for each machine; give the exit codes, what was said, and the notes."""
    notes = folder / f"notes-{len(list(folder.iterdir()))}"
    notes.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--master-addr=127.0.0.1", f"--master-port={port}", f"--nnodes={nodes}"]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KILL": kill}
    place += [f"--nproc-per-node={ranks // nodes}"]
    words = [sys.executable, "-m", "torch.distributed.run", *place]
    pipes = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*words, f"--node-rank={node}", PART, notes, *arguments], **pipes) for node in range(nodes)
    ]
    said = [one.communicate(timeout=120) for one in started]
    found = [json.loads(file.read_text()) for file in sorted(notes.iterdir())]
    return SimpleNamespace(
        codes=[one.returncode for one in started],
        stdout="".join(out for out, _ in said),
        stderr="".join(err for _, err in said),
        notes=found,
    )


def trained(folder, store, out, *, ranks=2, nodes=1, **options):
    done = launch(folder, command(store, out, **options), ranks=ranks, nodes=nodes)
    assert done.codes == [0] * nodes, done.stderr
    assert len(done.notes) == ranks
    return done


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """Give a run of two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    done = trained(folder, store, folder / "out", steps=STEPS)
    return SimpleNamespace(out=folder / "out", **vars(done))


def training_positions(store):
    chosen = members(Split("train"), store)
    at = [np.arange(start, stop) for (start, stop, *_), one in zip(store.sequences, chosen, strict=True) if one]
    at = np.concatenate(at)
    return at[(store.flags.numpy()[at] & 3) == 0].tolist()


def epochs_of(notes):
    """Give the positions that all ranks together saw, by epoch."""
    found = {}
    for note in notes:
        for epoch, positions in note["steps"]:
            found.setdefault(epoch, []).extend(positions)
    return {epoch: sorted(positions) for epoch, positions in found.items()}


def test_two_ranks_see_every_token_once_an_epoch_and_end_with_one_set_of_weights(store, whole):
    every = training_positions(store)
    assert epochs_of(whole.notes) == {0: every, 1: every}
    sizes = [[len(positions) for _, positions in note["steps"]] for note in whole.notes]
    assert len(sizes[0]) == STEPS
    # Equally many tokens for both, but for the end of an epoch.
    assert max(abs(one - other) for one, other in zip(*sizes, strict=True)) <= 1
    assert sizes[0][:32] == [32] * 32
    assert whole.notes[0]["weights"] == whole.notes[1]["weights"]
    assert [entry["step"] for entry in log(whole.out)] == list(range(1, STEPS + 1))
    # Only one of them says how far it is, and what came of it.
    assert whole.stderr.count("step 66  loss") == 1
    assert whole.stdout.count("held-out tokens") == 1
    assert "Traceback" not in whole.stderr
    assert "Warning" not in whole.stderr


def test_they_have_the_losses_of_one_process_up_to_rounding(script, store, whole, tmp_path, monkeypatch):
    take, steps = script.Run.take, []

    def noted(self, batch):
        steps.append(sorted(batch.positions.tolist()))
        return take(self, batch)

    monkeypatch.setattr(script.Run, "take", noted)
    without_sync(monkeypatch)
    assert run(script, store, tmp_path / "one", steps=STEPS).exit_code == 0
    together = zip(*(note["steps"] for note in whole.notes), strict=True)
    assert steps == [sorted(place for _, positions in ranks for place in positions) for ranks in together]
    for name in ("loss", "error", "l0"):
        one, two = ([entry[name] for entry in log(out)] for out in (tmp_path / "one", whole.out))
        np.testing.assert_allclose(two[:10], one[:10], rtol=1e-5)
        np.testing.assert_allclose(two, one, rtol=1e-2)
    measured = [json.loads((out / "evaluation.json").read_text()) for out in (tmp_path / "one", whole.out)]
    assert measured[0]["tokens"] == measured[1]["tokens"]
    assert measured[1]["mean_explained_variance"] == pytest.approx(measured[0]["mean_explained_variance"], abs=0.01)


def test_killed_it_goes_on_as_if_nothing_had_been_and_also_alone(script, store, whole, tmp_path, monkeypatch):
    out, alone = tmp_path / "killed", tmp_path / "alone"
    # In the middle of the second epoch, of which the last checkpoint is a few steps behind.
    done = launch(tmp_path, command(store, out, steps=STEPS), kill="1:46")
    assert done.codes != [0]
    assert not (out / "config.yaml").exists()
    shutil.copytree(out, alone)
    again = trained(tmp_path, store, out, steps=STEPS)
    assert files(out) == files(whole.out)
    assert {note["weights"] for note in again.notes} == {note["weights"] for note in whole.notes}
    assert [note["steps"] for note in again.notes] == [note["steps"][42:] for note in whole.notes]
    # One rank goes on where two were, with the very tokens that are left.
    take, steps = script.Run.take, []

    def noted(self, batch):
        steps.append(sorted(batch.positions.tolist()))
        return take(self, batch)

    monkeypatch.setattr(script.Run, "take", noted)
    without_sync(monkeypatch)
    assert run(script, store, alone, steps=STEPS).exit_code == 0
    left = zip(*(note["steps"][42:] for note in whole.notes), strict=True)
    assert steps == [sorted(place for _, positions in ranks for place in positions) for ranks in left]
    np.testing.assert_allclose(*([entry["loss"] for entry in log(path)] for path in (alone, whole.out)), rtol=1e-2)


def test_topk_has_one_cutoff_on_all_ranks_also_where_one_has_no_token_left(tmp_path):
    few = make_store(tmp_path / "acts", [8] * 6)
    every = training_positions(few)
    # A token for each rank, and one at the end of an epoch.
    assert len(every) % 2 == 1
    done = trained(tmp_path, few, tmp_path / "out", activation="topk", batch_size=2, steps=len(every) + 1)
    assert epochs_of(done.notes) == {0: every, 1: every}
    assert [len(positions) for _, positions in done.notes[1]["steps"]].count(0) == 2
    assert len({note["weights"] for note in done.notes}) == 1
    # Each rank keeps k of its own tokens' features: all of them together do.
    assert all(entry["l0"] == pytest.approx(4) for entry in log(tmp_path / "out"))


def test_a_batch_that_ranks_cannot_share_is_refused(script, store):
    options = SimpleNamespace(batch_size=65, shuffle="global", seed=0)
    with pytest.raises(mmcache.ArgumentError, match="--batch-size is 65: expected a multiple of 2 ranks"):
        script.feeds(store, options, script.ranks.Ranks(1, 2, "cpu"))


def test_what_breaks_because_another_rank_has_ended_says_so(script, monkeypatch):
    def fail(_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    assert script.ranks.Ranks(0, 1, "cpu").sum(torch.ones(1)) == 1
    with pytest.raises(mmcache.MmcacheError, match=r"another rank has ended: see what it said \(Connection closed"):
        script.ranks.Ranks(0, 2, "cpu").sum(torch.ones(1))


def wide_store(path, tokens=12_288):
    """Make a store of 48 MiB, in both sites together."""
    with mmcache.create(
        path, sites={"mlp_in": 256, "mlp_out": 256}, n_layers=4, special_tokens=[0], dtype=torch.bfloat16
    ) as writer:
        for start in range(0, tokens, 512):
            rows = torch.randn(4, 512, 256, generator=torch.Generator().manual_seed(start))
            writer.append(torch.ones(512, dtype=torch.int32), {"mlp_in": rows, "mlp_out": rows.relu()})
    return mmcache.open(path)


def data_files(store):
    return [file for site in store.sites for file in shards(store.path / site)]


def make_cold(store):
    """Drop its rows from the page cache, or skip where they stay."""
    store.close()
    for file in data_files(store):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(fd, [bytearray(1)], 1 << 20, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:
                pytest.skip("this file system does not say what is in memory")
            pytest.skip("files stay in memory here")
        finally:
            os.close(fd)


@pytest.mark.skipif(not LINUX or not Path("/proc/self/io").exists(), reason="the system does not tell what is read")
@pytest.mark.parametrize("nodes", [1, 2])
def test_blocks_are_read_once_by_all_ranks_together(tmp_path, nodes):
    store = wide_store(tmp_path / "acts")
    size = sum(file.stat().st_size for file in data_files(store))
    make_cold(store)
    done = launch(tmp_path, ["feed", store.path], ranks=2, nodes=nodes)
    assert done.codes == [0] * nodes, done.stderr
    assert epochs_of(done.notes) == {0: list(range(store.n_tokens))}
    read = [note["read"] for note in done.notes]
    # Some of it the system has read ahead by itself.
    assert 0.2 * size < sum(read) < 1.3 * size
    if nodes > 1:
        # Each machine has a half for itself, whatever the other's memory holds.
        assert max(read) < 0.65 * size
