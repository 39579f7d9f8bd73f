"""What a model takes: its text part's sizes, ids that it has rows for, and one error for whatever its pass raises."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import mmcache
import small_models
from mmcache.errors import ArgumentError, CorpusError, MmcacheError, UnsupportedModelError
from mmcache.extraction.job import Extraction
from mmcache.extraction.runner import forward
from mmcache.models.capture import probe
from mmcache.models.inference import context_length, running, text_config, vocabulary

_TEXT_PATH = "model.language_model.layers.*.mlp:out"


def roberta():
    sizes = small_models._SIZES | {"max_position_embeddings": 40, "pad_token_id": 1}
    return transformers.RobertaModel(transformers.RobertaConfig(**sizes), add_pooling_layer=False).eval()


def with_config(**said):
    model = nn.Module()
    model.config = SimpleNamespace(**said)
    return model


def by_attribute_map(kind, **sizes):
    model = nn.Module()
    model.config = getattr(transformers, kind)(**sizes)
    return model


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (lambda: small_models.llava(max_position_embeddings=64), 64),
        (roberta, 38),
        (lambda: by_attribute_map("GPT2Config", n_positions=77), 77),
        (lambda: by_attribute_map("MptConfig", max_seq_len=78), 78),
        (lambda: by_attribute_map("DbrxConfig", max_seq_len=79), 79),
        (lambda: by_attribute_map("RwkvConfig", context_length=80), 80),
        (lambda: with_config(n_ctx=81), 81),
        (lambda: with_config(max_position_embeddings=-1, block_size=82), 82),
        (lambda: nn.ModuleDict({"cfg": nn.Identity()}), None),
        (lambda: with_config(max_position_embeddings=None), None),
    ],
)
def test_a_context_is_as_long_as_the_text_part_takes(model, most):
    made = model()
    assert context_length(made, None) == (most or 1024)
    if most is None:
        assert context_length(made, 10**6) == 10**6
    else:
        assert context_length(made, most) == most
        with pytest.raises(ArgumentError, match=f"context_length is {most + 1}: expected 1 to {most}"):
            context_length(made, most + 1)


def test_a_model_of_text_and_images_is_refused_what_its_text_part_cannot_take(tmp_path):
    model, tokenizer = small_models.llava(max_position_embeddings=64), small_models.byte_tokenizer()
    options = {"sites": [_TEXT_PATH], "layers": [0, 1]}
    with pytest.raises(ArgumentError, match="context_length is 65: expected 1 to 64"):
        Extraction(model, tokenizer, tmp_path / "store", context_length=65, **options)
    with pytest.raises(CorpusError, match="document 0 has token ids from 3 to 257: the model knows 0 to 256"):
        mmcache.extract(model, tokenizer, [np.array([3, 257])], tmp_path / "store", **options)
    with mmcache.extract(model, tokenizer, ["a text"], tmp_path / "other", **options) as store:
        assert store.sites == (_TEXT_PATH,)


def test_roberta_takes_the_longest_context_that_is_allowed():
    model = roberta()
    longest = context_length(model, None)
    with torch.inference_mode():
        model(torch.full((1, longest), 5))
        with (
            pytest.raises(UnsupportedModelError, match=r"failed on token ids \[1, 39\]"),
            running(model, torch.ones(1, 39)),
        ):
            model(torch.full((1, longest + 1), 5))


def test_the_rows_of_the_embedding_count_and_not_what_the_configuration_says():
    model = small_models.llama()
    assert vocabulary(model) == small_models.VOCABULARY
    model.config.vocab_size = 1000
    assert vocabulary(model) == small_models.VOCABULARY
    model.resize_token_embeddings(300)
    assert vocabulary(model) == 300
    # An embedding that is spread over devices shows no rows here.
    model.get_input_embeddings = lambda: SimpleNamespace(weight=torch.empty(0))
    assert vocabulary(model) == 300
    assert vocabulary(with_config(n_vocab=7)) == 7
    assert vocabulary(nn.Linear(2, 2)) is None


def test_a_transformer_lens_model_says_its_sizes_elsewhere():
    model = nn.Module()
    model.cfg = SimpleNamespace(n_ctx=33, d_vocab=50)
    assert (context_length(model, None), vocabulary(model)) == (33, 50)


def test_a_configuration_with_several_text_parts_is_asked_as_a_whole():
    def several(*, decoder):
        raise ValueError(f"Multiple valid text configs were found, decoder={decoder}")

    model = with_config(get_text_config=several, max_position_embeddings=9)
    assert text_config(model) is model.config
    assert context_length(model, None) == 9


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path):
    # As after tokenizer.add_special_tokens(…) without model.resize_token_embeddings(…).
    model, tokenizer = small_models.llama(vocab_size=56), small_models.letter_tokenizer()
    assert len(tokenizer) > 56
    store = mmcache.extract(model, tokenizer, ["abc"], tmp_path / "fits", layers=[0])
    store.close()
    with pytest.raises(CorpusError, match="document 1 has token ids from 56 to 56: the model knows 0 to 55"):
        mmcache.extract(model, tokenizer, ["abc", "Z"], tmp_path / "store", layers=[0])


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        (
            small_models.t5,
            "encoder.block.*.layer.1:out",
            r"T5Model failed .* give its encoder alone, model\.get_encoder\(\)",
        ),
        (small_models.vit, "embeddings:out", "ViTModel takes pixel_values, not token ids"),
        (small_models.whisper, "encoder.layers.*:out", "WhisperModel takes input_features, not token ids"),
    ],
)
def test_a_model_that_does_not_run_on_token_ids_is_refused(model, path, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        probe(model(), [path])
    assert "\n" not in str(caught.value)


def test_the_encoder_of_an_encoder_decoder_runs():
    assert probe(small_models.t5().get_encoder(), ["block.*.layer.1:out"]) == {
        "block.*.layer.1:out": small_models.WIDTH
    }


class _Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.inner, self.error = nn.Embedding(4, 4), error

    def forward(self, ids):
        self.inner(ids)
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyError("labels"), RuntimeError("several\n  lines"), IndexError("x" * 1000), AssertionError()]
)
def test_what_a_forward_pass_raises_is_one_line_with_its_cause(error):
    with pytest.raises(UnsupportedModelError, match=r"_Failing failed on token ids \[1, 2\] from 0 to 0") as caught:
        probe(_Failing(error), ["inner:out"])
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    assert type(error).__name__ in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError(), MemoryError(), MmcacheError("ours")])
def test_what_is_not_the_models_fault_passes(error):
    with pytest.raises(type(error)) as caught:
        probe(_Failing(error), ["inner:out"])
    assert caught.value is error


def test_a_batch_that_a_model_fails_on_is_named():
    model = _Failing(None)
    model.forward = model.inner.forward
    with mmcache.capture(model, ["inner:out"]) as captured:
        forward(model, captured, np.array([[0, 3]]), np.ones((1, 2)), torch.device("cpu"))
        with pytest.raises(
            UnsupportedModelError, match=r"failed on token ids \[1, 2\] from 3 to 4, .*index out of range"
        ):
            forward(model, captured, np.array([[3, 4]]), np.ones((1, 2)), torch.device("cpu"))
