"""A window on many files: what is mapped is what is in them, what is not is not touched, and it can all be let go."""

import os
import threading
import time

import numpy as np
import pytest

from mmcache.read import site_map as module
from mmcache.read.site_map import AddressSpace
from mmcache.system.syscalls import LINUX, Residency, populate, reserve, will_need_all
from stores_and_processes import FORKS, forked, maps_below

pytestmark = pytest.mark.skipif(not LINUX, reason="no windows here, or the fast paths are switched off")
PLACE, OFFSET = 3 * 4096, 4096


@pytest.fixture
def files(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (10, PLACE), np.uint8)
    for number, rows in enumerate(data):
        (tmp_path / str(number)).write_bytes(bytes(OFFSET) + rows.tobytes())
    return data


@pytest.fixture
def window(tmp_path, files):
    window = AddressSpace(PLACE, len(files), OFFSET)

    def bring(place):
        fd = os.open(tmp_path / str(place), os.O_RDONLY)
        window.map(place, fd, PLACE)
        os.close(fd)

    window.bring = bring
    return window


def test_each_file_has_its_place(window, files, tmp_path):
    for place in [3, 0, 9]:
        window.bring(place)
    assert np.flatnonzero(window.mapped).tolist() == [0, 3, 9]
    for place in [3, 0, 9]:
        assert (window.array[place * PLACE : (place + 1) * PLACE] == files[place]).all()
    assert len(maps_below(tmp_path)) == 3


def test_it_lies_so_that_huge_pages_fit():
    for offset in (0, 4096, 8192):
        assert (AddressSpace(PLACE, 1, offset).address - offset) % (2 << 20) == 0


def test_a_terabyte_takes_no_memory():
    before = resident_bytes()
    window = AddressSpace(256 << 20, 4096, OFFSET)
    assert resident_bytes() - before < 16 << 20
    assert len(window.array) == 1 << 40


def resident_bytes():
    with open("/proc/self/statm") as lines:  # noqa: PTH123 -- no Path for a pseudo-file
        return int(lines.read().split()[1]) * 4096


def test_no_more_than_allowed_are_mapped_at_a_time(window, files, tmp_path):
    window.most_maps = 4
    for place in range(10):
        window.bring(place)
        assert (window.array[place * PLACE : (place + 1) * PLACE] == files[place]).all()
        assert window.mapped.sum() <= 4
        assert len(maps_below(tmp_path)) <= 4


def test_too_many_maps_of_others_are_met_by_letting_go(window, monkeypatch):
    window.bring(0)
    real, calls = module.map_over, []

    def refuse_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(12, "Cannot allocate memory")
        real(*arguments)

    monkeypatch.setattr(module, "map_over", refuse_once)
    window.bring(1)
    assert np.flatnonzero(window.mapped).tolist() == [1]


def test_who_reads_keeps_what_is_mapped(window, files):
    window.bring(0)
    window.enter()
    forgetting = threading.Thread(target=window.forget)
    forgetting.start()
    time.sleep(0.05)
    # Whoever comes now finds nothing, but what is being read stays.
    assert forgetting.is_alive()
    assert not window.mapped.any()
    assert (window.array[:PLACE] == files[0]).all()
    window.leave()
    forgetting.join(timeout=10)
    assert not forgetting.is_alive()


def test_page_tables_that_grew_too_large_are_let_go(window, monkeypatch):
    window.bring(0)
    window.tally(module._CHECK_EVERY)
    assert window.mapped.any()
    monkeypatch.setattr(module, "page_table_bytes", lambda: 1 << 60)
    window.tally(module._CHECK_EVERY - 1)
    assert window.mapped.any()
    window.tally(1)
    assert not window.mapped.any()


def test_it_is_released_with_its_last_reference(tmp_path, files):
    window = AddressSpace(PLACE, len(files), OFFSET)
    fd = os.open(tmp_path / "0", os.O_RDONLY)
    window.map(0, fd, PLACE)
    os.close(fd)
    assert maps_below(tmp_path)
    del window
    assert not maps_below(tmp_path)


@FORKS
def test_a_fork_while_somebody_reads_waits_for_nobody(window, files):
    window.bring(0)
    window.enter()
    window._lock.acquire()

    def read():
        window.forget()
        window.bring(1)
        assert (window.array[PLACE : 2 * PLACE] == files[1]).all()

    assert forked(read) == 0
    window._lock.release()
    window.leave()


def test_address_space_that_there_is_not_is_refused():
    with pytest.raises(OSError, match="mapping"):
        reserve(1 << 60, 0)


def test_residency_tells_what_is_in_memory(window, tmp_path):
    window.bring(0)
    fd = os.open(tmp_path / "0", os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    residency = Residency(PLACE)
    gone = not residency.whole(window.address, PLACE)
    os.pread(fd, OFFSET + PLACE, 0)
    assert residency.whole(window.address, PLACE)
    assert residency.whole(window.address + 4095, 2)
    os.close(fd)
    if not gone:
        pytest.skip("this file system does not let go of pages, so only half of it was shown")


def test_advice_brings_rows_into_memory(window, tmp_path):
    for place in range(4):
        window.bring(place)
        fd = os.open(tmp_path / str(place), os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    addresses = window.address + np.arange(4) * PLACE
    will_need_all([(addresses[:1], np.full(1, PLACE)), (addresses[1:], np.full(3, PLACE))])
    residency, deadline = Residency(PLACE), time.monotonic() + 10
    while not all(residency.whole(int(address), PLACE) for address in addresses):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    populate(window.address, PLACE)
