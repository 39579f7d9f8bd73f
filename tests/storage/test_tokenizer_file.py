"""A planned store keeps its tokenizer, and explains itself wherever it is."""

import dataclasses
import json

import pytest
import tokenizers
import torch
from click.testing import CliRunner

import mmcache
from damaged_stores import TEXTS, extracted
from mmcache import cli
from mmcache.format.manifest import read_manifest
from mmcache.storage import tokenizer_file
from mmcache.storage.tokenizer_file import TOKENIZER, read_tokenizer
from mmcache.write import base_writer
from small_models import byte_tokenizer, contents, letter_tokenizer, llama
from stores_and_processes import damage, flip


def test_a_store_keeps_its_tokenizer(tmp_path):
    store = extracted(tmp_path / "acts")
    kept = tokenizers.Tokenizer.from_str(store.tokenizer_json())
    span = store.sequences[0]
    assert kept.decode(store.tokens[span.start : span.stop].tolist()) == TEXTS[0][: span.stop - span.start - 1]
    assert store.source["tokenizer_bytes"] == len((store.path / TOKENIZER).read_bytes())


def test_a_longer_plan_and_another_site_keep_it_as_it_is(tmp_path):
    path = tmp_path / "acts"
    extracted(path, max_tokens=100)
    before = (path / TOKENIZER).read_bytes()
    extracted(path)
    extracted(path, sites=("mlp_in", "mlp_out", "resid_post"))
    assert (path / TOKENIZER).read_bytes() == before
    assert mmcache.verify(path).ok


def test_a_tokenizer_of_python_code_has_no_file(tmp_path):
    tokenizer = byte_tokenizer()

    class Slow:
        backend_tokenizer = None

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *arguments, **options):
            return tokenizer(*arguments, **options)

    store = mmcache.extract(llama(), Slow(), TEXTS, tmp_path / "acts", context_length=24, shard_tokens=64)
    assert store.tokenizer_json() is None
    assert not (tmp_path / "acts" / "tokenizer").exists()
    assert mmcache.verify(tmp_path / "acts").ok


def test_a_grown_store_has_none_unless_it_is_given(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1):
        pass
    assert mmcache.open(tmp_path / "acts").tokenizer_json() is None


def grown(path, tokenizer, **options):
    with mmcache.create(path, sites={"a": 4}, n_layers=1, tokenizer=tokenizer, **options) as writer:
        ids = [tokenizer.bos_token_id, 5, 6, 258]
        writer.append(ids, {"a": torch.zeros(1, 4, 4)})
    return mmcache.open(path)


def test_a_grown_store_keeps_the_one_it_is_given_and_flags_its_special_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    store = grown(tmp_path / "acts", tokenizer, special_tokens=[258])
    assert read_manifest(store.path).special_tokens == tuple(sorted({*tokenizer.all_special_ids, 258}))
    assert store.tokenizer_json() == tokenizer.backend_tokenizer.to_str()
    bits = store.flag_bits
    assert store.flags.tolist() == [bits["bos"] | bits["special"] | bits["first"], 0, 0, bits["special"]]
    with mmcache.append(store.path) as writer:
        writer.append([tokenizer.bos_token_id, 7], {"a": torch.zeros(1, 2, 4)})
    again = mmcache.open(store.path)
    assert again.tokenizer_json() == store.tokenizer_json()
    assert again.flags.tolist()[4:] == [bits["bos"] | bits["special"] | bits["first"], 0]
    assert mmcache.verify(store.path).ok
    assert CliRunner().invoke(cli.main, ["info", str(store.path)]).exit_code == 0
    mmcache.push(store.path, f"file://{tmp_path}/bucket")
    assert mmcache.open(f"file://{tmp_path}/bucket").tokenizer_json() == store.tokenizer_json()


def test_a_grown_store_with_a_damaged_tokenizer_says_how_it_comes_back(tmp_path):
    path = grown(tmp_path / "acts", byte_tokenizer()).path
    damage(path / TOKENIZER, flip(200))
    with pytest.raises(mmcache.CorruptError, match="put back the file that was there"):
        mmcache.open(path).tokenizer_json()


