"""What lands in a file is what came, past the page cache or not, from any place in it on."""

import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.storage import mirror
from mmcache.system.atomic import AtomicFile
from mmcache.system.memory import PAGE


@pytest.mark.parametrize("window", [PAGE, 3 * PAGE, 4 << 20])
def test_the_file_has_what_came(tmp_path_factory, monkeypatch, window):
    monkeypatch.setattr(mirror, "_WINDOW", window)
    folder, target = tmp_path_factory.mktemp("landing"), mirror.StreamWriter(2)

    @given(st.lists(st.integers(0, 5 * PAGE), max_size=6), st.sampled_from([0, 1, 17, PAGE, PAGE + 5, 3 * PAGE - 1]))
    def check(lengths, offset):
        pieces = [np.random.default_rng(n).integers(0, 256, length, np.uint8) for n, length in enumerate(lengths)]
        draft, seen = AtomicFile(folder, "file"), []
        draft.write(np.full(offset, 7, np.uint8), 0)
        target.land((piece.data for piece in pieces), draft, offset, lambda data: seen.append(bytes(data)))
        whole = b"".join(piece.tobytes() for piece in pieces)
        draft.publish(offset + len(whole), durable=False)
        assert (folder / "file").read_bytes() == b"\7" * offset + whole
        assert b"".join(seen) == whole

    check()


class Slow:
    """A draft whose writes take a while, and note when they are under way."""

    def __init__(self):
        self.running, self.lent, self.begun = 0, set(), threading.Event()

    def write(self, data, _offset, *, direct):
        assert direct
        self.running += 1
        self.lent.add(data.ctypes.data)
        self.begun.set()
        time.sleep(0.3)
        self.running -= 1


@pytest.mark.parametrize("windows", [1, 2])
def test_what_breaks_off_is_told_once_nothing_is_written_any_more_and_its_memory_used_again(monkeypatch, windows):
    monkeypatch.setattr(mirror, "_WINDOW", PAGE)
    target, draft = mirror.StreamWriter(1), Slow()

    def broken():
        yield memoryview(bytes(windows * PAGE))
        draft.begun.wait()
        raise ConnectionError

    for _ in range(3):
        draft.begun.clear()
        with pytest.raises(ConnectionError):
            target.land(broken(), draft, 0, len)
        assert not draft.running
    assert 1 <= len(draft.lent) <= windows


def test_a_signal_while_a_write_is_waited_for_leaves_none_behind(monkeypatch):
    monkeypatch.setattr(mirror, "_WINDOW", PAGE)
    target, draft = mirror.StreamWriter(1), Slow()

    def interrupted(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            target.land([memoryview(bytes(4 * PAGE))], draft, 0, len)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not draft.running
