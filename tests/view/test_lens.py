"""The logit lens equals the model's own head, in every family; directions come from files that are only read."""

import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import mmcache
import small_models
from damaged_stores import TEXTS, extracted
from mmcache.view import Unembedding, lens, load_direction


def models():
    common = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    yield "llama", transformers.LlamaConfig(**common)
    yield "gemma2", transformers.Gemma2Config(**common, final_logit_softcapping=3.0)
    yield "gpt2", transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2)
    yield (
        "gpt_neox",
        transformers.GPTNeoXConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
    )


@pytest.mark.parametrize(
    ("family", "config"), list(models()), ids=lambda value: value if isinstance(value, str) else "config"
)
def test_the_last_layer_says_what_the_model_says(tmp_path, family, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    store = mmcache.extract(
        model, small_models.byte_tokenizer(), TEXTS[:3], tmp_path / "acts", sites=("resid_post",), context_length=24,
        dtype=torch.float32,
    )  # fmt: skip
    span = store.sequences[1]
    with torch.no_grad():
        logits = model(store.tokens[span.start : span.stop][None].long()).logits[0]
    unembedding = Unembedding.of(model)
    for offset in (0, 3, span.stop - span.start - 1):
        view = lens(store, "resid_post", span.start + offset, unembedding, k=5)
        chances = logits[offset].double().softmax(-1)
        assert np.allclose(view["probabilities"][-1], chances.topk(5).values, atol=1e-6), family
        assert view["tokens"][-1].tolist() == chances.topk(5).indices.tolist()
        assert view["entropy"][-1] == pytest.approx(-(chances * chances.log()).sum().item(), rel=1e-5)
        if offset == span.stop - span.start - 1:
            assert view["next"] == -1
            assert view["next_rank"].tolist() == [-1, -1]
        else:
            coming = int(store.tokens[span.start + offset + 1])
            assert view["next"] == coming
            assert view["next_rank"][-1] == int((chances > chances[coming]).sum())


def test_a_row_that_is_not_finite_has_no_chances(tmp_path):
    model = small_models.llama()
    width = Unembedding.of(model).d_model
    with mmcache.create(tmp_path / "acts", sites={"resid_post": width}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(torch.tensor([1, 2]), {"resid_post": torch.full((1, 2, width), math.nan)})
    view = lens(mmcache.open(tmp_path / "acts"), "resid_post", 0, Unembedding.of(model))
    assert np.isnan(view["probabilities"]).all()
    assert view.to_json()["data"]["probabilities"][0][0] == "NaN"


def test_what_does_not_fit_is_refused(tmp_path):
    store = extracted(tmp_path / "acts")
    unembedding = Unembedding.of(small_models.llama())
    with pytest.raises(mmcache.ArgumentError, match="size of the vocabulary"):
        lens(store, "mlp_in", 0, unembedding, k=0)
    wide = Unembedding(unembedding.head, None, None, 7, torch.float32)
    with pytest.raises(mmcache.ShapeError, match="rows of 7"):
        lens(store, "mlp_in", 0, wide)
    with pytest.raises(mmcache.UnsupportedModelError, match="has no head"):
        Unembedding.of(torch.nn.Linear(2, 2))
    with pytest.raises(mmcache.UnsupportedModelError):
        Unembedding.load(str(tmp_path / "nothing"))


def test_directions_from_files(tmp_path):
    vector = torch.randn(6)
    np.save(tmp_path / "v.npy", vector.numpy())
    safetensors.torch.save_file({"direction": vector.bfloat16()}, tmp_path / "v.safetensors")
    assert np.array_equal(load_direction(tmp_path / "v.npy"), vector.double().numpy())
    assert np.array_equal(load_direction(tmp_path / "v.safetensors"), vector.bfloat16().double().numpy())


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_a_direction_is_never_unpickled(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    safetensors.torch.save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name in ("evil.npy", "evil.safetensors", "short.npy", "two.safetensors", "nothing.npy"):
        with pytest.raises(mmcache.ArgumentError):
            load_direction(tmp_path / name)
