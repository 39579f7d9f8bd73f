"""Every token once over the ranks, equal numbers of batches, and tails as even as they can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.training.schedule import RankShares


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 20), st.booleans())
def test_every_token_once_and_evenly(tokens, ranks, size, drop_last):
    shares = RankShares(tokens, ranks, size, drop_last)
    whole = tokens // (ranks * size)
    seen = []
    for step in range(len(shares)):
        assert shares.seen(step) == len(seen)
        parts = [shares.share(step, rank) for rank in range(ranks)]
        sizes = [stop - start for start, stop in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= size
        if step < whole - 1:
            assert parts == [((step * ranks + rank) * size, (step * ranks + rank + 1) * size) for rank in range(ranks)]
        if not min(sizes):
            # Not enough tokens for one each: of them all, or of batches of one.
            assert step == len(shares) - 1
            assert tokens < ranks or size == 1
        seen += [token for start, stop in parts for token in range(start, stop)]
    assert seen == list(range(whole * ranks * size if drop_last else tokens))
    for beyond in (len(shares), len(shares) + 1, len(shares) + 100):
        assert shares.seen(beyond) == len(seen)
    # Not a batch more than there must be: one, or two where the last full step is shared.
    assert len(shares) == (whole if drop_last else -(-tokens // (ranks * size)))


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (24, [[4, 4, 4], [4, 4, 4]]),
        # Of twelve and two, seven each.
        (26, [[4, 4, 4], [3, 2, 2], [3, 2, 2]]),
        (27, [[4, 4, 4], [4, 4, 4], [1, 1, 1]]),
        (35, [[4, 4, 4], [4, 4, 4], [4, 4, 3]]),
        (13, [[3, 2, 2], [2, 2, 2]]),
        (2, [[1, 1, 0]]),
        (0, []),
    ],
)
def test_three_ranks_of_four(tokens, sizes):
    shares = RankShares(tokens, 3, 4, drop_last=False)
    found = [
        [stop - start for start, stop in (shares.share(step, rank) for rank in range(3))] for step in range(len(shares))
    ]
    assert found == sizes
