"""A store holds what one model computes: another is refused by name, the same one is known again, whatever runs it."""

import contextlib
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import mmcache
from mmcache.extraction.fingerprint import _difference, _ids, _sketch, probe_model

transformers = pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

TEXTS = ["hello there, a short text", "another one", "and a third one that is somewhat longer"] * 3
ASKED = {"dtype": torch.float32, "context_length": 32, "batch_size": 4}
CPU = torch.device("cpu")


def extract(model, path, sites=("resid_mid",), **options):
    return mmcache.extract(model, small.byte_tokenizer(), TEXTS, path, sites=sites, **{**ASKED, **options})


def state(path):
    """Every file and folder below a path: its bytes, and when it was last changed."""
    return {
        str(found.relative_to(path)): (found.stat().st_mtime_ns, found.read_bytes() if found.is_file() else b"")
        for found in [path, *path.rglob("*")]
    }


def yarn(theta=10000.0):
    return {"rope_type": "yarn", "factor": 4.0, "rope_theta": theta, "original_max_position_embeddings": 32}


def default(theta):
    return {"rope_type": "default", "rope_theta": theta}


CONFIGURATIONS = {
    "rope_theta": ({"rope_parameters": default(20000.0)}, r"config\.rope_parameters\.rope_theta"),
    "yarn": ({"rope_parameters": yarn()}, r"config\.rope_parameters\.rope_type"),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        r"config\.rope_parameters\.factor",
    ),
    "rms_norm_eps": ({"rms_norm_eps": 1e-5}, r"config\.rms_norm_eps"),
    "hidden_act": ({"hidden_act": "gelu"}, r"config\.hidden_act"),
    "max_position_embeddings": ({"max_position_embeddings": 256}, r"config\.max_position_embeddings"),
    "attention_dropout": ({"attention_dropout": 0.1}, r"config\.attention_dropout"),
}


class Adapted(torch.nn.Module):
    """A layer of peft's, as far as anybody sees it from outside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, {"one": 0.5, "other": -0.5}
        self.active_adapters, self.disable_adapters, self.merged_adapters = ["one"], False, []

    def forward(self, given):
        scale = 0.0 if self.disable_adapters else sum(self.scale[name] for name in self.active_adapters)
        return self.inner(given) * (1 + scale)


def adapted():
    model = small.llama()
    model.model.layers[1].mlp.down_proj = Adapted(model.model.layers[1].mlp.down_proj)
    return model


def shifted(_module, _given, output):
    return (output[0] + 0.3, *output[1:]) if isinstance(output, tuple) else output + 0.3


def later_layers_only(model):
    model.model.layers[2].register_forward_hook(shifted)


def before_a_layer(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _module, given: (given[0] * 1.2,))


def another_forward(model):
    real = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda given: real(given) * 1.1


def other_epsilon_behind_the_configuration(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.1


def rounded_weights(model):
    """Weights in 8 bits, dequantised as they are used: the parameters are what they were."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, given: (torch.round(given[0] * 8) / 8, *given[1:]))


WAYS = {
    "a hook": (lambda model: model.model.layers[0].register_forward_hook(shifted), r"hooks \(on model\.layers\.0\)"),
    "a hook behind all sites": (later_layers_only, "the model's output is .* off"),
    "a hook before a module": (before_a_layer, r"hooks \(on model\.layers\.1\.mlp\)"),
    "another forward": (another_forward, "computes something else"),
    "a norm's own epsilon": (other_epsilon_behind_the_configuration, "computes something else"),
    "activations in 8 bits": (rounded_weights, "computes something else"),
}


def refused(model, path, match, sites):
    before = state(path)
    with pytest.raises(mmcache.PlanMismatchError, match=match):
        extract(model, path, sites)
    assert state(path) == before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("fingerprint") / "store"
    extract(small.llama(), path)
    return path


# A resume with the same sites, and one that asks for a site more, or only for others.
both_ways = pytest.mark.parametrize("sites", [("resid_mid",), ("resid_mid", "mlp_out"), ("resid_mid", "resid_pre")])


@both_ways
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_another_configuration_is_refused_by_its_field_before_anything_is_written(made, name, sites):
    options, match = CONFIGURATIONS[name]
    refused(small.llama(**options), made, match, sites)


@both_ways
@pytest.mark.parametrize("name", WAYS)
def test_what_changes_the_computation_is_refused_before_anything_is_written(made, name, sites):
    change, match = WAYS[name]
    model = small.llama()
    change(model)
    refused(model, made, match, sites)


