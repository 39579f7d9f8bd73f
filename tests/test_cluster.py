"""One job on a cluster of real processes: the store is that of one process, whatever is lost on the way."""

import errno
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mmcache
from mmcache import cluster_pool, cluster_worker, ray_session
from mmcache.cli import main
from mmcache.cluster_pool import Resources, deal
from mmcache.cluster_worker import Job, Planned, Worker
from mmcache.draft import Draft
from mmcache.loading import load_model, load_tokenizer
from mmcache.manifest import read_manifest
from mmcache.signals import Stopped, stoppable
from mmcache.threads import _usual_threads

pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
small = pytest.importorskip("small")

# Ray leaves its own sockets and pipes to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

TEXTS = [f"document {number}: " + "some text, " * (number * 7 % 13) for number in range(52)]
OPTIONS = {"sites": ("mlp_in", "mlp_out"), "context_length": 24, "batch_size": 3, "shard_tokens": 128}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module", autouse=True)
def usual():
    """As a user who wants one thread: three workers of more would wait for each other. Gives how many it would be."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("OMP_NUM_THREADS", "1")
        yield _usual_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        for _ in range(2):
            made.add_node(**NODE)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small.llama().save_pretrained(folder)
    small.byte_tokenizer().save_pretrained(folder)
    return folder


def extract_alone(model, path, **options):
    return mmcache.extract(load_model(str(model), None), load_tokenizer(str(model)), TEXTS, path, **OPTIONS | options)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "store"
    store = extract_alone(model, path)
    assert sum(store.n_shards(site) for site in store.sites) >= 60
    return path


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    assert not ray.is_initialized(), "Ray was left connected"


def slowly(model, seconds=0.02, pids=None, together=1):
    """Give what loads a model that takes its time, and says in which process it is; so many begin together."""

    def load():
        loaded = load_model(str(model), None)
        loaded.register_forward_pre_hook(lambda *_: time.sleep(seconds))
        if pids is not None:
            (pids / str(os.getpid())).touch()
            deadline = time.monotonic() + 60
            while len(list(pids.iterdir())) < together:
                assert time.monotonic() < deadline, f"fewer than {together} workers began"
                time.sleep(0.02)
        return loaded

    return load


def run(model, path, nodes, **options):
    return mmcache.cluster.extract(
        model, load_tokenizer(str(small.DEMO)), TEXTS, path, address=nodes.address, **OPTIONS | options
    )


class Once:
    """A progress callback that acts once, when some of the tokens are there and most are not."""

    def __init__(self, act):
        self.act, self.seen = act, None

    def __call__(self, done):
        if self.seen is None and done.phase == "extract" and done.tokens:
            self.seen = done
            self.act()


def test_a_machine_that_is_lost_on_the_way_changes_no_byte(model, alone, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_pool, "_PATIENCE", 1)
    lost = Once(lambda: nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False))
    told, plans = [], []

    def progress(done):
        told.append(done)
        lost(done)

    try:
        store = run(slowly(model), tmp_path / "store", nodes, progress=progress, planned=plans.append)
    finally:
        nodes.add_node(**NODE)
    assert 0 < lost.seen.tokens < store.n_tokens / 2, "it was killed in the middle"
    small.assert_same_store(tmp_path / "store", alone)
    assert store.source["numerics"]["threads"] == 1
    extracting = [done.tokens for done in told if done.phase == "extract"]
    assert extracting == sorted(extracting)
    assert extracting[-1] == told[-1].total == store.n_tokens
    assert [plan.shards_to_do for plan in plans] == [sum(store.n_shards(site) for site in store.sites)]


@pytest.mark.parametrize("restarts", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_a_job_whose_only_worker_dies_goes_on(model, alone, nodes, tmp_path, monkeypatch, restarts):
    """Ray starts it again so many times; after that it is made anew, as it was of use before."""
    monkeypatch.setattr(cluster_pool, "_RESTARTS", restarts)
    pids, path = tmp_path / "pids", tmp_path / "store"
    pids.mkdir()
    lost = Once(lambda: os.kill(int(next(pids.iterdir()).name), signal.SIGKILL))
    run(slowly(model, pids=pids), path, nodes, workers=1, progress=lost)
    assert len(list(pids.iterdir())) == 2
    small.assert_same_store(path, alone)


def test_a_signal_ends_the_workers_and_leaves_a_store_that_one_process_goes_on_with(model, alone, nodes, tmp_path):
    pids, path = tmp_path / "pids", tmp_path / "store"
    pids.mkdir()
    stop = Once(threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start)
    with pytest.raises(Stopped), stoppable("the rest"):
        run(slowly(model, 0.2, pids, together=3), path, nodes, progress=stop)
    assert stop.seen is not None
    assert len(list(pids.iterdir())) == 3
    for pid in pids.iterdir():
        gone(int(pid.name))
    there = len(list(path.glob("*/c.*.0")))
    assert 0 < there < len(list(alone.glob("*/c.*.0")))
    assert not list(path.rglob("*.tmp"))
    extract_alone(model, path)
    small.assert_same_store(path, alone)


def gone(pid):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"the worker {pid} lives on")


def test_what_workers_raise_is_raised_here(model, alone, nodes, tmp_path):
    """In one connection, which is found, used, and left open."""

    def broken():
        loaded = load_model(str(model), None)
        with torch.no_grad():
            loaded.model.layers[2].mlp.down_proj.weight[3] = torch.nan
        return loaded

    before = small.identities(alone)
    # A connection of ours makes SIGTERM what it was; that of a user is the user's.
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(mmcache.PlanMismatchError, match=r"context_length +24 in the store, 25 now"):
            run(model, alone, nodes, workers=1, context_length=25)
        assert small.identities(alone) == before
        with pytest.raises(mmcache.NonFiniteError, match=rf"mlp_out, layer 2.*machine {socket.gethostname()}"):
            run(broken, tmp_path / "strict", nodes, workers=1, strict=True)
        with pytest.warns(mmcache.NonFiniteWarning, match="mlp_out, layer 2") as warned:
            run(broken, tmp_path / "counted", nodes, workers=1)
        assert len(warned) == 1
        with pytest.raises(mmcache.ArgumentError, match=r"connected to .*address given is 'elsewhere:1'"):
            mmcache.cluster.extract(str(model), str(model), TEXTS, tmp_path / "no", address="elsewhere:1")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def test_a_worker_that_dies_before_it_did_anything_ends_the_job(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_pool, "_RESTARTS", 0)
    with pytest.raises(mmcache.ClusterError, match=r"(?s)lost 1 times before .*goes on from there"):
        run(lambda: os._exit(1), tmp_path / "store", nodes, workers=1)
    assert not (tmp_path / "store").exists()


def test_the_command_starts_ray_on_this_machine_with_the_threads_of_one_process(model, usual, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(f'{{"text": "{text}"}}' for text in TEXTS))
    command = [
        sys.executable, "-m", "mmcache", "extract", os.path.relpath(model, tmp_path), "corpus.jsonl", "--out", "store",
        "--context-length", "24", "--batch-size", "3", "--shard-tokens", "128", "--json", "--ray",
    ]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(usual)
    one = extract_alone(model, tmp_path / "one")
    torch.set_num_threads(1)
    assert one.source["numerics"]["threads"] == usual
    assert json.loads(done.stdout)["n_tokens"] == one.n_tokens
    assert f"{one.n_tokens:,} of {one.n_tokens:,} tokens" in done.stderr
    small.assert_same_store(tmp_path / "store", tmp_path / "one")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_head_that_is_not_there_is_said_within_seconds(model, alone, address, monkeypatch):
    with socket.socket() as unused:
        # Bound, and not listening: nobody else takes the port meanwhile.
        unused.bind(("127.0.0.1", 0))
        where, before, began = address.format(unused.getsockname()[1]), small.identities(alone), time.monotonic()
        with pytest.raises(mmcache.ClusterError, match=rf"no Ray cluster answers at {where}.*ray start --head"):
            mmcache.cluster.extract(str(model), str(model), TEXTS, alone, address=where, **OPTIONS)
        monkeypatch.setenv("RAY_ADDRESS", where)
        with pytest.raises(ConnectionError, match=where):
            mmcache.cluster.extract(str(model), str(model), TEXTS, alone, **OPTIONS)
    assert time.monotonic() - began < 2 * ray_session._REACHED_WITHIN
    assert small.identities(alone) == before


def test_an_address_that_is_none_is_refused(model, tmp_path):
    for address in ("corpus.jsonl", "host:port"):
        with pytest.raises(mmcache.ArgumentError, match=rf"'{address}' is no address.*host:port"):
            mmcache.cluster.extract(str(model), str(model), TEXTS, tmp_path, address=address)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear: each worker loads its own"),
        ({"tokenizer": 3}, "tokenizer is a int: expected a name"),
        ({"texts": "corpus.jsonl"}, "texts is one str: give a list"),
        ({"texts": iter(TEXTS)}, "texts is one list_iterator"),
    ],
)
def test_what_cannot_be_sent_to_workers_is_refused(arguments, message, tmp_path):
    given = {"model": "demo", "tokenizer": "demo", "texts": TEXTS} | arguments
    with pytest.raises(mmcache.ArgumentError, match=message):
        mmcache.cluster.extract(**given, path=tmp_path / "store", address="127.0.0.1:1")
    with pytest.raises(TypeError, match=r"unexpected options: site$"):
        mmcache.cluster.extract("demo", "demo", TEXTS, tmp_path / "store", site="mlp_in")


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(mmcache.ClusterError, match=r"pip install 'mmcache\[cluster\]'"):
        mmcache.cluster.extract("demo", "demo", TEXTS, tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (["--workers", "2"], {}, "--workers is for --ray"),
        (["--num-gpus", "0.5"], {}, "--num-gpus is for --ray"),
        (["--ray", "auto", "--dry-run"], {}, "--dry-run measures on this machine"),
        (["--device", "cpu", "--device-map", "auto"], {}, "leave --device out"),
        (["--ray", "auto"], {"RANK": "1", "WORLD_SIZE": "2"}, "torchrun started this 2 times"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, environ, message, tmp_path, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["extract", "demo", "corpus.txt", "--out", str(tmp_path / "store"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "store").exists()


def worker(model, path):
    return Worker(
        Job(
            model=functools.partial(load_model, str(model), None),
            tokenizer=functools.partial(load_tokenizer, str(model)),
            path=path,
            options=OPTIONS,
            accept_numerics=False,
            strict=False,
            on_gpu=False,
            threads=1,
        )
    )


@pytest.fixture
def half(alone, tmp_path):
    """A copy of the store without its first blocks, and what its planner said."""
    path = tmp_path / "store"
    shutil.copytree(alone, path)
    for file in path.glob("*/c.0.[0-9].0"):
        file.unlink()
    return path, Planned(read_manifest(path), None, "planner")


def test_a_machine_that_does_not_see_the_folder_says_so(model, half, tmp_path, monkeypatch):
    _, planned = half
    monkeypatch.setattr(cluster_worker, "_SEEN_WITHIN", 0.1)
    (tmp_path / "file").touch()
    where = tmp_path / "file" / "store"
    message = f"{where} is not shared by all machines: planner planned .*{socket.gethostname()} finds no store there"
    with pytest.raises(mmcache.ClusterError, match=message):
        worker(model, where).make(planned, np.arange(3))
    other = tmp_path / "other"
    extract_alone(model, other, record={"a": 1})
    before = small.identities(other)
    with pytest.raises(mmcache.ClusterError, match=f"{socket.gethostname()} finds another store there"):
        worker(model, other).make(planned, np.arange(3))
    assert small.identities(other) == before


def test_a_machine_for_which_the_folder_is_read_only_is_named(model, half, monkeypatch):
    path, planned = half

    def refuse(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Draft, "_create", refuse)
    with pytest.raises(mmcache.WriteError, match=f"Read-only.*machine {socket.gethostname()}.*{path}/mlp_in"):
        worker(model, path).make(planned, np.arange(3))
    with pytest.raises(mmcache.WriteError, match=f"Read-only.*machine {socket.gethostname()}.*{path}/new"):
        worker(model, path / "new").plan(lambda: TEXTS)


def test_a_worker_with_other_numerics_is_refused_and_named(model, half, monkeypatch):
    path, planned = half
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    with pytest.raises(mmcache.PlanMismatchError, match=rf"(?s)processor .*another now.*{socket.gethostname()}"):
        worker(model, path).make(planned, np.arange(3))


def test_a_worker_makes_what_it_is_given_and_nothing_else(model, alone, half):
    path, planned = half
    made = worker(model, path).make(planned, np.array([1, 2, 5]))
    there = {file.name for file in path.glob("mlp_in/c.0.[0-9].0")}
    assert there == {"c.0.1.0", "c.0.2.0", "c.0.5.0"}
    assert 3 * 128 <= made.ran <= 7 * 128
    for name in there:
        assert (path / "mlp_in" / name).read_bytes() == (alone / "mlp_in" / name).read_bytes()


class Nodes:
    """What `Resources` asks of Ray."""

    def __init__(self, *machines):
        self._machines = machines

    def nodes(self):
        return [{"Alive": alive, "Resources": {"GPU": gpus, "CPU": cpus}} for gpus, cpus, alive in self._machines]


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        ([(0, 8, True), (0, 4, True)], (None, None, 1), (2, 0, 1)),
        ([(0, 8, True), (0, 4, False)], (None, None, 1), (1, 0, 1)),
        ([(8, 64, True), (4, 64, True), (0, 4, True)], (None, None, 1), (12, 1, 1)),
        ([(8, 64, True), (4, 64, True)], (None, 4, 1), (3, 4, 1)),
        ([(8, 8, True)], (None, 1, 2), (4, 1, 2)),
        ([(3, 8, True), (3, 8, True)], (None, 2, 1), (2, 2, 1)),
        ([(0, 8, True)], (5, 2, 1), (5, 2, 1)),
    ],
)
def test_there_are_as_many_workers_as_there_is_room_for(machines, asked, expected):
    assert Resources.of(Nodes(*machines), *asked) == Resources(*expected)


def test_resources_that_no_machine_has_are_refused():
    with pytest.raises(mmcache.ClusterError, match=r"4 GPUs and 1 processors .* \(they have 2 and 8, 0 and 4\)"):
        Resources.of(Nodes((2, 8, True), (0, 4, True)), None, 4, 1)
    with pytest.raises(mmcache.ArgumentError, match="workers is 0"):
        Resources.of(Nodes((2, 8, True)), 0, None, 1)
    with pytest.raises(mmcache.ArgumentError, match="num_gpus is -1"):
        Resources.of(Nodes((2, 8, True)), None, -1, 1)


def test_blocks_are_dealt_in_stretches_that_hold_many_batches(alone):
    manifest = read_manifest(alone)
    batch = 3 * manifest.n_tokens / manifest.n_sequences
    for missing, workers in ((34, 3), (1, 3), (1000, 1), (1000, 7), (3, 5)):
        size = deal(manifest, missing, workers, 3)
        assert 1 <= size <= -(-missing // workers)
        assert size * 128 >= 8 * batch or size == -(-missing // workers)
        assert missing / size / workers <= 16 + 1 / workers
