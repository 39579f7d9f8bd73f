"""What a store holds is what the model computed: against plain hooks, in every layout, padded, resumed or re-made."""

import copy
import importlib
import re
import shutil
import sys
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import nn

import mmcache
from mmcache.errors import (
    ArgumentError,
    DtypeError,
    IncompleteError,
    NonFiniteError,
    OutOfRangeError,
    ShapeError,
    UnknownSiteError,
    UnsupportedModelError,
)
from mmcache.extraction.job import Extraction
from mmcache.extraction.runner import NonFiniteWarning
from mmcache.extraction.tokenization import Contexts
from mmcache.format.token_flags import BOS, FIRST, SPECIAL
from mmcache.models.loading import load_model, load_tokenizer
from stores_and_processes import at_opcode

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")
pytestmark = pytest.mark.usefixtures("one_thread_without_syncing")

TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(14)]
SETTINGS = {
    "sites": ("resid_post", "mlp_in", "mlp_out"),
    "context_length": 24,
    "batch_size": 3,
    "dtype": torch.float32,
    "shard_tokens": 64,
}
both_layouts = pytest.mark.parametrize("layout", ["token", "layer"])


def extract(path, *, model=None, tokenizer=None, texts=TEXTS, **changes):
    model, tokenizer = model or small.llama(), tokenizer or small.byte_tokenizer()
    return mmcache.extract(model, tokenizer, texts, path, **SETTINGS | changes)


def contexts_of(texts=TEXTS, length=24, tokenizer=None, **options):
    cut = Contexts(tokenizer or small.byte_tokenizer(), length, **options).cut(texts)
    return [context.tokens.tolist() for context in cut]


def plain_hooks(model, places, contexts, batch_size, **options):
    """What hooks put by hand see, padding left out: {site: [layers, tokens, width]}."""
    seen = {}

    def before(key, _module, args, kwargs):
        seen[key] = args[0] if args else kwargs["hidden_states"]

    def after(key, _module, _args, output):
        seen[key] = output[0] if isinstance(output, tuple) else output

    handles = []
    for site, modules in places.items():
        for layer, (path, side) in enumerate(modules):
            module, key = model.get_submodule(path), (site, layer)
            if side == "in":
                hook = lambda *given, key=key: before(key, *given)  # noqa: E731
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda *given, key=key: after(key, *given)))
    rows = {site: [] for site in places}
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
        with torch.inference_mode():
            model(ids, **{"attention_mask": mask, "use_cache": False} if not options.get("bare") else {})
        for site in places:
            layers = torch.stack([seen[site, layer] for layer in range(len(places[site]))])
            rows[site] += [layers[:, row, : len(tokens)].clone() for row, tokens in enumerate(batch)]
    for handle in handles:
        handle.remove()
    return {site: torch.cat(parts, dim=1) for site, parts in rows.items()}


def layers_of(path, side, count=small.LAYERS):
    return [(path.replace("*", str(layer)), side) for layer in range(count)]


FAMILIES = {
    "llama": (
        small.llama,
        {
            "resid_post": layers_of("model.layers.*", "out"),
            "mlp_in": layers_of("model.layers.*.post_attention_layernorm", "out"),
            "mlp_out": layers_of("model.layers.*.mlp", "out"),
            "model.layers.*.mlp.up_proj:out": layers_of("model.layers.*.mlp.up_proj", "out"),
            "model.layers.*.self_attn:in": layers_of("model.layers.*.self_attn", "in"),
        },
    ),
    "gpt2": (
        small.gpt2,
        {
            "resid_post": layers_of("transformer.h.*", "out"),
            "mlp_in": layers_of("transformer.h.*.ln_2", "out"),
            "mlp_out": layers_of("transformer.h.*.mlp", "out"),
            "transformer.h.*.attn:out": layers_of("transformer.h.*.attn", "out"),
            "transformer.h.*.mlp.c_proj:in": layers_of("transformer.h.*.mlp.c_proj", "in"),
        },
    ),
}