def test_a_store_whose_tokenizer_cannot_be_written_leaves_the_path_free(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise mmcache.DiskFullError(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_file, "publish", fails)
        with pytest.raises(mmcache.DiskFullError):
            grown(tmp_path / "acts", byte_tokenizer())
    assert contents(tmp_path / "acts") == {}
    grown(tmp_path / "acts", byte_tokenizer())


@pytest.mark.parametrize("behind", range(4))
def test_a_store_that_cannot_be_begun_leaves_the_path_free_whatever_of_it_is_there(tmp_path, monkeypatch, behind):
    publish, calls = base_writer.publish, iter(range(100))

    def fails(path, name, *given, **named):
        publish(path, name, *given, **named)
        if next(calls) == behind:
            # As an interrupt leaves it that comes when the next file was just opened.
            for folder in ("tokens", "flags"):
                if (path / folder).is_dir():
                    (path / folder / ".zarr.json.0123456789abcdef.tmp").touch()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base_writer, "publish", fails)
        with pytest.raises(KeyboardInterrupt):
            mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1)
    assert contents(tmp_path / "acts") == {}
    mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1).close()


@pytest.mark.parametrize("tokenizer", ["gpt2", 5, print])
def test_what_is_no_tokenizer_is_refused_before_anything_is_there(tmp_path, tokenizer):
    with pytest.raises(mmcache.ArgumentError, match="expected a Hugging Face tokenizer"):
        mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1, tokenizer=tokenizer)
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("level", ["quick", "full"])
def test_one_that_is_damaged_is_found_set_aside_and_made_again(tmp_path, level):
    path = tmp_path / "acts"
    store = extracted(path)
    whole = contents(path)
    damage(path / TOKENIZER, flip(200))
    (finding,) = mmcache.verify(path, level).findings
    assert (finding.kind, finding.file) == ("metadata", TOKENIZER)
    with pytest.raises(mmcache.CorruptError, match="not the tokenizer that the store was made with"):
        store.tokenizer_json()
    assert [file for file, _ in mmcache.repair(path, level).aside] == [TOKENIZER]
    assert [(found.kind, found.file) for found in mmcache.verify(path).findings] == [("missing", TOKENIZER)]
    extracted(path)
    assert mmcache.verify(path).ok
    assert {name: data for name, data in contents(path).items() if not str(name).startswith(".set-aside")} == whole


def test_one_that_is_gone_is_missed_and_made_again(tmp_path):
    path = tmp_path / "acts"
    store = extracted(path)
    (path / TOKENIZER).unlink()
    with pytest.raises(mmcache.StoreNotFoundError):
        store.tokenizer_json()
    assert [(found.kind, found.file) for found in mmcache.verify(path).findings] == [("missing", TOKENIZER)]
    extracted(path)
    assert mmcache.verify(path).ok


@pytest.mark.parametrize("size", [0, -1, 1 << 40, "many", 1.5, True])
def test_what_a_stranger_says_of_its_size_is_not_believed(tmp_path, size):
    path = tmp_path / "acts"
    extracted(path)
    manifest = read_manifest(path)
    said = dataclasses.replace(manifest, source={**manifest.source, "tokenizer_bytes": size})
    with pytest.raises(mmcache.CorruptError, match="tokenizer"):
        read_tokenizer(path, said)
    with pytest.raises(mmcache.CorruptError):
        read_tokenizer(path, dataclasses.replace(manifest, source={**manifest.source, "identity": 3}))


def test_another_vocabulary_is_another_identity(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    with pytest.raises(mmcache.PlanMismatchError, match="tokenizer"):
        mmcache.extract(llama(), letter_tokenizer(), TEXTS, path, context_length=24, batch_size=3, shard_tokens=64)
    assert json.loads((path / TOKENIZER).read_text())["version"]
