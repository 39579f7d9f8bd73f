"""What lands in a file is what came, past the page cache or not, from any place in it on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache import landing
from mmcache.draft import Draft
from mmcache.geometry import PAGE


@pytest.mark.parametrize("window", [PAGE, 3 * PAGE, 4 << 20])
def test_the_file_has_what_came(tmp_path_factory, monkeypatch, window):
    monkeypatch.setattr(landing, "_WINDOW", window)
    folder, target = tmp_path_factory.mktemp("landing"), landing.Landing(2)

    @given(st.lists(st.integers(0, 5 * PAGE), max_size=6), st.sampled_from([0, 1, 17, PAGE, PAGE + 5, 3 * PAGE - 1]))
    def check(lengths, offset):
        pieces = [np.random.default_rng(n).integers(0, 256, length, np.uint8) for n, length in enumerate(lengths)]
        draft, seen = Draft(folder / "file"), []
        draft.write(np.full(offset, 7, np.uint8), 0)
        target.land((piece.data for piece in pieces), draft, offset, lambda data: seen.append(bytes(data)))
        whole = b"".join(piece.tobytes() for piece in pieces)
        draft.publish(offset + len(whole), durable=False)
        assert (folder / "file").read_bytes() == b"\7" * offset + whole
        assert b"".join(seen) == whole

    check()


def test_what_breaks_off_is_told_and_its_memory_used_again(tmp_path):
    def broken():
        yield memoryview(b"some")
        raise ConnectionError

    target, draft = landing.Landing(1), Draft(tmp_path / "file")
    for _ in range(3):
        with pytest.raises(ConnectionError):
            target.land(broken(), draft, 0, len)
    draft.discard()
    assert list(tmp_path.iterdir()) == []
