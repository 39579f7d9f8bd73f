"""How many threads a job computes with: the plan's, or as many as one process would take."""

import os

import pytest
import torch

import mmcache
from mmcache.extraction import provenance
from mmcache.extraction.provenance import plan_threads
from mmcache.system.launcher import Rank

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")
WORKER = Rank(1, 2, 1, "torchrun")


@pytest.fixture(autouse=True)
def kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [Rank(), WORKER])
def test_the_plan_says_how_many(tmp_path, rank, monkeypatch):
    torch.set_num_threads(3)
    mmcache.extract(small.llama(), small.byte_tokenizer(), ["text"], tmp_path / "store", sites=("mlp_in",))
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan_threads(tmp_path / "store", rank)
    assert torch.get_num_threads() == 3


def test_torchruns_one_thread_is_not_what_the_user_asked_for(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan_threads(tmp_path, Rank())
    assert torch.get_num_threads() == 1
    plan_threads(tmp_path, WORKER)
    assert torch.get_num_threads() == provenance._usual_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_another_number_is_what_the_user_asked_for(tmp_path, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(provenance, "_usual_threads", lambda: pytest.fail("asked"))
    plan_threads(tmp_path, WORKER)
    assert torch.get_num_threads() == 2
