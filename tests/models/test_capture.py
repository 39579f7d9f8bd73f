"""How captures begin, end, nest and fail, mostly on a model small enough to see through."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mmcache.errors import (
    ArgumentError,
    IncompleteError,
    OutOfRangeError,
    ShapeError,
    UnknownSiteError,
    UnsupportedModelError,
)
from mmcache.models.capture import capture, probe

LAYERS = 4
PATH = "layers.*.mlp:out"
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class BlockWriter(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mlp(x), "a tuple, as older layers return"


class Toy(nn.Module):
    """A residual model that counts the calls of its layers and can be told to fail before one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([BlockWriter() for _ in range(LAYERS)])
        self.head = nn.Linear(8, 16)
        self.calls = []
        self.fail_before = None

    def forward(self, ids):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            if number == self.fail_before:
                raise RuntimeError("asked to fail")
            self.calls.append(number)
            x, _ = layer(x)
        self.calls.append("head")
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def values(model, ids=IDS):
    """What the MLPs return, computed without hooks."""
    x, found = model.embed(ids), []
    for layer in model.layers:
        found.append(layer.mlp(x))
        x = x + found[-1]
    return found


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_captured_is_a_mapping_from_site_to_layers(model):
    with capture(model, [PATH, "layers.*:in"], [1, 3]) as captured:
        model(IDS)
    assert list(captured) == [PATH, "layers.*:in"]
    assert len(captured) == 2
    assert PATH in captured
    assert "mlp_out" not in captured
    assert same(captured[PATH], [values(model)[1], values(model)[3]])
    assert dict(captured).keys() == {PATH, "layers.*:in"}
    assert [site.layers for site in captured.sites] == [(1, 3), (1, 3)]
    assert "4 of 4" in repr(captured)
    with pytest.raises(UnknownSiteError, match="'mlp_out' is not captured; captured are layers"):
        captured["mlp_out"]


def test_the_tensors_are_the_models_own(model):
    kept = []
    model.layers[0].register_forward_hook(lambda _module, _args, output: kept.append(output[0]))
    with capture(model, ["layers.*:out", "layers.*:in"]) as captured:
        model(IDS)
    assert captured["layers.*:out"][0] is kept[0]
    assert captured["layers.*:in"][1] is kept[0]
    # Not detached either: a loss on a captured tensor reaches the weights.
    captured["layers.*:out"][0].sum().backward()
    assert model.embed.weight.grad is not None


def test_a_hook_that_was_there_before_is_captured_as_the_model_sees_it(model):
    model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: output * 0)
    with capture(model, [PATH]) as captured:
        model(IDS)
    assert not captured[PATH][0].any()


def test_reading_before_a_forward_pass_is_refused(model):
    with (
        capture(model, [PATH]) as captured,
        pytest.raises(IncompleteError, match=r"'layers\.\*\.mlp:out' has nothing yet: call the model"),
    ):
        captured[PATH]


def test_a_module_that_did_not_run_is_named(model):
    for layer in model.layers:
        layer.spare = nn.Linear(8, 8)
    with capture(model, ["layers.*.spare:out", PATH], [2]) as captured:
        model(IDS)
    assert same(captured[PATH], values(model)[2:3])
    with pytest.raises(IncompleteError, match=r"'layers\.2\.spare' \(layer 2\) did not run"):
        captured["layers.*.spare:out"]


def test_a_new_pass_replaces_the_last_one_whole(model):
    with capture(model, [PATH]) as captured:
        model(IDS)
        model(IDS + 1)
        assert same(captured[PATH], values(model, IDS + 1))
        model.fail_before = 2
        with pytest.raises(RuntimeError, match="asked to fail"):
            model(IDS)
        with pytest.raises(IncompleteError, match=r"module 'layers\.2\.mlp' \(layer 2\) did not run in the last"):
            captured[PATH]
        model.fail_before = 0
        with pytest.raises(RuntimeError, match="asked to fail"):
            model(IDS)
        with pytest.raises(IncompleteError, match="layer 0"):
            captured[PATH]
        model.fail_before = None
        model(IDS)
        assert same(captured[PATH], values(model))


def test_the_last_pass_is_let_go_of_before_the_next_begins(model):
    alive = []
    with capture(model, [PATH]) as captured, torch.no_grad():
        model(IDS)
        last = weakref.ref(captured[PATH][0])
        model.embed.register_forward_hook(lambda *_: alive.append(last() is not None))
        gc.disable()
        try:
            model(IDS)
        finally:
            gc.enable()
    assert alive == [False]


def test_layers_called_by_hand_make_passes_too(model):
    def by_hand(ids, layers=LAYERS):
        x = model.embed(ids)
        for layer in model.layers[:layers]:
            x, _ = layer(x)

    with capture(model, [PATH]) as captured:
        by_hand(IDS)
        assert same(captured[PATH], values(model))
        by_hand(IDS + 1, layers=2)
        with pytest.raises(IncompleteError, match="layer 2"):
            captured[PATH]
        by_hand(IDS + 2)
        assert same(captured[PATH], values(model, IDS + 2))


