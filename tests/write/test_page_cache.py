"""What is small stays in the page cache; what is made beside a model never gets there."""

import pytest

from mmcache.write import page_cache
from mmcache.write.page_cache import PageCachePolicy

FREE = 1 << 30


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(page_cache, "available_memory", lambda: FREE)


def test_the_first_bytes_stay_and_the_rest_goes_past():
    policy = PageCachePolicy()
    assert [policy.past_it(1 << 18) for _ in range(6)] == [False] * 4 + [True] * 2


def test_beside_a_model_all_of_it_goes_past():
    assert PageCachePolicy(busy=True).past_it(1)
