"""A store holds one model's activations, whatever became noisy, leaks padding, or is set in torch's newer ways."""

import json

import pytest
import torch
from torch import nn

import mmcache
from mmcache.errors import CorruptError, PlanMismatchError
from mmcache.extraction import estimate, provenance
from mmcache.extraction.job import Extraction
from mmcache.format.manifest import read_manifest
from mmcache.models.identity import model_identity
from mmcache.system.atomic import publish_all

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")
pytestmark = pytest.mark.usefixtures("one_thread_without_syncing")

TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(10)]
SETTINGS = {
    "sites": ("resid_post",), "context_length": 24, "batch_size": 3, "dtype": torch.float32, "shard_tokens": 64,
}  # fmt: skip


def extract(path, model=None, **changes):
    return mmcache.extract(model or small.llama(), small.byte_tokenizer(), TEXTS, path, **SETTINGS | changes)


def touched(folder):
    """Inode, size and mtime of a folder, and of all that is in it, folders too."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def noisy():
    model = small.llama()

    def hook(_module, _args, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = first + 0.1 * torch.randn_like(first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    model.model.layers[1].register_forward_hook(hook)
    return model


@pytest.mark.filterwarnings("ignore:.*each time it sees the same tokens")
@pytest.mark.parametrize(("first", "second"), [(small.llama, noisy), (noisy, small.llama)])
@pytest.mark.parametrize("changes", [{}, {"sites": ("resid_post", "mlp_out")}, {"accept_numerics": True}])
def test_a_model_that_became_noisy_or_no_longer_is_may_not_go_on(tmp_path, first, second, changes):
    extract(tmp_path / "store", first())
    before = touched(tmp_path / "store")
    with pytest.raises(PlanMismatchError, match="two passes over the same tokens"):
        extract(tmp_path / "store", second(), **changes)
    assert touched(tmp_path / "store") == before


class Neighbours(nn.Module):
    """Mixes each token with its two neighbours, in two layers, and knows no attention mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(small.VOCABULARY, 32)
        self.mix = nn.ModuleList([nn.Conv1d(32, 32, 3, padding=1) for _ in range(2)])
        self.blocks = nn.ModuleList([nn.Identity() for _ in range(2)])

    def forward(self, tokens):
        rows = self.embed(tokens)
        for mix, block in zip(self.mix, self.blocks, strict=True):
            rows = block(rows + mix(rows.transpose(1, 2)).transpose(1, 2))
        return rows


def test_padding_that_reaches_only_the_last_tokens_is_noticed(tmp_path):
    one, many = (
        extract(tmp_path / str(size), Neighbours().eval(), sites=("blocks.*:out",), batch_size=size) for size in (1, 8)
    )
    for layer in one.layers:
        found, alone = many["blocks.*:out"].get_layer(layer), one["blocks.*:out"].get_layer(layer)
        assert torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("model", [small.llama, small.gpt2, small.bert])
def test_a_model_that_heeds_its_mask_keeps_whole_batches(tmp_path, model):
    store = extract(
        tmp_path / "store", model(), sites=("resid_post",) if model is not small.bert else ("encoder.layer.*:out",)
    )
    assert store.source["equal_lengths"] is False


def test_the_estimate_runs_what_the_job_would_run(tmp_path, monkeypatch):
    ran = []
    rate = estimate._rate
    monkeypatch.setattr(estimate, "_rate", lambda batches, run: ran.extend(batches) or rate(batches, run))
    job = Extraction(
        Neighbours().eval(), small.byte_tokenizer(), tmp_path / "store", **SETTINGS | {"sites": ("blocks.*:out",)}
    )
    job.survey(["a", "bb", "cc", "ddd"])
    assert [[len(tokens) for tokens in batch] for batch in ran] == [[2], [3, 3], [4]]


def test_precision_that_was_set_by_torchs_newer_setting_is_said(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", _refused)
    said = provenance.numerics(small.llama(), torch.device("cpu"), 8, None)["float32_matmul_precision"]
    assert (
        said
        == f"cuda {torch.backends.cuda.matmul.fp32_precision}, mkldnn {torch.backends.mkldnn.matmul.fp32_precision}"
    )


def _refused():
    raise RuntimeError("mix of the legacy and new APIs")


def test_a_configuration_says_the_same_in_each_process_and_is_json():
    def said():
        model = small.bert()
        model.config = {"most": float("inf"), "kind": object(), "dtypes": [torch.float16, (1, 2)]}
        return model_identity(model)["config"]

    keep = [object() for _ in range(100)]  # so that the next one lies elsewhere
    assert said() == said()
    assert json.loads(json.dumps(said(), allow_nan=False)) == said()
    assert said()["most"] == "inf"
    del keep


@pytest.mark.parametrize(
    "bad", [1, {}, {"output": [0.0], "sites": {}}, {"output": ["x"], "sites": {}}, {"output": None, "sites": 3}]
)
def test_a_fingerprint_that_is_none_is_a_damaged_root(tmp_path, bad):
    extract(tmp_path / "store")
    manifest = read_manifest(tmp_path / "store")
    manifest.source["fingerprint"] = bad
    publish_all(tmp_path / "store", {"zarr.json": manifest.to_json()})
    with pytest.raises(CorruptError, match="fingerprint"):
        extract(tmp_path / "store")


def test_a_worker_that_joins_is_compared_before_it_takes_the_lock(tmp_path):
    path = tmp_path / "store"
    extract(path)
    before = touched(path)
    job = Extraction(small.llama(rms_norm_eps=1e-3), small.byte_tokenizer(), path, **SETTINGS)
    with pytest.raises(PlanMismatchError, match=r"config\.rms_norm_eps"):
        job.join(accept_numerics=True)
    assert touched(path) == before


def test_a_job_for_a_bucket_is_compared_before_anything_is_made(s3_server, tmp_path):
    pytest.importorskip("obstore")
    url, staging = s3_server.url("acts"), tmp_path / "staging"
    extract(url, staging=staging)
    there = s3_server.objects("acts/")
    with pytest.raises(PlanMismatchError, match=r"config\.rms_norm_eps"):
        extract(url, small.llama(rms_norm_eps=1e-3), staging=tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    assert s3_server.objects("acts/") == there


def test_two_runs_of_a_job_make_the_same_bytes_and_roots_that_differ_in_the_record_alone(tmp_path):
    for name in ("one", "two"):
        extract(tmp_path / name, record={"who": name})
    small.assert_same_store(tmp_path / "one", tmp_path / "two")
    assert small.contents(tmp_path / "one")["zarr.json"] != small.contents(tmp_path / "two")["zarr.json"]