def stored(store):
    return {site: torch.stack([store[site].get_layer(layer) for layer in store.layers]) for site in store.sites}


def same_bits(one, two):
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@both_layouts
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pack", [False, True])
def test_values_equal_those_of_plain_hooks_bit_for_bit(tmp_path, family, layout, pack):
    build, places = FAMILIES[family]
    expected = plain_hooks(build(), places, contexts_of(pack=pack), 3)
    store = extract(tmp_path / "store", model=build(), sites=tuple(places), layout=layout, pack=pack)
    assert sum(store.n_shards(site) for site in store.sites) > 40
    found = stored(store)
    assert list(found) == list(expected)
    for site, rows in found.items():
        assert store[site].shape == tuple(expected[site].shape)
        assert torch.equal(rows, expected[site])
        assert rows.abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_another_batch_size_changes_the_last_bits_at_most(tmp_path, family):
    build, places = FAMILIES[family]
    expected = plain_hooks(build(), places, contexts_of(), 1)
    for batch_size in (2, 7, 100):
        found = stored(extract(tmp_path / f"{batch_size}", model=build(), sites=tuple(places), batch_size=batch_size))
        for site, rows in found.items():
            assert ((rows - expected[site]).norm(dim=-1) <= 1e-5 * expected[site].norm(dim=-1)).all()


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_is_the_cast_of_what_was_computed(tmp_path, layout, dtype):
    exact = stored(extract(tmp_path / "exact", layout=layout))
    store = extract(tmp_path / "cast", layout=layout, dtype=dtype)
    assert store.dtype == dtype
    for site, rows in stored(store).items():
        assert same_bits(rows, exact[site].to(dtype))


def test_the_model_computes_in_its_own_dtype(tmp_path):
    model, places = small.llama().to(torch.bfloat16), FAMILIES["llama"][1]
    expected = plain_hooks(model, places, contexts_of(), 3)
    store = extract(tmp_path / "store", model=model, sites=tuple(places))
    assert store.source["identity"]["compute_dtype"] == "bfloat16"
    for site, rows in stored(store).items():
        assert torch.equal(rows, expected[site].to(torch.float32))


@both_layouts
def test_layers_keep_the_models_own_numbers(tmp_path, layout):
    every = extract(tmp_path / "every", layout=layout)
    some = extract(tmp_path / "some", layout=layout, layers=[2, 0])
    assert (some.layers, every.layers) == ((0, 2), (0, 1, 2))
    for site in some.sites:
        assert some[site].get_layer(1) is None
        for layer in some.layers:
            assert torch.equal(some[site].get_layer(layer), every[site].get_layer(layer))