def test_hooks_are_removed_whatever_happens(model):
    with capture(model, [PATH]) as captured:
        assert count_hooks(model) == LAYERS + 2
        model(IDS)
    assert count_hooks(model) == 0
    before = captured[PATH]
    model(IDS + 1)
    assert same(captured[PATH], before)
    with pytest.raises(ZeroDivisionError), capture(model, [PATH]):
        _ = 1 / 0
    assert count_hooks(model) == 0
    with pytest.raises(OutOfRangeError), capture(model, [PATH], [LAYERS]):
        pass
    assert count_hooks(model) == 0


def test_captures_nest(model):
    with capture(model, [PATH]) as outer:
        with capture(model, ["layers.*:in"], [0]) as inner:
            model(IDS)
        assert same(inner["layers.*:in"], [model.embed(IDS)])
        model(IDS + 1)
        assert same(inner["layers.*:in"], [model.embed(IDS)])
    assert same(outer[PATH], values(model, IDS + 1))


def test_stop_skips_what_is_not_needed_and_changes_no_bit(model):
    with capture(model, [PATH], [0, 2]) as whole:
        assert whole.run(model, IDS).shape == (2, 3, 16)
    model.calls.clear()
    with capture(model, [PATH], [0, 2], stop=True) as captured:
        assert captured.run(model, ids=IDS) is None
        assert model.calls == [0, 1, 2]
        assert same(captured[PATH], whole[PATH])
        captured.run(model, IDS + 1)
        assert same(captured[PATH], [values(model, IDS + 1)[0], values(model, IDS + 1)[2]])
    assert model.calls == [0, 1, 2] * 2
    assert count_hooks(model) == 0


def test_stop_before_a_module_leaves_that_module_out(model):
    ran = []
    model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    with capture(model, ["layers.*.mlp:in"], [1], stop=True) as captured:
        captured.run(model, IDS)
    assert not ran
    assert captured["layers.*.mlp:in"][0].shape == (2, 3, 8)


def test_stop_by_a_direct_call_ends_the_block_without_an_error(model):
    after = []
    with capture(model, [PATH], [0], stop=True) as captured:
        model(IDS)
        after.append("not reached")
    assert not after
    assert same(captured[PATH], values(model)[:1])


def test_stop_of_one_capture_is_not_taken_for_anothers(model):
    with capture(model, [PATH], [0], stop=True) as outer:
        with capture(model, [PATH], stop=True) as inner:
            inner.run(model, IDS)
        pytest.fail("the outer capture had all it wanted, so its block ends, and not only the inner one")
    assert same(outer[PATH], values(model)[:1])
    with pytest.raises(IncompleteError):
        inner[PATH]
    with capture(model, [PATH]) as outer, capture(model, [PATH], [0], stop=True) as inner:
        inner.run(model, IDS)
        with pytest.raises(IncompleteError, match="layer 1"):
            outer[PATH]
        # The end of the pass was noticed, so that calls by hand begin a new one.
        x, _ = model.layers[0](model.embed(IDS + 1))
        model.layers[1](x)
        with pytest.raises(IncompleteError, match="layer 2"):
            outer[PATH]


def test_run_lets_other_errors_through(model):
    model.fail_before = 1
    with capture(model, [PATH], stop=True) as captured, pytest.raises(RuntimeError, match="asked to fail"):
        captured.run(model, IDS)


class Calls(nn.Module):
    """Calls its one inner module as the test says."""

    def __init__(self, call, inner=None):
        super().__init__()
        self.inner, self.call = inner or nn.Identity(), call

    def forward(self, *args, **kwargs):
        return self.call(self.inner, *args, **kwargs)


class Returns(nn.Module):
    def forward(self, *args, **kwargs):
        return args[0] if args else kwargs


X = torch.arange(6.0).reshape(1, 2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda inner: inner(X, torch.zeros(1)),
        lambda inner: inner(hidden_states=X, mask=torch.zeros(1)),
        lambda inner: inner(x=X, flag=True),
    ],
)
def test_an_input_is_found_wherever_it_is_passed(call):
    model = Calls(call, Returns())
    with capture(model, ["inner:in"]) as captured:
        model()
    assert captured["inner:in"][0] is X


@pytest.mark.parametrize(
    ("site", "call", "message"),
    [
        ("inner:in", lambda inner: inner(a=X, b=X), "was given a dict of a, b"),
        ("inner:in", lambda inner: inner((X,)), "was given a tuple"),
        ("inner:in", lambda inner: inner(), "was given a dict of nothing"),
        ("inner:out", lambda inner: inner({"logits": X}), "returned a dict of logits"),
        ("inner:out", lambda inner: inner(None), "returned a NoneType"),
        ("inner:out", lambda inner: inner(([X],)), "returned a list"),
    ],
)
def test_what_is_no_tensor_is_refused(site, call, message):
    model = Calls(call, Returns())
    with capture(model, [site]), pytest.raises(ArgumentError, match=f"module 'inner' {message}.*further in"):
        model()


