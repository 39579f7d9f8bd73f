"""Memory that comes back when the last that looks at it is gone, and never before."""

import gc
import threading

import numpy as np
import torch

from mmcache.system import memory as buffers_module
from mmcache.system.memory import BufferPool


def tensors(buffers, *sizes):
    return [torch.frombuffer(part, dtype=torch.uint8) for part in buffers.lend(sizes)]


def test_parts_begin_on_pages_and_do_not_overlap():
    parts = BufferPool(2).lend([5000, 1, 4096])
    addresses = [part.ctypes.data for part in parts]
    assert [part.shape for part in parts] == [(5000,), (1,), (4096,)]
    assert all(address % 4096 == 0 for address in addresses)
    assert np.diff(addresses).tolist() == [8192, 4096]
    for number, part in enumerate(parts):
        part[:] = number
    assert [set(part.tolist()) for part in parts] == [{0}, {1}, {2}]


def test_memory_is_used_again_once_all_of_it_is_gone():
    buffers = BufferPool(2)
    one, two = tensors(buffers, 100, 100)
    address = one.data_ptr()
    del one
    assert tensors(buffers, 100, 100)[0].data_ptr() != address
    del two
    assert tensors(buffers, 100, 100)[0].data_ptr() == address


def views(tensor):
    yield tensor[3:5]
    yield tensor.view(torch.int32)
    yield tensor.numpy()
    yield tensor.numpy()[10:]
    yield tensor.untyped_storage()
    yield tensor.detach()
    yield torch.from_dlpack(tensor)
    yield memoryview(tensor.numpy())
    yield [tensor[:1]]


def test_whatever_looks_at_it_keeps_it():
    for number in range(len(list(views(torch.zeros(64, dtype=torch.uint8))))):
        buffers = BufferPool(4)
        (tensor,) = tensors(buffers, 64)
        tensor.fill_(7)
        address = tensor.data_ptr()
        view = list(views(tensor))[number]
        del tensor
        gc.collect()
        (other,) = tensors(buffers, 64)
        assert other.data_ptr() != address, type(view)
        other.fill_(1)
        del view
        gc.collect()
        assert tensors(buffers, 64)[0].data_ptr() == address


def test_no_more_than_so_many_are_kept_and_none_that_is_too_small():
    buffers = BufferPool(2)
    lent = [tensors(buffers, 5000) for _ in range(6)]
    addresses = {one.data_ptr() for (one,) in lent}
    assert len(addresses) == 6
    lent.clear()
    assert len(buffers._idle) == 2
    (large,) = tensors(buffers, 20_000)
    assert not buffers._idle
    assert large.numel() == 20_000
    del large
    # One that is too large will do.
    (small,) = tensors(buffers, 10)
    assert small.numel() == 10
    assert not buffers._idle


def addresses_of(lent):
    return sorted(one.ctypes.data for (one,) in lent)


def test_the_next_ones_get_what_the_last_ones_leave():
    buffers_module._spare.clear()
    buffers = BufferPool(4)
    lent = [buffers.lend([4 << 20]) for _ in range(3)]
    addresses, out = addresses_of(lent), lent.pop()
    kept = out[0].ctypes.data
    lent.clear()
    del buffers
    gc.collect()
    # Neither too small, nor much too large; what is still in use is nobody else's.
    assert addresses_of([BufferPool(1).lend([4097 << 10])])[0] not in addresses
    assert addresses_of([BufferPool(1).lend([1 << 20])])[0] not in addresses
    other = BufferPool(4)
    again = [other.lend([size << 20]) for size in (4, 3, 4)]
    assert addresses_of(again[:2]) == [address for address in addresses if address != kept]
    assert addresses_of(again[2:])[0] not in addresses
    del out


def test_only_so_much_is_left_for_others():
    buffers_module._spare.clear()
    buffers = BufferPool(20)
    lent = [buffers.lend([40 << 20]) for _ in range(10)] + [buffers.lend([1 << 20])]
    lent.clear()
    assert len(buffers._idle) == 11
    del buffers
    gc.collect()
    assert [len(memory) >> 20 for memory in buffers_module._spare] == [40] * 6
    buffers_module._spare.clear()


def test_nothing_may_be_lent_too():
    buffers = BufferPool(2)
    parts = buffers.lend([0, 0])
    assert [part.shape for part in parts] == [(0,), (0,)]


def test_many_threads_never_share_memory():
    buffers, wrong = BufferPool(8), []

    def work(number):
        for turn in range(300):
            one, two = tensors(buffers, 5000, 3000)
            value = (number * 31 + turn) % 251
            one.fill_(value)
            two.fill_(value)
            if not ((one == value).all() and (two == value).all()):
                wrong.append((number, turn))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
