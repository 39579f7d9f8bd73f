"""Models and tokenizers by name: no code of theirs runs unasked, no pickle is read, and what is broken is one error."""

import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

import mmcache
import small_models as small
from mmcache.cli import main
from mmcache.errors import ArgumentError, UnsupportedModelError
from mmcache.models.loading import load_model, load_tokenizer
from stores_and_processes import widened

WEIGHTS = "model.safetensors"
_CODE = """
from pathlib import Path
import transformers
Path({marker!r}).touch()
class OwnConfig(transformers.LlamaConfig):
    model_type = "own"
class OwnForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    small.llama().save_pretrained(folder)
    small.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit(file, **said):
    def change(folder):
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | said))

    return change


def overwrite(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def cut(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def removed(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def tensors(change):
    def changed(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def as_folder(file):
    def change(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


def indexed(name):
    """The weights in a file that an index names, outside of what a folder should hold."""

    def change(folder):
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        if name.endswith(".safetensors"):
            save_file(weights, folder / name, metadata={"format": "pt"})
        else:
            torch.save(weights, folder / name)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))

    return change


MODELS = {
    "a cut header": (cut(WEIGHTS, 1000), "SafetensorError"),
    "cut weights": (cut(WEIGHTS, 40_000), "SafetensorError"),
    "garbage for weights": (overwrite(WEIGHTS, b"garbage" * 100), "SafetensorError"),
    "no bytes of weights": (overwrite(WEIGHTS, b""), "SafetensorError"),
    "a folder for weights": (as_folder(WEIGHTS), "cannot be loaded as a model"),
    "no weights": (removed(WEIGHTS), "cannot be loaded as a model: OSError"),
    "a layer missing": (
        tensors(lambda found: found.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks 1 of the weights",
    ),
    "more layers said": (edit("config.json", num_hidden_layers=4), r"lacks 9 of the weights .* model\.layers\.3"),
    "another shape": (tensors(lambda found: found.update({"model.norm.weight": torch.ones(5)})), "cannot be loaded as"),
    "an index of pickles": (indexed("weights.bin"), r"pickled weights only \(weights\.bin\)"),
    "an index of files elsewhere": (indexed("../weights.safetensors"), r"names '\.\./weights\.safetensors'"),
    "a list for an index": (overwrite(f"{WEIGHTS}.index.json", b"[]"), "cannot be loaded as a model: TypeError"),
    "garbage for an index": (overwrite(f"{WEIGHTS}.index.json", b"{"), "cannot be loaded as a model: JSONDecodeError"),
    "a list for a configuration": (overwrite("config.json", b"[]"), "cannot be loaded as a model"),
    "a number for a configuration": (overwrite("config.json", b"3"), "cannot be loaded as a model"),
    "half a configuration": (cut("config.json", 100), "not a valid JSON file"),
    "UTF-16 for a configuration": (overwrite("config.json", "{}".encode("utf-16")), "cannot be loaded as a model"),
    "an empty configuration": (overwrite("config.json", b"{}"), "cannot be loaded as a model"),
    "no configuration": (removed("config.json"), "cannot be loaded as a model"),
    "a folder for a configuration": (as_folder("config.json"), "cannot be loaded as a model"),
    "an unknown type": (edit("config.json", model_type="nonsense"), "`nonsense`"),
    "a number for a type": (edit("config.json", model_type=3), "cannot be loaded as a model"),
    "a list for a type": (edit("config.json", model_type=["llama"]), "cannot be loaded as a model: TypeError"),
    "a text for a size": (edit("config.json", hidden_size="32"), "'hidden_size'"),
    "a negative size": (edit("config.json", hidden_size=-1), "cannot be loaded as a model"),
    "a huge size": (edit("config.json", hidden_size=2**40), "cannot be loaded as a model"),
    "no heads": (edit("config.json", num_attention_heads=0), "cannot be loaded as a model: ZeroDivisionError"),
    "an unknown activation": (edit("config.json", hidden_act="nonsense"), "cannot be loaded as a model: KeyError"),
    "an unknown dtype": (edit("config.json", dtype="nonsense"), "cannot be loaded as a model: AttributeError"),
    "a text for a quantisation": (edit("config.json", quantization_config="x"), "cannot be loaded as a model"),
    "a number for code": (edit("config.json", auto_map=3), "cannot be loaded as a model"),
    "a list for generation": (overwrite("generation_config.json", b"[]"), "cannot be loaded as a model"),
}
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
TOKENIZERS = {
    "garbage": (overwrite("tokenizer.json", b"garbage"), "cannot be loaded as a tokenizer: JSONDecodeError"),
    "a list": (overwrite("tokenizer.json", b"[]"), "cannot be loaded as a tokenizer"),
    "an empty object": (overwrite("tokenizer.json", b"{}"), "cannot be loaded as a tokenizer"),
    "cut": (cut("tokenizer.json", 500), "cannot be loaded as a tokenizer"),
    "another model": (edit("tokenizer.json", model={"type": "Nonsense"}), "cannot be loaded as a tokenizer"),
    "a panic": (
        edit("tokenizer.json", normalizer=PANICS),
        "cannot be loaded as a tokenizer: RuntimeError: it panicked",
    ),
    "a list for a configuration": (overwrite("tokenizer_config.json", b"[]"), "cannot be loaded as a tokenizer"),
    "a number for a class": (edit("tokenizer_config.json", tokenizer_class=3), "cannot be loaded as a tokenizer"),
    "no files": (removed("tokenizer.json", "tokenizer_config.json"), "cannot be loaded as a tokenizer"),
}


def check_refusal(error, where):
    assert str(where) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 700


def test_the_whole_folder_loads(whole):
    assert type(load_model(str(whole), "float32")).__name__ == "LlamaForCausalLM"
    assert load_tokenizer(str(whole))("a")["input_ids"] == [256, 97]


@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_is_one_error(folder, case):
    change, message = MODELS[case]
    change(folder)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_model(str(folder), None)
    check_refusal(caught.value, folder)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_is_one_error(folder, case):
    change, message = TOKENIZERS[case]
    change(folder)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_tokenizer(str(folder))
    check_refusal(caught.value, folder)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "whisper", "vit", "llava"])
def test_a_tokenizer_that_is_not_there_is_not_made_up(tmp_path, kind):
    # transformers makes one for some of them, to which every text is [UNK].
    getattr(small, kind)().save_pretrained(tmp_path / kind)
    with pytest.raises(UnsupportedModelError, match=r"has no tokenizer: a \w+ without its files|as a tokenizer"):
        load_tokenizer(str(tmp_path / kind))


@pytest.mark.parametrize("data", [b"", pickle.dumps({}), b"garbage"])
def test_pickled_weights_are_never_read(folder, monkeypatch, data):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    removed(WEIGHTS)(folder)
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"pickled weights only \(pytorch_model\.bin\).*save_pretrained"):
        load_model(str(folder), None)
    # What lies beside safetensors is no harm: nobody looks at it.
    small.llama().save_pretrained(folder)
    load_model(str(folder), None)


def test_a_pooler_that_no_checkpoint_has_is_left_out(tmp_path):
    small.bert().save_pretrained(tmp_path / "bert")  # which has none
    model = load_model(str(tmp_path / "bert"), None)
    assert model.pooler is None
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, small.WIDTH)


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A folder whose configuration, model and tokenizer are code of its own, and the file that running it makes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    marker = tmp_path / "it ran"
    (folder / "own.py").write_text(_CODE.format(marker=str(marker)))
    kinds = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit("config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=kinds)(folder)
    kinds = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    edit("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=kinds)(folder)
    return SimpleNamespace(folder=folder, marker=marker)


def test_code_of_a_model_folder_is_not_run(own, tmp_path, monkeypatch):
    # Whatever is on stdin: transformers would ask there.
    (tmp_path / "a.txt").write_text("text")
    store = ["--out", str(tmp_path / "store")]
    commands = [
        ["sites", str(own.folder)],
        ["extract", str(own.folder), str(tmp_path / "a.txt"), *store],
        ["extract", str(own.folder), str(tmp_path / "a.txt"), *store, "--dry-run"],
    ]
    for command in commands:
        done = CliRunner().invoke(main, command, input="y\n" * 9)
        assert done.exit_code == 2
        assert "It brings its own Python code: read that, and say --trust-remote-code" in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("mmcache: ")]) == 1
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for load in (lambda: load_model(str(own.folder), None), lambda: mmcache.view.Unembedding.load(str(own.folder))):
        with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
            load()
    assert not own.marker.exists()
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_s_code_is_not_run(own, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(UnsupportedModelError, match=r"cannot be loaded as a tokenizer.*trust_remote_code=True"):
        load_tokenizer(str(own.folder))
    assert not own.marker.exists()


def test_code_of_a_model_folder_runs_where_it_is_trusted(own, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    command = ["extract", str(own.folder), str(tmp_path / "a.txt"), "--out", str(tmp_path / "store")]
    options = ["--trust-remote-code", "--sites", "model.layers.*.mlp:out"]
    done = CliRunner().invoke(main, [*command, *options])
    assert (done.exit_code, own.marker.exists()) == (0, True), done.stderr
    assert type(load_model(str(own.folder), None, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    assert type(load_tokenizer(str(own.folder), trust_remote_code=True)).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("dtype", ["nonsense", "int8", "nn", "", 3])
def test_a_dtype_that_no_model_computes_in_is_refused(whole, dtype):
    with pytest.raises(ArgumentError, match=r"compute_dtype is .*: expected a dtype such as 'float32'"):
        load_model(str(whole), dtype)


def test_the_command_line_refuses_models_that_take_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    cases = (
        (small.t5, "encoder.block.*.layer.1:out", "T5Model failed on token ids"),
        (small.vit, "embeddings:out", "has no tokenizer|cannot be loaded as a tokenizer|takes pixel_values"),
        (small.whisper, "encoder.layers.*:out", "WhisperModel takes input_features"),
    )
    for made, sites, message in cases:
        place = str(tmp_path / made.__name__)
        made().save_pretrained(place)
        small.byte_tokenizer().save_pretrained(place)
        for command in (["sites", place], ["extract", place, str(tmp_path / "a.txt"), "--out", str(tmp_path / "s")]):
            done = CliRunner().invoke(main, [*command, "--sites", sites])
            last = done.stderr.splitlines()[-1]
            assert done.exit_code == 2
            assert any(part in last for part in message.split("|"))
    assert not (tmp_path / "s").exists()


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders_load_or_are_one_error(whole, tmp_path, request):
    # The first kilobytes hold what has a meaning: headers and keys.
    rng, folder = np.random.default_rng(0), shutil.copytree(whole, tmp_path / "model")
    transformers.utils.logging.set_verbosity_error()
    for _ in range(widened(request, (6, 60))):
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", WEIGHTS):
            data = bytearray((whole / file).read_bytes())
            for at in rng.integers(min(len(data), 4000), size=rng.integers(1, 4)):
                data[at : at + rng.integers(2)] = rng.bytes(rng.integers(2))
            (folder / file).write_bytes(data)
            for load in (lambda: load_model(str(folder), None), lambda: load_tokenizer(str(folder))):
                try:
                    load()
                except UnsupportedModelError as error:
                    check_refusal(error, folder)
            shutil.copy(whole / file, folder / file)
