"""`bos=` and texts with special tokens of their own, from the plan to the command line; and plans of before."""

import dataclasses
import json
import warnings

import pytest
import torch

import mmcache
from mmcache.cli import main
from mmcache.extraction import plan as planning
from mmcache.extraction import tokenization
from mmcache.extraction.tokenization import Tokenised
from mmcache.format.manifest import read_manifest
from mmcache.system.atomic import publish
from stores_and_processes import tree, without_sync

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

CLS, SEP, EOS, A = 1, 2, 3, 5
TEXTS = ["[CLS]aaaa[SEP]", "bbb", "[CLS]" + "ab" * 20, "a"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)


def framed(**names):
    """A tokenizer that puts [CLS] before a text, its BOS."""
    return small.letter_tokenizer(["[CLS]"], **{"bos_token": "[CLS]", "eos_token": "[SEP]"} | names)


def bare(**names):
    """One that puts nothing around a text."""
    return small.letter_tokenizer(**{"eos_token": "[SEP]"} | names)


def extract(path, tokenizer=None, texts=TEXTS, *, model=None, **options):
    options = {"sites": ["mlp_out"], "context_length": 12, "shard_tokens": 64, "dtype": torch.float32} | options
    model = small.llama(bos_token_id=CLS) if model is None else model
    return mmcache.extract(model, tokenizer or framed(), texts, path, **options)


def contexts(store):
    return [store.tokens[span.start : span.stop].tolist() for span in store.sequences]


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    return found, [str(one.message) for one in caught if issubclass(one.category, mmcache.BosWarning)]


COUNTED = "2 of 4 documents begin or end with special tokens that would be put around them"


def test_texts_with_a_bos_of_their_own_have_one_are_counted_and_warned_of(tmp_path):
    store, said = warned(lambda: extract(tmp_path / "acts"))
    assert [ids[:2].count(CLS) for ids in contexts(store)] == [1] * store.n_sequences
    assert contexts(store)[0] == [CLS, *[A] * 4, SEP]
    assert store.source["tokenised"]["framed"] == 2
    assert (store.source["identity"]["bos"], len(said)) == ("auto", 1)
    assert said[0].startswith(COUNTED)
    # It is said once: what is planned already says nothing.
    assert warned(lambda: extract(tmp_path / "acts"))[1] == []
    assert [span.start for span in store.sequences] == (store.flags == 7).nonzero()[:, 0].tolist()
    assert mmcache.verify(tmp_path / "acts").ok


def test_a_store_whose_texts_bring_nothing_says_nothing(tmp_path):
    store, said = warned(lambda: extract(tmp_path / "acts", texts=["ab", "a"]))
    assert said == []
    assert "framed" not in store.source["tokenised"]


@pytest.mark.parametrize(
    ("tokenizer", "bos", "begins", "special"),
    [
        (framed, "none", [CLS, 6, CLS, A], [0, 1, 2]),
        (bare, "add", [CLS, CLS, CLS, CLS], [0, 1, 2]),
        (framed, "add", [CLS, CLS, CLS, CLS], [0, 1, 2]),
    ],
)
def test_a_bos_in_any_case_or_not(tmp_path, tokenizer, bos, begins, special):
    # Without a BOS of the tokenizer's own, it is the configuration's, and is flagged as such.
    texts = [text.replace("[CLS]", "") for text in TEXTS] if tokenizer is bare else TEXTS
    store, said = warned(lambda: extract(tmp_path / "acts", tokenizer(), texts, bos=bos))
    assert all("documents begin or end" in text for text in said)
    of = [
        [ids for ids, span in zip(contexts(store), store.sequences, strict=True) if span.document == n]
        for n in range(4)
    ]
    assert [ids[0][0] for ids in of] == begins
    assert store.manifest.special_tokens == tuple(special)
    assert store.source["identity"]["bos"] == bos
    first = store.tokens[[span.start for span in store.sequences]]
    flags = store.flags[[span.start for span in store.sequences]]
    assert flags.tolist() == [4 | (3 if token in special else 0) for token in first.tolist()]
    # The tokenizer that it keeps is the one that it says.
    assert store.tokenizer_json() is not None
    assert mmcache.verify(tmp_path / "acts").ok