@both_ways
def test_autocast_is_refused_by_name(made, sites):
    with torch.autocast("cpu", torch.bfloat16):
        refused(small.llama(), made, "autocast", sites)


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore::DeprecationWarning", "ignore::UserWarning"
)
def test_8_bit_loading_is_refused(made):
    quantised = torch.ao.quantization.quantize_dynamic(small.llama(), {torch.nn.Linear}, torch.qint8)
    refused(quantised, made, "weights", ("resid_mid",))


def test_a_smaller_window_and_fewer_experts_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 257, "max_position_embeddings": 128, "num_key_value_heads": 2, "initializer_range": 0.3}

    def mixtral(**options):
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**{**sizes, "num_local_experts": 4, "sliding_window": 40, **options})
        return transformers.MixtralForCausalLM(config).eval()

    path = tmp_path / "store"
    asked = ("model.layers.*:out",)
    extract(mixtral(), path, asked)
    refused(mixtral(sliding_window=16), path, r"config\.sliding_window", asked)
    refused(mixtral(num_experts_per_tok=1), path, r"config\.num_experts_per_tok", asked)
    hidden = mixtral()
    for module in hidden.modules():
        if hasattr(module, "top_k"):
            module.top_k = 1
    refused(hidden, path, "computes something else", asked)


def test_adapters_are_part_of_the_identity(tmp_path):
    path, model = tmp_path / "store", adapted()
    extract(model, path)
    layer = model.model.layers[1].mlp.down_proj
    layer.disable_adapters = True
    refused(model, path, r"adapters\.disabled", ("resid_mid",))
    layer.disable_adapters, layer.active_adapters = False, ["other"]
    refused(model, path, r"adapters\.active", ("resid_mid",))
    layer.active_adapters = ["one"]
    assert extract(model, path).n_tokens


def test_the_text_part_of_a_larger_configuration_is_compared(tmp_path):
    path = tmp_path / "store"
    asked = ("model.language_model.layers.*:out",)
    extract(small.llava(), path, asked)
    changed = small.llava()
    changed.config.text_config.rms_norm_eps = 0.5
    refused(changed, path, r"config\.text_config\.rms_norm_eps", asked)


