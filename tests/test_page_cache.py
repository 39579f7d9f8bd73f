"""What is small stays in the page cache; what is known to be large never gets there."""

import pytest

from mmcache import page_cache
from mmcache.page_cache import PageCachePolicy

FREE = 256 << 20


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(page_cache, "available_memory", lambda: FREE)


def test_the_first_bytes_stay_and_the_rest_goes_past():
    policy = PageCachePolicy()
    assert [policy.past_it(1 << 18) for _ in range(6)] == [False] * 4 + [True] * 2


def test_what_is_known_to_be_large_goes_past_from_the_first_byte():
    assert PageCachePolicy((1 << 20) + 1).past_it(1)
    assert not PageCachePolicy((1 << 20) - 1).past_it(1)