def test_another_bos_is_another_store(tmp_path):
    extract(tmp_path / "acts", texts=["ab"], bos="auto")
    before = tree(tmp_path / "acts")
    with pytest.raises(mmcache.PlanMismatchError, match=r"bos +auto in the store, none now"):
        extract(tmp_path / "acts", texts=["ab"], bos="none")
    assert tree(tmp_path / "acts") == before
    for bad in ("yes", None, True):
        with pytest.raises(mmcache.ArgumentError, match=r"bos is .*: expected 'auto' or 'add' or 'none'"):
            extract(tmp_path / "other", bos=bad)
    model = small.llama(bos_token_id=None)
    with pytest.raises(mmcache.ArgumentError, match=r"bos is 'add', and .*: neither has one"):
        extract(tmp_path / "other", bare(), model=model, bos="add")
    assert not (tmp_path / "other").exists()


def test_a_bos_of_the_model_that_its_tokenizer_does_not_add_is_warned_of(tmp_path):
    _, said = warned(lambda: extract(tmp_path / "acts", bare(), ["ab"]))
    assert len(said) == 1
    assert "the model's configuration has a BOS (id 1), and its tokenizer puts none" in said[0]
    assert warned(lambda: extract(tmp_path / "none", bare(), ["ab"], bos="none"))[1] == []
    assert warned(lambda: extract(tmp_path / "acts", bare(), ["ab"]))[1] == []


# Plans of before: their root says nothing of `bos`, and what a text brings itself they put around it again.


def begin_as_before(path, patch, *, stop=None, **options):
    """A plan as it was made before, and as far as it got: all of it, or to the first commit of its tokens."""

    def stopped(progress):
        if stop is not None and progress.phase == stop and progress.tokens:
            raise KeyboardInterrupt

    with patch.context() as before:
        before.setattr(planning, "NEW_STORES", ())
        try:
            extract(path, progress=stopped, **options)
        except KeyboardInterrupt:
            assert stop is not None
    manifest = read_manifest(path)
    source = dict(manifest.source)
    source["identity"] = {name: value for name, value in source["identity"].items() if name != "bos"}
    publish(path, "zarr.json", dataclasses.replace(manifest, source=source).to_json())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("stop", ["tokenise", "extract"])
def test_a_plan_of_before_goes_on_as_it_began(tmp_path, monkeypatch, pack, stop):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 40)
    texts = TEXTS * 5
    begin_as_before(tmp_path / "never", monkeypatch, texts=texts, pack=pack)
    begin_as_before(tmp_path / "acts", monkeypatch, stop=stop, texts=texts, pack=pack)
    begun = Tokenised.of(read_manifest(tmp_path / "acts"))
    assert begun.tokens > 0
    assert begun.whole == (stop == "extract")
    store, said = warned(lambda: extract(tmp_path / "acts", texts=texts, pack=pack))
    assert said == []
    assert (store.manifest.version, store.source["identity"].get("bos", "auto")) == (1, "auto")
    assert any(ids[:2] == [CLS, CLS] for ids in contexts(store))
    small.assert_same_store(tmp_path / "never", tmp_path / "acts")
    # And grows as it began; another rule it is not given.
    with pytest.raises(mmcache.PlanMismatchError, match=r"bos +auto in the store, add now"):
        extract(tmp_path / "acts", texts=texts, pack=pack, bos="add")


def test_a_plan_of_before_grows_as_it_began(tmp_path, monkeypatch):
    texts = TEXTS * 5
    begin_as_before(tmp_path / "never", monkeypatch, texts=texts)
    begin_as_before(tmp_path / "acts", monkeypatch, texts=texts, max_tokens=100)
    extract(tmp_path / "acts", texts=texts)
    small.assert_same_store(tmp_path / "never", tmp_path / "acts")


# The command line.


def test_the_command_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("<bos>hi", "plain")))
    command = ["extract", "demo", "chat.jsonl", "--out", "acts", "--context-length", "16", "--bos", "add"]

    def run(*arguments):
        _, said = warned(lambda: main(list(arguments), standalone_mode=False))
        return capsys.readouterr().out, said

    out, said = run(*command, "--dry-run", "--json")
    assert (json.loads(out)["framed"], said) == (1, [])
    assert "1 documents bring special tokens of their own" in run(*command, "--dry-run")[0]
    assert len(run(*command)[1]) == 1
    text, _ = run("info", "acts")
    text = " ".join(text.split())
    assert "1 of them bring special tokens of their own (not doubled)" in text
    assert "by document, BOS add" in text
    assert mmcache.open("acts").tokens.tolist() == [256, *b"hi", 256, *b"plain"]