def test_a_module_that_runs_twice_in_a_pass_is_refused_unless_nothing_changes():
    model = Calls(lambda inner: inner(inner(X)), nn.ReLU())
    with capture(model, ["inner:out"]) as captured:
        model()
    assert torch.equal(captured["inner:out"][0], X)
    model = Calls(lambda inner: inner(inner(X)), nn.Linear(3, 3))
    with capture(model, ["inner:out"]), pytest.raises(UnsupportedModelError, match="'inner' ran more than once"):
        model()


def test_one_module_shared_by_all_layers_is_refused(model):
    for layer in model.layers:
        layer.mlp = model.layers[0].mlp
    with capture(model, [PATH]), pytest.raises(UnsupportedModelError, match="ran more than once"):
        model(IDS)


def test_probe_gives_the_width_of_each_site(model):
    assert probe(model, [PATH, "layers.*:in"], [0, 3]) == {PATH: 8, "layers.*:in": 8}
    assert probe(model, ["head:out", "embed:out"]) == {"head:out": 16, "embed:out": 8}
    assert model.training
    assert count_hooks(model) == 0


def test_probe_passes_only_what_a_model_takes():
    seen = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 8)

        def forward(self, ids, use_cache=True, attention_mask=None):
            seen.update(use_cache=use_cache, mask=attention_mask, inference=torch.is_inference_mode_enabled())
            return self.embed(ids)

    assert probe(Model().eval(), ["embed:out"]) == {"embed:out": 8}
    assert seen["use_cache"] is False
    assert seen["mask"].tolist() == [[1, 1]]
    assert seen["inference"]


@pytest.mark.parametrize(
    "reshape", [lambda x: x[0], lambda x: x.transpose(0, 1), lambda x: x[:, :1], lambda x: x[..., None]]
)
def test_probe_refuses_what_is_not_batch_by_seq_by_width(reshape):
    embed = nn.Embedding(4, 8)
    model = Calls(lambda inner, ids: inner(reshape(embed(ids))))
    with pytest.raises(ShapeError, match=r"'inner' has shape \[.*expected \[1, 2, width\]"):
        probe(model, ["inner:out"])


def test_probe_refuses_a_site_of_several_widths():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 6))
    with pytest.raises(ShapeError, match=r"different widths over its layers \(8, 6\)"):
        probe(model, ["*:out"])


def test_probe_refuses_a_module_that_does_not_run(model):
    model.layers[0].spare = nn.Linear(8, 8)
    with pytest.raises(IncompleteError, match=r"'layers\.0\.spare' \(layer 0\) did not run"):
        probe(model, ["layers.*.spare:out"])


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_one_layer(model):
    model[1] = torch.compile(model[1], backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "compiled_by", [lambda model: torch.compile(model, backend="eager"), compile_in_place, compile_one_layer]
)
def test_a_model_compiled_long_before_is_captured(compiled_by):
    # Not the model above: it counts calls, and compiled code that depends on them is compiled anew each time.
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    compiled = compiled_by(model)
    compiled(IDS)
    for stop in (False, True):
        with capture(compiled, ["1:in"], stop=stop) as captured:
            captured.run(compiled, IDS)
            captured.run(compiled, IDS + 1)
        compiled(IDS)
        assert same(captured["1:in"], [model[0](IDS + 1)])


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_language_model_is_stopped_and_probed():
    model = llama()
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append("layer 2"))
    with torch.inference_mode():
        with capture(model) as whole:
            assert model(input_ids=IDS).logits is not None
        assert ran == ["layer 2", "lm_head"]
        with capture(model, layers=[1, 0], stop=True) as captured:
            assert captured.run(model, input_ids=IDS, attention_mask=torch.ones_like(IDS)) is None
    assert ran == ["layer 2", "lm_head"]
    for site in ("mlp_in", "mlp_out"):
        assert same(captured[site], whole[site][:2])
    assert probe(model, ("mlp_in", "resid_post", "model.layers.*.mlp.up_proj:out")) == {
        "mlp_in": 32,
        "resid_post": 32,
        "model.layers.*.mlp.up_proj:out": 48,
    }
    with pytest.raises(ArgumentError, match=r"'model' returned a BaseModelOutputWithPast of last_hidden_state"):
        probe(model, ["model:out"])


def test_each_step_of_generation_is_a_pass():
    model = llama()
    with torch.no_grad(), capture(model, ["resid_post"]) as captured:
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert captured["resid_post"][0].shape == (2, 1, 32)


def test_the_base_model_may_be_called_in_place_of_the_model():
    model = llama()
    with torch.no_grad(), capture(model, ["mlp_in"]) as captured:
        model.model(IDS)
        first = captured["mlp_in"]
        model.model(IDS + 1)
        assert not torch.equal(first[0], captured["mlp_in"][0])
        model(IDS)
        assert same(captured["mlp_in"], first)
