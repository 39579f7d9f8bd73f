"""Every site of every family, against hooks put by hand on the modules that the family's source names."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from mmcache.errors import ArgumentError, OutOfRangeError, UnknownSiteError, UnsupportedModelError
from mmcache.models.capture import capture
from mmcache.models.sites import SITES, TABLE, ResolvedSite, describe, resolve, unwrap

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LAYERS = 3
IDS = torch.tensor([[5, 9, 17, 3, 40, 8], [11, 2, 63, 30, 7, 21]])
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
NEOX = COMMON | {"intermediate_size": 48, "hidden_dropout": 0.3}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.3,
}


# What each family's forward pass does, read from its source: layer → {site: (module, end)}.
def gpt2(block):
    return {
        "resid_pre": (block, "in"),
        "resid_mid": (block.ln_2, "in"),
        "resid_post": (block, "out"),
        "attn_out": (block.attn, "out"),
        "mlp_in": (block.mlp, "in"),
        "mlp_out": (block.mlp, "out"),
    }


def neox_parallel(layer):
    return {
        "resid_pre": (layer, "in"),
        "resid_post": (layer, "out"),
        "attn_out": (layer.post_attention_dropout, "out"),
        "mlp_in": (layer.post_attention_layernorm, "out"),
        "mlp_out": (layer.post_mlp_dropout, "out"),
    }


def neox_sequential(layer):
    return neox_parallel(layer) | {"resid_mid": (layer.post_attention_layernorm, "in")}


def llama(layer):
    return {
        "resid_pre": (layer, "in"),
        "resid_mid": (layer.post_attention_layernorm, "in"),
        "resid_post": (layer, "out"),
        "attn_out": (layer.self_attn, "out"),
        "mlp_in": (layer.post_attention_layernorm, "out"),
        "mlp_out": (layer.mlp, "out"),
    }


def gemma(layer):
    return {
        "resid_pre": (layer, "in"),
        "resid_mid": (layer.pre_feedforward_layernorm, "in"),
        "resid_post": (layer, "out"),
        "attn_out": (layer.post_attention_layernorm, "out"),
        "mlp_in": (layer.pre_feedforward_layernorm, "out"),
        "mlp_out": (layer.post_feedforward_layernorm, "out"),
    }


def phi3(layer):
    return llama(layer) | {
        "attn_out": (layer.resid_attn_dropout, "out"),
        "mlp_out": (layer.resid_mlp_dropout, "out"),
    }


def olmo2(layer):
    return {
        "resid_pre": (layer, "in"),
        "resid_mid": (layer.mlp, "in"),
        "resid_post": (layer, "out"),
        "attn_out": (layer.post_attention_layernorm, "out"),
        "mlp_in": (layer.mlp, "in"),
        "mlp_out": (layer.post_feedforward_layernorm, "out"),
    }


# name → (model class, config class, config options, path of the layers, what each site is)
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h", gpt2),
    "gpt2-bare": ("GPT2Model", "GPT2Config", GPT2, "h", gpt2),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, "gpt_neox.layers", neox_parallel),
    "neox-bare": ("GPTNeoXModel", "GPTNeoXConfig", NEOX, "layers", neox_parallel),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NEOX | {"use_parallel_residual": False},
        "gpt_neox.layers",
        neox_sequential,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "model.layers", llama),
    "llama-bare": ("LlamaModel", "LlamaConfig", GROUPED, "layers", llama),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "model.layers", llama),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, "model.layers", llama),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}, "model.layers", llama),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA, "model.layers", gemma),
    "gemma2-bare": ("Gemma2Model", "Gemma2Config", GEMMA, "layers", gemma),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, "model.layers", gemma),
    "gemma3-bare": ("Gemma3TextModel", "Gemma3TextConfig", GEMMA, "layers", gemma),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED | {"resid_pdrop": 0.3}, "model.layers", phi3),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, "model.layers", olmo2),
    "olmo2-bare": ("Olmo2Model", "Olmo2Config", GROUPED, "layers", olmo2),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def build(family):
    kind, config, options, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    # A fresh model's norms are ones and its biases zeros: that would hide a site on the wrong side of a norm.
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def places(family):
    """{site: [(module, end) for each layer]}, from the family's own source."""
    _, _, _, path, sites_of = FAMILIES[family]
    by_layer = [sites_of(layer) for layer in build(family).get_submodule(path)]
    return {site: [sites[site] for sites in by_layer] for site in by_layer[0]}


