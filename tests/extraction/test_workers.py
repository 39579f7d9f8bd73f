"""One job by several real processes, as torchrun and job arrays start them: the store is that of one process."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mmcache

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

SHARDS = 60
DEADLINE = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    small.llama().save_pretrained(folder / "model")
    small.byte_tokenizer().save_pretrained(folder / "model")
    lines = [{"text": f"document {number}: " + "some text, " * (number * 7 % 13)} for number in range(52)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(folder, out, *options):
    return [
        "-m", "mmcache", "extract", str(folder / "model"), str(folder / "corpus.jsonl"), "--out", str(out), "--sites",
        "mlp_in,mlp_out", "--context-length", "24", "--batch-size", "3", "--shard-tokens", "128", *options,
    ]  # fmt: skip


def start(arguments, workers=0, through=(), **environ):
    """Start a job by itself, or by torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={workers}", "--master-port=0"] if workers else []
    environ = {"HF_HUB_OFFLINE": "1", **{name: str(value) for name, value in environ.items()}}
    # torchrun says how many threads its workers have, if nobody has said so before.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [*through, sys.executable, *launcher, *arguments], env=inherited | environ, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process):
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, out, err


def kill(process):
    """Kill a job and all that it started: torchrun's workers are sessions of their own, and live on without it."""
    family = {process.pid}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in family:
                family.add(int(folder.name))
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def shards(path):
    return [file.name for file in path.glob("*/c.*.0")]


@pytest.fixture(scope="module")
def alone(folder):
    code, _, err = end(start(command(folder, folder / "alone")))
    assert code == 0, err
    store = mmcache.open(folder / "alone")
    assert sum(store.n_shards(site) for site in store.sites) >= SHARDS
    return folder / "alone"


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_torchrun_makes_the_store_that_one_process_makes(folder, alone, tmp_path, workers):
    code, out, err = end(start(command(folder, tmp_path / "store"), workers))
    assert code == 0, err
    small.assert_same_store(tmp_path / "store", alone)
    numerics = [mmcache.open(path).source["numerics"] for path in (tmp_path / "store", alone)]
    assert numerics[0] == numerics[1]
    # One of them tells how far all are, and what there is in the end.
    total = mmcache.open(alone).n_tokens
    assert len(re.findall(rf"{total:,} of {total:,} tokens", err)) == 1, err
    assert out.count("complete") == 1


def test_torchrun_killed_is_finished_by_one(folder, alone, tmp_path):
    running = start(command(folder, tmp_path / "store"), 3)
    deadline = time.monotonic() + DEADLINE
    while len(shards(tmp_path / "store")) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(running)
    there = len(shards(tmp_path / "store"))
    assert 9 <= there < len(shards(alone)), "it was killed in the middle"
    code, _, err = end(start(command(folder, tmp_path / "store")))
    assert code == 0, err
    small.assert_same_store(tmp_path / "store", alone)


def test_tasks_of_an_array_make_up_for_those_that_never_start(folder, alone, tmp_path):
    # Two of five, which begin one behind the other; each would be done when the store is.
    tasks = [
        start(
            command(folder, tmp_path / "store"), SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_MIN=0,
            SLURM_ARRAY_TASK_COUNT=5,
        )
        for task in (1, 3)
    ]  # fmt: skip
    ends = [end(task) for task in tasks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    small.assert_same_store(tmp_path / "store", alone)


def test_a_worker_with_another_plan_is_refused_and_the_others_go_on(folder, alone, tmp_path):
    job = start(command(folder, tmp_path / "store"), SLURM_ARRAY_TASK_ID=0, SLURM_ARRAY_TASK_COUNT=2)
    deadline = time.monotonic() + DEADLINE
    while not shards(tmp_path / "store") and time.monotonic() < deadline:
        time.sleep(0.01)
    code, _, err = end(start(command(folder, tmp_path / "store", "--dtype", "float32")))
    assert code == 2
    assert re.search(r"planned with another identity.*\n\s+dtype +bfloat16 in the store, float32 now", err), err
    assert end(job)[0] == 0
    small.assert_same_store(tmp_path / "store", alone)


def test_a_worker_for_which_the_folder_is_read_only_says_so_and_the_next_goes_on(folder, alone, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(alone, path)
    for file in [*path.glob("*/c.0.1*.0"), *path.glob("statistics/*/zarr.json")]:
        file.unlink()
    view = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"',
        path,
    ]
    if not shutil.which("unshare") or subprocess.run([*view, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only")
    before = small.identities(path)
    code, _, err = end(start(command(folder, path), through=view))
    assert code == 1, err
    assert f"{path}" in err
    assert "Read-only file system" in err
    assert "Traceback" not in err
    assert small.identities(path) == before
    assert end(start(command(folder, path)))[0] == 0
    small.assert_same_store(path, alone)
