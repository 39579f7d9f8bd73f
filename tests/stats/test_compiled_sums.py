"""The compiled kernel beside the same code as Python runs it, and beside numpy."""

import errno
import os
import subprocess
import sys
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.format.dtypes import BY_NAME
from mmcache.format.shard import ShardSpec
from mmcache.stats import block_sums as module
from mmcache.stats import moments as statistics
from mmcache.stats.block_sums import SPAN, load_kernel, span_sums, sum_block
from mmcache.stats.moments import Moments, block_rows

numba = pytest.importorskip("numba")
EXACT = ("count", "first", "second", "non_finite", "first_non_finite", "zero_rows")


@pytest.fixture
def anew():
    module._load.cache_clear()
    yield
    module._load.cache_clear()


def normal(seed, *shape):
    """Draw bfloat16 rows `[n, layers, width]`, with columns of zeros of both signs, as ReLU leaves them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 3 + 1
    values[..., rng.random(shape[-1]) < 0.2] = 0
    values[..., rng.random(shape[-1]) < 0.1] = -0.0
    values[..., 0] = 1
    return values.astype(ml_dtypes.bfloat16)


def outputs(n, layers, columns):
    first, second = np.empty((2, 2, -(-n // SPAN), columns), np.float32)
    return first, second, np.empty((n, layers))


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 4), st.integers(1, 40), st.data())
def test_compiled_or_not_it_is_the_same(seed, n, layers, half, data):
    words = normal(seed, n, layers, 2 * half).reshape(n, -1).view(np.uint32)
    skipped = np.random.default_rng(seed).random(n) < 0.2
    low = data.draw(st.integers(0, layers - 1))
    stop = data.draw(st.integers(low + 1, layers))
    one, two = (outputs(n, stop - low, (stop - low) * half) for _ in range(2))
    for function, into in ((span_sums, one), (load_kernel(), two)):
        function(words, low * half, stop * half, skipped, SPAN, *into)
    for found, expected in zip(one, two, strict=True):
        assert found.tobytes() == expected.tobytes()


@given(st.integers(0, 2**32), st.integers(1, 130), st.integers(1, 4), st.integers(1, 50), st.booleans(), st.booleans())
@example(seed=0, n=33, layers=1, half=1, masked=False, odd=False)
def test_sums_are_those_of_numpy_to_the_last_bit_and_norms_nearly(seed, n, layers, half, masked, odd):
    rng = np.random.default_rng(seed)
    rows = normal(seed, n, layers, 2 * half)
    keep = rng.random(n) < 0.7 if masked else None
    if odd:
        rows[rng.random((n, layers)) < 0.02] = 0
        rows[..., 0][rng.random((n, layers)) < 0.02] = rng.choice([np.nan, np.inf, 1e30, 1e-30])
    quick, slow = sum_block(rows, keep, quickly=True), sum_block(rows, keep)
    for name in EXACT:
        assert getattr(quick, name).tobytes() == getattr(slow, name).tobytes(), name
    np.testing.assert_allclose(quick.norms, slow.norms, rtol=1e-6)


def test_some_of_many_layers_at_a_time():
    rows = normal(0, 40, 9, 4096)
    quick, slow = sum_block(rows, None, quickly=True), sum_block(rows, None)
    assert all(getattr(quick, name).tobytes() == getattr(slow, name).tobytes() for name in EXACT)
    np.testing.assert_allclose(quick.norms, slow.norms, rtol=1e-6)


def test_memory_that_is_read_only_or_in_another_order():
    rows = normal(1, 40, 2, 8)
    fixed, turned = rows.copy(), np.asfortranarray(rows)
    fixed.setflags(write=False)
    found = [sum_block(some, None, quickly=True) for some in (rows, fixed, turned)]
    for one in found[1:]:
        assert all(getattr(one, name).tobytes() == getattr(found[0], name).tobytes() for name in EXACT)


@pytest.mark.parametrize("layers", [1, 3])
def test_it_begins_at_a_place_in_the_array_however_the_rows_come(monkeypatch, layers):
    calls, real = [], statistics.sum_block
    monkeypatch.setattr(
        statistics,
        "sum_block",
        lambda rows, keep, *, quickly: calls.append(quickly) or real(rows, keep, quickly=quickly),
    )
    block = block_rows(layers, 64, 1024)
    rows = normal(2, 4 * block + 7, layers, 64)
    results = []
    for step in (len(rows), block, block // 3 + 1):
        moments = Moments(layers, 64, 1024, quick_from=block + 1)
        calls.clear()
        for start in range(0, len(rows), step):
            moments.add(rows[start : start + step])
        results.append(moments.arrays(0))
        assert calls == [False, False, True, True, True]
    for name, value in results[0].items():
        assert all(value.tobytes() == other[name].tobytes() for other in results), name


def test_a_small_shard_never_asks_for_it():
    code = """