def family(name):
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "ffn_dim": 48, "word_embed_proj_dim": 32}
    sizes |= {"num_local_experts": 4, "pad_token_id": 0, "initializer_range": 0.3}
    config = transformers.CONFIG_MAPPING[name](**sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


FAMILIES = (
    "llama",
    "gpt2",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "gpt_neox",
    "olmo2",
    "opt",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_threads_kernels_and_batches_leave_the_fingerprint_within_its_tolerance(name, tmp_path):
    path, sites = tmp_path / "store", (small.layers_path(name),)
    model = family(name)
    extract(model, path, sites)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert extract(family(name), path, sites, batch_size=3, accept_numerics=True).n_tokens
    finally:
        torch.set_num_threads(threads)
    with contextlib.suppress(ValueError):  # some families have one way to attend
        model.set_attn_implementation("eager")
        assert extract(model, path, sites, accept_numerics=True).n_tokens


def test_the_same_job_in_another_process_is_the_same_to_the_last_bit(tmp_path):
    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "store"
    small.llama().save_pretrained(folder)
    small.byte_tokenizer().save_pretrained(folder)
    text.write_text("A line of text that is long enough to be a context of its own.\n" * 5)
    run = [sys.executable, "-m", "mmcache", "extract", str(folder), str(text), "--sites", "resid_post"]
    run += ["--context-length", "24", "--out"]
    here = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for store in (out, out, tmp_path / "again"):
        done = subprocess.run([*run, str(store)], capture_output=True, text=True, check=False, env=here)
        assert done.returncode == 0, done.stderr
    # Two stores of one job are equal to the last bit, but for what the root records of when and how it was made.
    ours, theirs = ({name: body for name, (_, body) in state(p).items()} for p in (out, tmp_path / "again"))
    roots = [json.loads(files.pop("zarr.json"))["attributes"]["mmcache"] for files in (ours, theirs)]
    assert ours == theirs
    for root in roots:
        del root["digest"], root["source"]["record"]
    assert roots[0] == roots[1]


def test_a_store_that_recorded_less_is_gone_on_with_and_that_is_said_once(tmp_path):
    path = tmp_path / "store"
    extract(small.llama(), path)
    from mmcache.format.manifest import read_manifest  # noqa: PLC0415
    from mmcache.system.atomic import publish  # noqa: PLC0415

    manifest = read_manifest(path)
    source = manifest.source
    for name in ("fingerprint", "equal_lengths"):
        del source[name]
    for name in ("config", "adapters"):
        del source["identity"][name]
    for name in ("activations", "autocast", "tf32", "deterministic"):
        del source["numerics"][name]
    publish(path, "zarr.json", manifest.to_json())
    with pytest.warns(mmcache.ProvenanceWarning, match="older mmcache"):
        extract(small.llama(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = extract(small.llama(), path)
    assert store.source["identity"]["config"]["hidden_size"] == 32
    assert store.source["numerics"]["deterministic"] is False
    assert store.source["equal_lengths"] is False
    refused(small.llama(rms_norm_eps=1e-5), path, "rms_norm_eps", ("resid_mid",))


def test_a_model_that_never_repeats_itself_is_told_and_not_refused(tmp_path):
    model = small.llama()
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _given, output: output + torch.rand(1))
    for _ in range(2):
        with pytest.warns(mmcache.ProvenanceWarning, match="each time"):
            store = extract(model, tmp_path / "store")
    assert store.source["fingerprint"] is None
    assert store.source["numerics"]["activations"] is None


def test_an_added_site_is_compared_too_from_then_on(tmp_path):
    path = tmp_path / "store"
    extract(small.llama(), path)
    store = extract(small.llama(), path, ("resid_mid", "mlp_out"))
    assert set(store.source["fingerprint"]["sites"]) == {"resid_mid", "mlp_out"}


class Encoder(torch.nn.Module):
    """A model that sees both ways, and takes no mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(257, 16)
        layers = [torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(layers)

    def forward(self, tokens):
        given = self.embed(tokens)
        for block in self.blocks:
            given = block(given)
        return given


@pytest.mark.parametrize("shard_tokens", [None, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_where_padding_would_show_no_batch_is_padded(tmp_path, batch_size, shard_tokens):
    model, path = Encoder().eval(), tmp_path / "store"
    store = extract(model, path, ("blocks.*:out",), batch_size=batch_size, shard_tokens=shard_tokens)
    assert store.source["equal_lengths"] is True
    with torch.no_grad():
        for number, span in enumerate(store.sequences):
            given = model.blocks[0](model.embed(store.tokens[span.start : span.stop].long()[None]))[0]
            torch.testing.assert_close(store["blocks.*:out"].sequence(number)[0], given, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_model_that_heeds_its_mask_is_padded(name):
    found = probe_model(getattr(small, name)(), [small.layers_path(name)], None, CPU, 8)
    assert not found.padding_shows


def test_the_context_is_a_function_of_the_vocabulary_alone():
    assert _ids(50257, 5).tolist() == [[14813, 21466, 18592, 43361, 7156]]
    assert _ids(1, 4).tolist() == [[0, 0, 0, 0]]
    assert (_ids(300, 64)[:, :24] == _ids(300, 24)).all()


def test_a_sketch_sees_past_sinks_and_outlier_dimensions_and_tells_how_far_two_are_apart():
    rows = np.random.default_rng(0).normal(size=(64, 128))
    rows[0] *= 800
    rows[:, 5] *= 400
    near, far = rows.copy(), rows.copy()
    near[1:] *= 1 + 1e-4 * np.random.default_rng(1).normal(size=(63, 128))
    far[1:, np.arange(128) != 5] += 0.1 * np.random.default_rng(2).normal(size=(63, 127))
    assert _difference(_sketch(rows), _sketch(rows)) == 0
    assert _difference(_sketch(rows), _sketch(near)) < 1e-3
    assert 0.03 < _difference(_sketch(rows), _sketch(far)) < 0.3
    # As large in every place, but twice as large.
    assert _difference(_sketch(rows), _sketch(2 * rows)) == pytest.approx(np.log(2))
    rows[3, 3] = np.nan
    assert _sketch(rows) is None
    assert _difference(_sketch(rows), _sketch(near)) == float("inf")


def test_one_token_sent_to_another_expert_is_rounding():
    rows = np.random.default_rng(0).normal(size=(64, 128))
    other = rows.copy()
    other[9] = np.random.default_rng(1).normal(size=128)
    assert _difference(_sketch(rows), _sketch(other)) < 1e-2


def test_the_fingerprint_costs_little_of_a_job():
    passes = []
    model = small.llama()
    model.model.embed_tokens.register_forward_pre_hook(lambda _module, given: passes.append(given[0].numel()))
    probe_model(model, ["resid_mid"], None, CPU, 8)
    assert sum(passes) < 0.01 * 100_000
