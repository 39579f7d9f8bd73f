"""Batches of a plan: every sequence once, in order, from any token on."""

import math

import numpy as np
import pytest

from mmcache.extraction.runner import Batches
from mmcache.format.manifest import Manifest
from mmcache.write.token_columns import Column, publish_columns
from stores_and_processes import without_sync

LENGTHS = np.random.default_rng(3).integers(1, 9, 61)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    stops = np.cumsum(LENGTHS)
    spans = np.stack([stops - LENGTHS, stops, np.arange(len(LENGTHS))], axis=1)
    manifest = Manifest(
        kind="planned", store="s", layout="token", dtype="float32", sites={"x": 8}, layers=(0,),
        n_tokens=int(stops[-1]), n_sequences=len(LENGTHS),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        column = Column(path, manifest, "sequences", 0)
        column.extend(spans)
        publish_columns(path, [column])
    return path, manifest, spans


@pytest.mark.parametrize("size", [1, 2, 7, 61, 100])
def test_from_any_token_on_come_the_batch_that_it_is_in_and_all_behind_it(made, size):
    path, manifest, spans = made
    every = [spans[first : first + size].tolist() for first in range(0, len(spans), size)]
    batches = Batches(path, manifest, size)
    assert [batch.tolist() for batch in batches.spans()] == every
    for token in range(manifest.n_tokens):
        # The simple way: past every batch that ends before the token.
        rest = [batch for batch in every if batch[-1][1] > token]
        assert [batch.tolist() for batch in batches.spans(token)] == rest


def test_the_batches_before_a_token_are_not_read_through(made, monkeypatch):
    path, manifest, spans = made
    batches, read = Batches(path, manifest, 1), []
    window = batches._spans
    whole = window.read
    monkeypatch.setattr(window, "read", lambda start, stop: read.append(start) or whole(start, stop))
    first = next(batches.spans(int(spans[-2, 0])))
    assert first.tolist() == spans[-2:-1].tolist()
    assert len(read) <= math.ceil(math.log2(len(spans) + 1)) + 1