import sys, torch, mmcache
with mmcache.FullActivationCache.with_capacity(2) as cache:
    cache.push(torch.ones(4000, 1024, dtype=torch.bfloat16))  # 8 MB
    cache.flush()
    assert "numba" not in sys.modules
    cache.push(torch.ones(4000, 1024, dtype=torch.bfloat16))
    cache.flush()
    assert "numba" not in sys.modules
with mmcache.FullActivationCache.with_capacity(1) as cache:
    cache.push(torch.ones(12000, 1024, dtype=torch.bfloat16))
    cache.flush()
    assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("anew")
def test_threads_that_ask_for_it_at_once_all_get_it():
    rows, found = normal(3, 64, 2, 8), []
    threads = [threading.Thread(target=lambda: found.append(sum_block(rows, None, quickly=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({one.norms.tobytes() for one in found}) == 1


@pytest.mark.usefixtures("anew")
def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    rows = normal(4, 64, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernel() is None
        found = sum_block(rows, None, quickly=True)
    assert found.norms.tobytes() == sum_block(rows, None).norms.tobytes()


@pytest.mark.usefixtures("anew")
def test_a_numba_that_does_not_work_is_told_once_and_done_without(monkeypatch):
    def fails(*_, **__):
        raise SystemError("initialization of _internal failed")

    monkeypatch.setattr(numba, "njit", fails)
    with pytest.warns(UserWarning, match=r"numba .* does not work here .*_internal failed.*; reinstall numba"):
        assert load_kernel() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernel() is None


@pytest.mark.usefixtures("anew")
def test_a_numba_that_refuses_its_numpy_is_told_too(monkeypatch):
    class Refuses:
        def find_spec(self, name, *_):
            if name == "numba":
                raise ImportError("Numba needs NumPy 2.5 or less. Got NumPy 9.9.")

    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.warns(UserWarning, match="Numba needs NumPy"):
        assert load_kernel() is None


@pytest.mark.usefixtures("anew")
def test_a_numba_that_is_switched_off_is_not_used(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert load_kernel() is None


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    "error", [RuntimeError("no locator available"), OSError(errno.ENOSPC, "no room"), EOFError("Ran out of input")]
)
def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch, error):
    real = numba.njit

    def njit(*args, cache=False, **options):
        if cache:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    rows = normal(5, 64, 2, 8)
    assert load_kernel() is not None
    assert sum_block(rows, None, quickly=True).first.tobytes() == sum_block(rows, None).first.tobytes()


def test_it_lets_go_of_the_interpreter():
    words = np.ones((SPAN * 64, 4096), np.uint32)
    into, done, beats = outputs(len(words), 1, 4096), threading.Event(), [0]

    def work():
        for _ in range(20):
            load_kernel()(words, 0, 4096, np.zeros(len(words), np.bool_), SPAN, *into)
        done.set()

    load_kernel()
    # With this, another thread gets the interpreter only when it is let go of.
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not done.is_set():
            beats[0] += 1
            done.wait(0.001)
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert beats[0] > 1, "nothing else ran meanwhile"


def test_it_is_kept_for_the_next_process(tmp_path):
    code = "from mmcache.stats.block_sums import load_kernel; print(load_kernel().stats.cache_hits.total())"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said == ["0\n", "1\n"]


@pytest.mark.parametrize(("busy", "quick"), [(False, [False, True, True, True]), (True, [False] * 4)])
def test_what_a_model_makes_is_left_to_numpy(monkeypatch, busy, quick):
    calls, real = [], statistics.sum_block
    monkeypatch.setattr(
        statistics,
        "sum_block",
        lambda rows, keep, *, quickly: calls.append(quickly) or real(rows, keep, quickly=quickly),
    )
    rows = normal(6, 4 * 64, 2, 8)
    # In bytes of an array of which 100 rows lie in shards before.
    monkeypatch.setattr(statistics, "_QUICK_FROM", (100 + 64) * 32)
    spec = ShardSpec("activations", BY_NAME["bfloat16"], (2, 8), 1024, 64, stat_layers=2)
    statistics.shard_moments(spec, 100, busy=busy).add(rows)
    assert calls == quick
