"""How the suite runs: deterministic properties, `--slow` to widen them, and skips that say why."""

import os
import random

# One thread for each process, and no thread that spins while it waits: of small models, more threads take twice the
# time of the processor. Before torch is imported, which reads this once. Tests of threads ask for their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy as np
import pytest
import torch

# A property that fails must fail again in the next run, on a busy machine too: fixed examples, no time limits.
_STEADY = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("quick", max_examples=40, **_STEADY)
hypothesis.settings.register_profile("slow", max_examples=1000, **_STEADY)


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time():
    """Begin each test with the same random numbers: one that fails must fail again, alone too."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- what libraries draw from, too
    torch.manual_seed(0)


@pytest.fixture
def one_thread_without_syncing(monkeypatch):
    """One thread, because two only wait for each other in small models; and no syncing, which no such test can see."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _s3_process():
    """Run an S3 server of our own for as long as the tests run: it takes two seconds to start."""
    pytest.importorskip("obstore", reason="needs mmcache[remote]")
    pytest.importorskip("moto", reason="needs moto, which is the S3 server")
    import fake_s3  # noqa: PLC0415 -- it imports both

    with fake_s3.serve_s3() as server:
        yield server


@pytest.fixture
def s3_server(_s3_process, monkeypatch, tmp_path):
    """Give an S3 server with an empty bucket, which the environment names, and a folder for the cache."""
    _s3_process.clear()
    for name, value in _s3_process.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MMCACHE_CACHE", str(tmp_path / "cache"))
    return _s3_process


@pytest.fixture
def s3_proxy(s3_server, monkeypatch):
    """Give a network before that server that fails and counts, which the environment names in its place."""
    import fake_s3  # noqa: PLC0415 -- as above

    with fake_s3.FaultProxy(s3_server.host, s3_server.port, seed=1, hang_s=20.0) as proxy:
        for name, value in s3_server.env(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        yield proxy


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow, and properties with many examples")


def _open_at_least(fd):
    """Instead of `os.fsync`: only a power failure would show the difference, but for a descriptor that is not open.

    Tests that need the pages of a file clean call `os.fdatasync`; `--slow` waits for the disk as users do.
    """
    os.fstat(fd)


def pytest_configure(config):
    if not config.getoption("--slow"):
        os.fsync = _open_at_least
    hypothesis.settings.load_profile("slow" if config.getoption("--slow") else "quick")


def pytest_collection_modifyitems(config, items):
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow: run it with --slow")
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false")
    for item in items:
        for mark, skip in skips.items():
            if item.get_closest_marker(mark) is not None:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """Say how many faults of the disk the tests went through, whichever process they ran in."""
    met = {
        point
        for report in terminalreporter.stats.get("passed", [])
        for name, points in report.user_properties
        if name == "faults"
        for point in points
    }
    if met:
        sites = {point.split()[0] for point in met}
        terminalreporter.write_line(
            f"faults: {len(met)} points (call site x operation x fault) at {len(sites)} call sites, no losses"
        )