def test_nothing_is_computed_behind_the_last_wanted_layer(tmp_path):
    model, ran = small.llama(), []
    store = extract(tmp_path / "probed", model=model, layers=[0, 1])
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append("wanted"))
    model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append("behind"))
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("logits"))
    extract(tmp_path / "store", model=model, layers=[0, 1])
    batches = -(-store.n_sequences // 3)
    # The passes that find out what the model does run to their end.
    assert ran == ["wanted", "behind", "logits"] * 4 + ["wanted"] * batches


def test_tokens_sequences_and_flags(tmp_path):
    contexts = contexts_of()
    store = extract(tmp_path / "store")
    # No padding: as many tokens as the contexts have.
    assert store.tokens.tolist() == [*chain(*contexts)]
    assert store.tokens.dtype == torch.int32
    starts = np.cumsum([0, *map(len, contexts)])
    assert [(span.start, span.stop) for span in store.sequences] == list(pairwise(starts))
    assert {span.document for span in store.sequences} == set(range(len(TEXTS)))
    begins = torch.zeros(store.n_tokens, dtype=torch.bool)
    begins[torch.from_numpy(starts[:-1])] = True
    assert torch.equal(store.flags == (BOS | SPECIAL | FIRST), begins)
    assert torch.equal(store.flags != 0, begins)
    assert store.locate(int(starts[5]) + 3) == (5, 3, contexts[5][3])


def test_left_padding_tokenizers_make_no_difference(tmp_path):
    def tokenizer(**options):
        return small.letter_tokenizer(["[CLS]"], ["[SEP]"], cls_token="[CLS]", sep_token="[SEP]", **options)  # noqa: S106

    texts = ["abcdefghij", "kl", "mnopq"]
    model = small.llama(bos_token_id=1)
    right = extract(tmp_path / "right", model=model, tokenizer=tokenizer(padding_side="right"), texts=texts)
    left = extract(tmp_path / "left", model=model, tokenizer=tokenizer(padding_side="left"), texts=texts)
    assert torch.equal(left.tokens, right.tokens)
    assert set(left.flags.tolist()) == {0, SPECIAL, BOS | SPECIAL | FIRST}
    for site, rows in stored(right).items():
        assert torch.equal(left[site][1, :], rows[1])


def test_an_encoder_from_a_folder_by_module_paths(tmp_path):
    tokenizer = small.letter_tokenizer(["[CLS]"], ["[SEP]"], cls_token="[CLS]", sep_token="[SEP]")  # noqa: S106
    small.bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model, tokenizer = load_model(str(tmp_path / "bert"), None), load_tokenizer(str(tmp_path / "bert"))
    assert type(model).__name__ == "BertModel"
    texts = ["abcdefghij", "kl", "mnopq", "rstuvwxyzabcdef"]
    sites = ("encoder.layer.*:out", "encoder.layer.*.attention:out", "encoder.layer.*.intermediate:in")
    places = {site: layers_of(*site.split(":")) for site in sites}
    contexts = contexts_of(texts, 12, tokenizer)
    assert len(contexts) == 5
    expected = plain_hooks(model, places, contexts, 3)
    store = extract(tmp_path / "store", model=model, tokenizer=tokenizer, texts=texts, sites=sites, context_length=12)
    for site, rows in stored(store).items():
        assert torch.equal(rows, expected[site])
    with pytest.raises(UnsupportedModelError, match=r"BertModel .* is of no known family .* name modules by path"):
        extract(tmp_path / "other", model=model, tokenizer=tokenizer, texts=texts, sites=("resid_post",))


class Plain(nn.Module):
    """A model of no family: its layers see one token at a time, and it knows no attention mask."""

    def __init__(self, width=32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(generator=generator)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@both_layouts
def test_a_model_of_no_known_family_by_module_paths(tmp_path, layout):
    model = Plain()
    sites = ("blocks.*:in", "blocks.*:out")
    places = {site: layers_of(*site.split(":"), 2) for site in sites}
    expected = plain_hooks(model, places, contexts_of(), 3, bare=True)
    store = extract(tmp_path / "store", model=model, sites=sites, layout=layout)
    for site, rows in stored(store).items():
        assert torch.equal(rows, expected[site])
    assert store.source["identity"]["model"] == "Plain"
    assert store.source["modules"]["blocks.*:out"] == ["blocks.0:out", "blocks.1:out"]


def test_a_model_that_trains_is_run_in_eval_mode_and_left_as_it_was(tmp_path):
    model = small.gpt2(resid_pdrop=0.5, embd_pdrop=0.5)
    exact = stored(extract(tmp_path / "eval", model=model))
    model.train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    for site, rows in stored(extract(tmp_path / "train", model=model)).items():
        assert torch.equal(rows, exact[site])
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(OSError, match="by the test"):
        extract(tmp_path / "error", model=model, progress=fail)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.transformer.h[0]._forward_hooks
    assert all(weight.requires_grad for weight in model.parameters())


def fail(_progress):
    raise OSError("stopped by the test")


def spread():
    """A model with one dimension ten thousand times as large as the others."""
    model = Plain()
    with torch.no_grad():
        model.embedding.weight[:, 5] *= 100
        model.embedding.weight[:, 5] += 1e4
    return model


def in_float64(store, site):
    """Mean, std and norms of each layer over the whole array, special tokens left out."""
    kept = (store.flags == 0).numpy()
    rows = np.stack([store[site].get_layer(layer).double().numpy()[kept] for layer in store.layers])
    rows = [layer[np.isfinite(layer).all(axis=1)] for layer in rows]
    norms = [np.linalg.norm(layer, axis=1) for layer in rows]
    return {
        "count": np.stack([np.full(layer.shape[1], len(layer), float) for layer in rows]),
        "mean": np.stack([layer.mean(axis=0) for layer in rows]),
        "std": np.stack([layer.std(axis=0) for layer in rows]),
        "mean_norm": np.array([layer.mean() for layer in norms]),
        "min_norm": np.array([layer.min() for layer in norms]),
        "max_norm": np.array([layer.max() for layer in norms]),
        "rows": np.array([len(layer) for layer in rows]),
    }


def check_statistics(store):
    for site in store.sites:
        found = store[site].statistics
        for name, exact in in_float64(store, site).items():
            value = getattr(found, name).numpy()
            if name == "mean":
                # A mean near zero is only as exact as the values that it is of.
                assert (abs(value - exact) <= 1e-6 * (abs(exact) + found.std.numpy())).all()
            else:
                np.testing.assert_allclose(value, exact, rtol=1e-6)
    return found


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_equal_those_of_the_whole_array(tmp_path, layout, dtype):
    settings = {"model": spread(), "sites": ("blocks.*:in", "blocks.*:out"), "layout": layout, "dtype": dtype}
    texts = [text * 4 for text in TEXTS]
    store = extract(tmp_path / "store", texts=texts, **settings)
    assert store.n_shards("blocks.*:in") > 40
    found = check_statistics(store)
    assert 9e3 < float(store["blocks.*:in"].statistics.mean[0, 5]) < 1.1e4
    assert float(store["blocks.*:in"].statistics.std[0, 5]) > 50
    assert found.non_finite.tolist() == found.overflow.tolist() == [0, 0]
    assert found.first_non_finite.tolist() == [-1, -1]

    # However the shards came about, and whether or not what was merged is kept in the store.
    shards = sorted((tmp_path / "store").glob("blocks*/c.*"))
    for number in np.random.default_rng(0).permutation(len(shards))[: len(shards) // 2]:
        shards[number].unlink()
    again = extract(tmp_path / "store", texts=texts, **settings)
    for folder in (tmp_path / "store" / "statistics").glob("blocks*"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    for site in store.sites:
        for name in ("count", "mean", "std", "mean_norm", "min_norm", "max_norm", "rows", "zero_rows"):
            assert torch.equal(getattr(again[site].statistics, name), getattr(store[site].statistics, name))


@both_layouts
def test_statistics_of_a_partial_store_are_of_what_is_there(tmp_path, layout):
    with pytest.raises(OSError, match="by the test"):
        extract(tmp_path / "store", layout=layout, progress=stop_after(400))
    store = mmcache.open(tmp_path / "store", partial=True)
    for site in store.sites:
        missing = store.missing(site) // (3 if layout == "layer" else 1)
        there = (store.n_tokens - 1) // 64 + 1 - missing
        assert there > 3
        assert missing > 3
        kept = (store.flags[: there * 64] == 0).numpy()
        rows = store[site][1, : there * 64].double().numpy()[kept]
        found = store[site].statistics
        np.testing.assert_allclose(found.mean[1].numpy(), rows.mean(axis=0), rtol=1e-6, atol=1e-8)
        assert found.rows.tolist() == [kept.sum()] * 3


def test_without_any_shard_there_are_no_statistics(tmp_path):
    with pytest.raises(OSError, match="by the test"):
        extract(tmp_path / "store", shard_tokens=128, progress=stop_after(1))
    store = mmcache.open(tmp_path / "store", partial=True)
    with pytest.raises(IncompleteError, match="there are no statistics yet"):
        _ = store["mlp_in"].statistics


def broken(letters):
    """A model whose embedding of some letters is what `letters` says."""
    model = Plain()
    with torch.no_grad():
        for letter, value in letters.items():
            model.embedding.weight[ord(letter), 7] = value
    return model


NAN_TEXTS = ["fine " * 40, "one Q, one I", "fine " * 30, "Q and Q"]


@both_layouts
def test_rows_that_are_not_finite_are_counted_located_and_warned_of_once(tmp_path, layout):
    settings = {"model": broken({"Q": torch.nan, "I": -torch.inf}), "sites": ("blocks.*:in",), "layout": layout}
    with pytest.warns(NonFiniteWarning) as caught:
        store = extract(tmp_path / "store", texts=NAN_TEXTS, **settings)
    assert len(caught) == 1
    ids = store.tokens
    bad = torch.isin(ids, torch.tensor([ord("Q"), ord("I")]))
    first = int(bad.nonzero()[0])
    said = str(caught[0].message)
    assert re.search(
        rf"store: blocks\.\*:in, layer 0: \d+ rows that are not finite, the first at position {first}\.", said
    )
    assert "Such rows are stored, counted and left out of the statistics" in said
    found = check_statistics(store)
    # A NaN stays one in the layer behind; its tanh makes the infinity finite again.
    assert found.non_finite.tolist() == [4, 3]
    assert found.first_non_finite.tolist() == [first, first]
    assert found.overflow.tolist() == [0, 0]
    rows = store["blocks.*:in"].get_layer(0)
    assert torch.equal(rows.isfinite().all(dim=1), ~bad)
    assert set(rows[bad][:, 7].tolist()) >= {-torch.inf}
    assert found.mean.isfinite().all()

    # A job with nothing left to do has nothing to warn of.
    extract(tmp_path / "store", texts=NAN_TEXTS, **settings)


@both_layouts
def test_strict_refuses_the_first_shard_that_is_not_finite(tmp_path, layout):
    settings = {"model": broken({"Q": torch.nan}), "sites": ("blocks.*:in", "blocks.*:out"), "layout": layout}
    message = r"blocks\.\*:in, layer 0: \d+ rows that are not finite, the first at position \d+.*leave strict off"
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=message):
            extract(tmp_path / "store", texts=NAN_TEXTS, strict=True, **settings)
        store = mmcache.open(tmp_path / "store", partial=True)
        first = int((store.tokens == ord("Q")).nonzero()[0]) // 64
        assert first > 1
        names = {path.name for path in (tmp_path / "store").glob("blocks*/*")}
        slots = range(2) if layout == "layer" else range(1)
        # Those before it that were not in place yet are made again; it, and what is behind it, never is.
        assert names <= {"zarr.json", *(f"c.{slot}.{block}.0" for slot in slots for block in range(first))}
    with pytest.warns(NonFiniteWarning):
        extract(tmp_path / "store", texts=NAN_TEXTS, **settings)
    # Strict is about what is written: what is there already has been counted.
    extract(tmp_path / "store", texts=NAN_TEXTS, strict=True, **settings)


@both_layouts
def test_what_does_not_fit_the_storage_dtype_is_counted(tmp_path, layout):
    settings = {"model": broken({"Q": 1e5, "I": -7e4}), "sites": ("blocks.*:in",), "layout": layout}
    with pytest.warns(NonFiniteWarning, match=r"\d+ values of them lost in the cast to float16"):
        store = extract(tmp_path / "store", texts=NAN_TEXTS, dtype=torch.float16, **settings)
    found = check_statistics(store)
    assert found.overflow.tolist() == [4, 0]
    assert found.non_finite.tolist() == [4, 0]
    wide = extract(tmp_path / "wide", texts=NAN_TEXTS, dtype=torch.bfloat16, **settings)
    assert wide["blocks.*:in"].statistics.overflow.tolist() == [0, 0]


def test_where_it_came_from_is_kept(tmp_path):
    small.llama().save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), None)
    record = {"command": "by hand", "ticket": 7}
    source = extract(tmp_path / "store", model=model, record=record).source
    identity, kept = source["identity"], source["record"]
    assert identity["model"] == "LlamaForCausalLM"
    assert re.fullmatch("[0-9a-f]{64}", identity["weights"])
    assert re.fullmatch("[0-9a-f]{64}", identity["tokenizer"])
    assert (identity["layers"], identity["context_length"], identity["pack"]) == ([0, 1, 2], 24, False)
    assert (identity["dtype"], identity["compute_dtype"], identity["layout"]) == ("float32", "float32", "token")
    assert kept["name"] == str(tmp_path / "model")
    assert (kept["command"], kept["ticket"], kept["mmcache"]) == ("by hand", 7, mmcache.__version__)
    assert re.match(r"\d{4}-\d\d-\d\dT", kept["made"])
    assert {"python", "revision"} <= set(kept)
    assert source["modules"]["mlp_out"] == [f"model.layers.{layer}.mlp:out" for layer in range(3)]
    assert source["tokenised"]["documents"] == len(TEXTS)
    assert source["numerics"]["attention"] == "sdpa"
    # The same weights have the same hash wherever they are; any one number more or less is another.
    again = extract(tmp_path / "again").source["identity"]
    assert again == identity
    changed = small.llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-6
    other = extract(tmp_path / "changed", model=changed).source["identity"]
    assert {name for name in other if other[name] != identity[name]} == {"weights"}


@both_layouts
def test_shards_that_went_missing_are_made_again_byte_for_byte(tmp_path, layout):
    extract(tmp_path / "store", layout=layout)
    before, touched = small.contents(tmp_path / "store"), small.identities(tmp_path / "store")
    shards = [name for name in before if "/c." in name and name.split("/")[0] in SETTINGS["sites"]]
    assert len(shards) > 40
    chance = np.random.default_rng(1)
    for count in (1, 5, len(shards)):
        gone = [shards[number] for number in chance.permutation(len(shards))[:count]]
        for name in gone:
            (tmp_path / "store" / name).unlink()
        with pytest.raises(IncompleteError, match=r"is not complete: \d+ of \d+ shards of .* are missing"):
            mmcache.open(tmp_path / "store")
        extract(tmp_path / "store", layout=layout)
        assert small.contents(tmp_path / "store") == before
        after = small.identities(tmp_path / "store")
        # What was there is not touched: neither its bytes nor its inode nor its time.
        assert all(after[name] == touched[name] for name in before if name not in gone)
        touched = after


def test_a_job_with_nothing_to_do_touches_nothing_and_runs_no_batch(tmp_path):
    model = small.llama()
    extract(tmp_path / "store", model=model)
    before, ran, told = small.identities(tmp_path / "store"), [], []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    extract(tmp_path / "store", model=model, progress=told.append)
    assert small.identities(tmp_path / "store") == before
    assert (len(ran), told) == (4, [])  # the passes that find out what the model does


def test_only_the_batches_that_missing_shards_need_are_run(tmp_path):
    extract(tmp_path / "store")
    (tmp_path / "store" / "mlp_in" / "c.0.3.0").unlink()
    told = []
    extract(tmp_path / "store", progress=told.append)
    # 64 tokens, and what a batch of 3 contexts of 24 has beside them at both ends.
    assert told[-1].run_tokens <= 64 + 2 * 72
    assert told[-1].tokens == told[-1].total


@both_layouts
def test_a_partial_store_reads_what_is_there_and_raises_for_the_rest(tmp_path, layout):
    whole = extract(tmp_path / "store", layout=layout)
    rows = {site: whole[site][1, :].clone() for site in whole.sites}
    slot = 1 if layout == "layer" else 0
    (tmp_path / "store" / "mlp_in" / f"c.{slot}.2.0").unlink()
    store = mmcache.open(tmp_path / "store", partial=True)
    assert (store.missing("mlp_in"), store.missing("mlp_out")) == (1, 0)
    view = store["mlp_in"]
    for read in (
        lambda: view.get_position(1, 128),
        lambda: view.get_position(1, 191),
        lambda: view.get_layer(1),
        lambda: view[1, 100:150],
        lambda: view.gather([0, 150]),
        lambda: view.get_positions(1, [3, 130]),
        lambda: view.sequence(store.sequences.find(130)),
    ):
        with pytest.raises(IncompleteError):
            read()
    assert torch.equal(view.get_position(1, 127), rows["mlp_in"][127])
    assert torch.equal(view[1, 192:], rows["mlp_in"][192:])
    assert torch.equal(store["mlp_out"].get_layer(1), rows["mlp_out"])
    if layout == "layer":
        assert view.get_layer(0) is not None  # one layer's file is gone, not the others'


def test_progress_is_told_up_to_the_end(tmp_path):
    told = []
    store = extract(tmp_path / "store", progress=told.append)
    assert [done.phase for done in told[:2]] == ["tokenise", "extract"]
    filled = [done for done in told if done.phase == "extract"]
    assert [done.tokens for done in filled] == sorted(done.tokens for done in filled)
    last = filled[-1]
    assert (last.tokens, last.total, last.run_tokens) == (store.n_tokens,) * 3
    assert last.bytes == sum(store.site_bytes(site) for site in store.sites)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sites": ("mlp_inn",)}, UnknownSiteError, "near matches: mlp_in"),
        ({"sites": ("resid_post", "resid_post")}, ArgumentError, "given twice"),
        ({"sites": "resid_post"}, ArgumentError, "sites is the string"),
        ({"sites": ("model.embed_tokens:in",)}, ShapeError, r"has shape \[1, 64\] for 1 sequence of 64 tokens"),
        ({"layers": [3]}, OutOfRangeError, r"layer 3 not in model \(n_layers=3\)"),
        ({"layers": []}, ArgumentError, "layers is empty"),
        ({"context_length": 0}, ArgumentError, "context_length is 0: expected a whole number"),
        ({"context_length": 129}, ArgumentError, "context_length is 129: expected 1 to 128"),
        ({"context_length": 1}, ArgumentError, "expected more than the 1 special tokens"),
        ({"batch_size": 0}, ArgumentError, "batch_size is 0: expected a whole number"),
        ({"batch_size": "many"}, ArgumentError, "batch_size is 'many'"),
        ({"dtype": torch.int8}, DtypeError, "int8"),
        ({"dtype": "float8"}, DtypeError, "float8"),
        ({"layout": "row"}, ArgumentError, "layout is 'row': expected 'layer' or 'token'"),
        ({"max_tokens": 0}, ArgumentError, "max_tokens is 0"),
        ({"shard_tokens": 0}, ArgumentError, "shard_tokens is 0"),
        ({"texts": "corpus.txt"}, ArgumentError, "texts is one str: give a sequence of documents; .*read_texts"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        extract(tmp_path / "store", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_context_length_is_what_the_model_can_do_and_no_more_than_1024(tmp_path):
    assert extract(tmp_path / "a", context_length=None).source["identity"]["context_length"] == 128
    long = small.llama(max_position_embeddings=4096)
    assert extract(tmp_path / "b", model=long, context_length=None).source["identity"]["context_length"] == 1024
    plain = extract(tmp_path / "c", model=Plain(), sites=("blocks.*:out",), context_length=None)
    assert plain.source["identity"]["context_length"] == 1024


def test_the_quickest_batch_size_is_measured_once_and_kept(tmp_path, monkeypatch):
    settings = {"batch_size": "auto", "context_length": 8}
    store = extract(tmp_path / "store", **settings)
    size = store.source["numerics"]["batch_size"]
    assert size >= 1
    assert size & (size - 1) == 0
    (tmp_path / "store" / "mlp_in" / "c.0.1.0").unlink()
    module = importlib.import_module("mmcache.extraction.job")
    monkeypatch.setattr(module, "quickest_batch", lambda *_: pytest.fail("measured again"))
    assert extract(tmp_path / "store", **settings).source["numerics"]["batch_size"] == size


@both_layouts
def test_a_survey_has_the_numbers_of_the_job_and_writes_nothing(tmp_path, layout):
    job = Extraction(
        small.llama(), small.byte_tokenizer(), tmp_path / "store", **SETTINGS, layout=layout, max_tokens=500
    )
    survey = job.survey(TEXTS)
    assert list(tmp_path.iterdir()) == []
    store = extract(tmp_path / "store", layout=layout, max_tokens=500)
    files = [path for site in store.sites for path in (tmp_path / "store" / site).glob("c.*")]
    assert (survey.tokens, survey.sequences) == (store.n_tokens, store.n_sequences)
    assert survey.bytes_a_token == 3 * 3 * 32 * 4
    assert survey.total_bytes == survey.bytes_to_do == sum(path.stat().st_size for path in files)
    assert survey.shards == survey.shards_to_do == len(files)
    assert (survey.sites, survey.layers) == (dict.fromkeys(store.sites, 32), (0, 1, 2))
    assert survey.seconds > 0
    assert survey.tokens_a_second > 0
    assert survey.free_bytes > 0


def test_a_model_and_its_copy_fill_one_store(tmp_path):
    # Any number of processes may: they share nothing but the path. Here one goes on with what the other left.
    model = small.llama()
    with pytest.raises(OSError, match="by the test"):
        extract(tmp_path / "store", model=model, progress=stop_after(300))
    extract(tmp_path / "store", model=copy.deepcopy(model))
    extract(tmp_path / "once")
    small.assert_same_store(tmp_path / "store", tmp_path / "once")


def stop_after(tokens):
    def stop(done):
        if done.phase == "extract" and done.tokens >= tokens:
            fail(done)

    return stop


# Where files and threads are made: what is interrupted between two steps there is what could be left behind.
WATCHED = {"AtomicFile", "ShardWriter", "BlockWriter", "Pipeline"}


def _interrupt():
    raise KeyboardInterrupt


def _is_watched(code):
    # What a finaliser raises is lost, so a signal that meets one is not the question here.
    return code.co_name != "__del__" and code.co_qualname.partition(".")[0] in WATCHED


def interrupting(at):
    """A trace function that raises KeyboardInterrupt at step `at` of the interpreter in the watched classes."""
    return at_opcode(at, _is_watched, _interrupt)


def test_an_interrupt_between_any_two_steps_leaves_nothing_half_written(tmp_path, request):
    settings = {"sites": ("mlp_in",), "layers": [0], "max_tokens": 130, "model": small.llama()}
    traced, steps = interrupting(0)
    before = sys.gettrace()
    sys.settrace(traced)
    extract(tmp_path / "once", **settings)
    sys.settrace(before)
    assert steps() > 4000
    for at in range(7, steps() - 200, 7 if request.config.getoption("--slow") else 127):
        path, interrupted = tmp_path / f"{at}", False
        sys.settrace(interrupting(at)[0])
        try:
            extract(path, **settings)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        assert interrupted
        assert list(path.rglob("*.tmp")) == []
        extract(path, **settings)
        small.assert_same_store(path, tmp_path / "once")
        shutil.rmtree(path)
