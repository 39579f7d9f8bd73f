import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from mmcache.training.fetcher import tensor_over

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def part_of(size):
    return np.random.default_rng(size).integers(0, 256, size + 64, np.uint8)[64:]


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4), (5, 1, 7), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_what_frombuffer_and_view_make(dtype, shape):
    memory = part_of(int(np.prod(shape)) * dtype.itemsize)
    made, plain = tensor_over(memory, dtype, shape), torch.frombuffer(memory, dtype=dtype).view(shape)
    assert (made.dtype, made.shape, made.stride()) == (dtype, plain.shape, plain.stride())
    assert made.is_contiguous()
    assert not made.requires_grad
    assert made.data_ptr() == memory.ctypes.data
    assert torch.equal(made.view(torch.uint8), plain.view(torch.uint8))
    made.zero_()
    assert not memory.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_no_numbers(dtype):
    made = tensor_over(np.empty(0, np.uint8), dtype, (0, 3, 4))
    assert (made.shape, made.dtype) == ((0, 3, 4), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_view_keeps_the_very_array_and_the_last_one_lets_it_go(dtype):
    gone = []
    memory = part_of(24 * dtype.itemsize)
    weakref.finalize(memory, gone.append, 1)
    made = tensor_over(memory, dtype, (2, 3, 4))
    last = made[1, 2].flatten()[1:]
    del memory, made
    gc.collect()
    assert not gone
    del last
    gc.collect()
    assert gone == [1]


def test_memory_of_another_size_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        tensor_over(part_of(48), torch.float32, (2, 3))


def test_keeps_the_interpreters_lock():
    """Another thread that waits for nothing but the lock, and would not be given it by force, does not get it."""
    turns, stopped, before, memory = [], threading.Event(), sys.getswitchinterval(), part_of(4096)

    def wait():
        while not stopped.is_set():
            turns.append(None)
            time.sleep(0)

    thread = threading.Thread(target=wait)
    sys.setswitchinterval(1000)
    gc.disable()  # it may free tensors of other tests, and to free one lets go
    try:
        thread.start()
        while len(turns) < 3:
            time.sleep(0)
        had = len(turns)
        # Kept for the same reason.
        made = [tensor_over(memory, torch.bfloat16, (2, 1024)) for _ in range(5000)]
        has = len(turns)
    finally:
        stopped.set()
        gc.enable()
        sys.setswitchinterval(before)
        thread.join()
    assert len(made) == 5000
    assert has == had