def plain_hooks(places_by_site, run):
    """What hooks put by hand see while `run()` runs: {site: [tensor for each layer]}."""
    seen = {site: [None] * len(modules) for site, modules in places_by_site.items()}
    handles = []

    def before(site, layer, _module, args, kwargs):
        seen[site][layer] = args[0] if args else kwargs["hidden_states"]

    def after(site, layer, _module, _args, output):
        seen[site][layer] = output[0] if isinstance(output, tuple) else output

    for site, modules in places_by_site.items():
        for layer, (module, end) in enumerate(modules):
            if end == "in":
                hook = functools.partial(before, site, layer)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(functools.partial(after, site, layer)))
    run()
    for handle in handles:
        handle.remove()
    return seen


def sites_of(family):
    return tuple(site for site in SITES if site in places(family))


def captured_from(model, sites=SITES, ids=IDS):
    with torch.no_grad(), capture(model, sites) as captured:
        model(ids)
    return captured


def check_identities(captured):
    pre, post, attn, mlp = (captured[site] for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
    for layer in range(LAYERS):
        torch.testing.assert_close(pre[layer] + attn[layer] + mlp[layer], post[layer], rtol=1e-5, atol=1e-5)
        if "resid_mid" in captured:
            mid = captured["resid_mid"][layer]
            torch.testing.assert_close(pre[layer] + attn[layer], mid, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mid + mlp[layer], post[layer], rtol=1e-5, atol=1e-5)
        if layer:
            assert torch.equal(post[layer - 1], pre[layer])


@every_family
def test_every_site_is_what_plain_hooks_see(family):
    model = build(family)

    def run():
        with torch.no_grad():
            model(IDS)

    expected = plain_hooks(places(family), run)
    captured = captured_from(model, sites_of(family))
    assert list(captured) == list(sites_of(family))
    for site in captured:
        assert len(captured[site]) == LAYERS
        for ours, theirs in zip(captured[site], expected[site], strict=True):
            assert ours.shape == (2, 6, 32)
            assert torch.equal(ours, theirs)


@every_family
def test_the_residual_stream_adds_up(family):
    check_identities(captured_from(build(family), sites_of(family)))


@every_family
def test_resid_pre_is_what_transformers_calls_the_hidden_states(family):
    model = build(family)
    with torch.no_grad(), capture(model, ("resid_pre", "resid_post")) as captured:
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        assert torch.equal(captured["resid_pre"][layer], hidden[layer])
    # The last one is after the final norm, so it is no resid_post.
    assert not torch.equal(captured["resid_post"][-1], hidden[-1])


@pytest.mark.parametrize("family", ["gpt2", "neox", "neox-sequential", "phi3"])
def test_dropout_on_the_residual_branches_is_inside_what_is_added(family):
    model = build(family)
    model.train()
    try:
        torch.manual_seed(1)
        captured = captured_from(model, sites_of(family))
    finally:
        model.eval()
    assert (captured["attn_out"][0] == 0).float().mean() > 0.1
    check_identities(captured)


def test_the_families_of_the_table_are_all_tested():
    tested = {build(family).config.model_type for family in FAMILIES}
    assert set(TABLE) - tested == {"gpt_neox (sequential)", "gemma3", "transformer_lens"}


def test_olmo2_reads_resid_mid_in_its_mlp():
    captured = captured_from(build("olmo2"))
    assert all(map(torch.equal, captured["mlp_in"], captured["resid_mid"]))


def test_gemma_post_norms_are_not_the_bare_modules():
    captured = captured_from(build("gemma2"), ("mlp_out", "model.layers.*.mlp:out"))
    assert not torch.allclose(captured["mlp_out"][0], captured["model.layers.*.mlp:out"][0])


def test_parallel_blocks_have_no_resid_mid():
    model = build("neox")
    with pytest.raises(UnknownSiteError, match=r"gpt_neox.*no resid_mid: in parallel blocks.*resid_pre \+ attn"):
        resolve(model, ["resid_mid"])
    assert [site.name for site in describe(model)] == list(sites_of("neox"))


def test_describe_names_every_site_with_its_modules():
    sites = describe(build("gpt2"))
    assert [site.name for site in sites] == list(SITES)
    assert sites[1] == ResolvedSite(
        "resid_mid", (0, 1, 2), ("transformer.h.0.ln_2", "transformer.h.1.ln_2", "transformer.h.2.ln_2"), "in"
    )


def test_gemma3_with_images_is_read_in_its_text_part():
    text = GEMMA | {"vocab_size": 80}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=79
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for form in (model, model.model):
        captured = captured_from(form)
        check_identities(captured)
    assert resolve(model, ["mlp_in"])[0].modules[0] == "model.language_model.layers.0.mlp"


def test_a_bert_encoder_is_read_by_module_path():
    config = transformers.BertConfig(**COMMON, intermediate_size=48)
    for kind, prefix in (("BertModel", ""), ("BertForMaskedLM", "bert.")):
        model = getattr(transformers, kind)(config).eval()
        path = f"{prefix}encoder.layer.*.output"
        modules = [layer.output for layer in model.get_submodule(f"{prefix}encoder.layer")]
        expected = plain_hooks(
            {"x": [(module, "out") for module in modules]},
            functools.partial(model, IDS, torch.ones_like(IDS)),
        )
        with capture(model, [f"{path}:out"]) as captured:
            model(IDS, torch.ones_like(IDS))
        assert all(map(torch.equal, captured[f"{path}:out"], expected["x"]))
        with pytest.raises(UnsupportedModelError, match=r"'bert'.*such as '(bert\.)?encoder\.layer\.\*:out'"):
            resolve(model, ["resid_post"])
        with pytest.raises(UnsupportedModelError, match="no known family"):
            describe(model)
    with pytest.raises(UnknownSiteError, match=r"near matches: bert\.encoder\.layer\.\*\.output:out"):
        resolve(model, ["encoder.layer.*.output:out"])


def test_module_paths():
    model = build("llama")
    assert resolve(model, ["model.layers.*.mlp:out"]) == (
        ResolvedSite("model.layers.*.mlp:out", (0, 1, 2), tuple(f"model.layers.{i}.mlp" for i in range(3)), "out"),
    )
    assert resolve(model, ["model.layers.*.self_attn:in"], [2, 0])[0].modules == (
        "model.layers.0.self_attn",
        "model.layers.2.self_attn",
    )
    assert resolve(model, ["model.norm:in"]) == (ResolvedSite("model.norm:in", (0,), ("model.norm",), "in"),)
    assert resolve(model, ["model.layers.1.mlp:out"])[0].layers == (0,)


def test_layers_that_lack_a_module_are_left_out_of_a_module_path():
    model = nn.ModuleList([nn.ModuleDict({"a": nn.Identity()}) for _ in range(12)])
    for number in (1, 3, 11):
        model[number]["b"] = nn.Identity()
    assert resolve(model, ["*.b:out"])[0].layers == (1, 3, 11)
    with pytest.raises(OutOfRangeError, match=r"layer 2 has no '\*\.b:out' .*layers that do: 1, 3, 11"):
        resolve(model, ["*.b:out"], [1, 2])
    with pytest.raises(ArgumentError, match=r"same layers: '\*\.a:out' has \[0, 1, .*'\*\.b:out' has \[1, 3, 11\]"):
        resolve(model, ["*.a:out", "*.b:out"])
    assert [site.layers for site in resolve(model, ["*.a:out", "*.b:out"], [3, 1])] == [(1, 3), (1, 3)]


@pytest.mark.parametrize(
    ("site", "near"),
    [
        ("mlp_inn", r"near matches: .*mlp_in\b"),
        ("resid_poost", r"near matches: .*resid_post\b"),
        ("model.layer.*.mlp:out", r"near matches: model\.layers\.\*\.mlp:out"),
        ("model.layers.*.mpl:in", r"near matches: model\.layers\.\*\.mlp:in"),
        ("model.layers.*.mlp", r"near matches: model\.layers\.\*\.mlp:in, model\.layers\.\*\.mlp:out"),
        ("model.norm", r"near matches: model\.norm:in, model\.norm:out"),
        ("blocks.*.hook_resid_pots", r"near matches: .*blocks\.\*\.hook_resid_post"),
        ("qqqqqqq", r"standard sites are resid_pre, "),
        ("model.layers.*.mlp:inside", r"then ':in' or ':out'"),
        (":out", r"then ':in' or ':out'"),
    ],
)
def test_a_wrong_name_is_refused_with_near_matches(site, near):
    with pytest.raises(UnknownSiteError, match=near) as raised:
        resolve(build("llama"), [site])
    assert repr(site) in str(raised.value)
    assert isinstance(raised.value, KeyError)


@pytest.mark.parametrize(
    ("sites", "layers", "error", "message"),
    [
        (["mlp_in"], [12], OutOfRangeError, r"layer 12 not in model \(n_layers=3\)"),
        (["mlp_in"], [-1], OutOfRangeError, r"layer -1 not in model \(n_layers=3\)"),
        (["mlp_in"], [0, 1, 0], ArgumentError, r"duplicates: \(0, 1, 0\)"),
        (["mlp_in"], [], ArgumentError, "layers is empty"),
        (["mlp_in"], ["0"], ArgumentError, "whole number"),
        (["mlp_in"], [1.0], ArgumentError, "whole number"),
        ([], None, ArgumentError, "no sites given"),
        ("mlp_in", None, ArgumentError, r"string 'mlp_in'.*\['mlp_in'\]"),
        (["mlp_in", "mlp_in"], None, ArgumentError, "'mlp_in' is given twice"),
        (["mlp_in", "model.norm:out"], None, ArgumentError, "same layers"),
        (["model.*.*:out"], None, ArgumentError, r"more than one '\*'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(sites, layers, error, message):
    with pytest.raises(error, match=message):
        resolve(build("llama"), sites, layers)


def test_layers_come_out_ascending():
    assert resolve(build("llama"), ["mlp_in"], (2, 0))[0].layers == (0, 2)
    assert resolve(build("llama"), ["mlp_in"], torch.arange(2))[0].layers == (0, 1)


def test_transformer_lens_names_mean_a_site_and_its_layers():
    model = build("gpt2")
    standard = {site.name: site for site in describe(model)}
    for hook in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        assert resolve(model, [f"blocks.*.hook_{hook}"]) == (standard[hook],)
    (site,) = resolve(model, ["blocks.2.hook_resid_post"])
    assert site == ResolvedSite("resid_post", (2,), ("transformer.h.2",), "out")
    (merged,) = resolve(model, ["blocks.2.hook_mlp_out", "blocks.0.hook_mlp_out"])
    assert (merged.name, merged.layers) == ("mlp_out", (0, 2))
    assert resolve(model, ["blocks.1.hook_mlp_out", "mlp_in"], [1])[1].layers == (1,)


@pytest.mark.parametrize(
    ("sites", "layers", "error", "message"),
    [
        (["blocks.3.hook_mlp_out"], None, OutOfRangeError, r"layer 3 not in model \(n_layers=3\)"),
        (["blocks.1.hook_mlp_out"], [2], ArgumentError, r"with layers \[1\] but layers=\[2\]"),
        (["blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"], None, ArgumentError, "given twice"),
        (["blocks.1.hook_mlp_out", "mlp_out"], None, ArgumentError, "given twice"),
        (["blocks.*.hook_mlp_out", "mlp_out"], None, ArgumentError, "given twice"),
        (["blocks.1.hook_mlp_out", "mlp_in"], None, ArgumentError, "same layers"),
        (["blocks.*.ln2.hook_normalized"], None, UnknownSiteError, "before its learned weight.*use 'mlp_in'"),
        (["blocks.*.hook_mlp_in"], None, UnknownSiteError, "before the MLP's norm: use 'resid_mid'"),
        (["blocks.0.attn.hook_z"], None, UnknownSiteError, "output projection with ':in'"),
    ],
)
def test_transformer_lens_names_that_do_not_fit_are_refused(sites, layers, error, message):
    with pytest.raises(error, match=message):
        resolve(build("gpt2"), sites, layers)


def test_unwrap_finds_the_model_in_its_wrappers():
    model = build("llama")
    assert unwrap(model) is model

    def wrapper(kind, attribute, inner, *bases):
        holder = type(kind, bases or (nn.Module,), {})()
        setattr(holder, attribute, inner)
        return holder

    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(wrapper("DistributedDataParallel", "module", torch.compile(model, backend="eager"))) is model
    envoy = type("Envoy", (), {})
    assert unwrap(wrapper("LanguageModel", "_module", model, type("NNsight", (envoy,), {}))) is model
    assert unwrap(wrapper("NNsight", "_model", model)) is model
    peft = wrapper("PeftModel", "base_model", model)
    peft.get_base_model = lambda: model
    assert unwrap(peft) is model
    assert resolve(peft, ["mlp_in"]) == resolve(model, ["mlp_in"])
    with pytest.raises(UnsupportedModelError, match=r"str is not a torch nn\.Module"):
        unwrap("gpt2")


def test_a_family_whose_layers_are_not_there_is_refused():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    for block in model.transformer.h:
        block.feed_forward = block.mlp
        del block.mlp
    with pytest.raises(UnsupportedModelError, match=r"gpt2 family, but 0 of its module lists.*attn, ln_2, mlp"):
        resolve(model, ["mlp_in"])


def test_cross_attention_has_no_standard_sites():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, add_cross_attention=True))
    with pytest.raises(UnsupportedModelError, match="also adds to the residual stream"):
        resolve(model, ["mlp_in"])


def test_importing_sites_and_capture_does_not_import_transformers():
    code = "import sys, mmcache.models.sites, mmcache.models.capture; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class HookedBlock(nn.Module):
    """A parallel block in TransformerLens' way: every value goes through a module of its own."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.hook_in, self.hook_out, self.hook_mlp_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, resid):
        resid = self.hook_in(resid)
        return self.hook_out(resid + self.hook_mlp_out(self.mlp(resid)))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hook_embed = nn.Embedding(64, 8), nn.Identity()
        self.blocks = nn.ModuleList([HookedBlock() for _ in range(LAYERS)])
        self.hook_dict = {"hook_embed": self.hook_embed}
        for number, block in enumerate(self.blocks):
            # resid_pre and resid_post are aliases here, as they are in TransformerBridge.
            self.hook_dict |= {
                f"blocks.{number}.hook_resid_pre": block.hook_in,
                f"blocks.{number}.hook_resid_post": block.hook_out,
                f"blocks.{number}.hook_mlp_out": block.hook_mlp_out,
            }

    def forward(self, ids):
        return nn.Sequential(self.embed, self.hook_embed, *self.blocks)(ids)


def test_hook_points_are_sites_by_standard_and_by_their_own_names():
    torch.manual_seed(0)
    model = Hooked()
    assert [(site.name, site.modules[1], site.side) for site in describe(model)] == [
        ("resid_pre", "blocks.1.hook_in", "out"),
        ("resid_post", "blocks.1.hook_out", "out"),
        ("mlp_in", "blocks.1.mlp", "in"),
        ("mlp_out", "blocks.1.hook_mlp_out", "out"),
    ]
    assert resolve(model, ["blocks.*.hook_in:out"])[0].modules == resolve(model, ["resid_pre"])[0].modules
    assert resolve(model, ["hook_embed"]) == (ResolvedSite("hook_embed:out", (0,), ("hook_embed",), "out"),)
    captured = captured_from(model, ("resid_pre", "mlp_out", "blocks.*.hook_resid_post"))
    assert torch.equal(captured["resid_post"][0], captured["resid_pre"][0] + captured["mlp_out"][0])
    with pytest.raises(UnknownSiteError, match="no hook_resid_mid; in parallel blocks"):
        resolve(model, ["resid_mid"])
    with pytest.raises(UnknownSiteError, match=r"near matches: .*blocks\.\*\.hook_mlp_out"):
        resolve(model, ["blocks.0.hook_mlp_ouut"])
    with pytest.raises(UnknownSiteError, match=r"no site 'blocks\.0\.hook_pattern'"):
        resolve(model, ["blocks.0.hook_pattern"])


@pytest.fixture(scope="module")
def lens():
    with warnings.catch_warnings():
        # Its own dependencies warn while they are imported, differently in every version.
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformer_lens", reason="transformer_lens is not installed")


LENS_NAMES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def check_against_its_own_cache(model, names):
    ids = IDS[:, :5]
    _, cache = model.run_with_cache(ids)
    # Its hook points are sites by their standard names, as TransformerLens writes them, and as module paths.
    trap = "ln2.hook_normalized"
    traps = [f"blocks.*.{trap}"] if f"blocks.0.{trap}" in cache else []
    captured = captured_from(model, (*names, "mlp_in", *traps), ids)
    by_hook = captured_from(model, [f"blocks.*.hook_{name}" for name in names], ids)
    for layer in range(LAYERS):
        for name in names:
            assert torch.equal(captured[name][layer], cache[f"blocks.{layer}.hook_{name}"])
            assert torch.equal(by_hook[name][layer], cache[f"blocks.{layer}.hook_{name}"])
        for site in traps:
            normalized = captured[f"{site}:out"][layer]
            assert torch.equal(normalized, cache[f"blocks.{layer}.{trap}"])
            # What the MLP reads has been through the norm's weight and bias as well.
            assert not torch.allclose(captured["mlp_in"][layer], normalized)
    check_identities(captured)
    return captured


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")  # it is what is tested
def test_a_hooked_transformer_is_read_by_its_own_hook_points(lens, parallel):
    try:
        kind = lens.HookedTransformer
    except ImportError:
        pytest.skip("this transformer_lens has no HookedTransformer (it ended with version 3)")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_mlp=48, d_vocab=64, act_fn="gelu",
        normalization_type="LN", parallel_attn_mlp=parallel, device="cpu", seed=0,
    )  # fmt: skip
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    check_against_its_own_cache(model, [name for name in LENS_NAMES if not (parallel and name == "resid_mid")])
    assert [site.name for site in describe(model)] == [s for s in SITES if not (parallel and s == "resid_mid")]
    assert resolve(model, ["blocks.0.hook_resid_post:out"])[0].modules == ("blocks.0.hook_resid_post",)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "neox"])
def test_a_transformer_bridge_is_read_by_its_own_hook_points(lens, family, tmp_path):
    del lens  # imported there for its warnings, and to skip
    reason = "this transformer_lens has no TransformerBridge (it began with version 3)"
    bridge = pytest.importorskip("transformer_lens.model_bridge", reason=reason).TransformerBridge
    levels = tokenizers.models.WordLevel({f"t{i}": i for i in range(64)}, "t0")
    words = tokenizers.Tokenizer(levels)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "t0")
    # From a folder, because the bridge makes it anew from where it came from.
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    original = copy.deepcopy(build(family))
    original.config.architectures = [type(original).__name__]
    model = bridge.boot_transformers("tiny", hf_model=original, tokenizer=tokenizer)
    names = [name for name in LENS_NAMES if name in sites_of(family)]
    assert [site.name for site in describe(model)] == list(sites_of(family))
    captured = check_against_its_own_cache(model, names)
    ours = captured_from(build(family), (*names, "mlp_in"), IDS[:, :5])
    for name in ours:
        torch.testing.assert_close(captured[name], ours[name], rtol=1e-4, atol=1e-5)
