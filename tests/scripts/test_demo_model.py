"""The model in the package is the one that its script makes, and it has learnt something."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mmcache" / "demo"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location("train_demo_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def split(script):
    return script.split_stdlib()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def test_weights_fit_in_the_package():
    assert (DEMO / "model.safetensors").stat().st_size <= 4_000_000


def test_record_agrees_with_the_model(model):
    record = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == model.num_parameters()
    assert record["held_out_nats_per_byte"] <= 2.0
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


def test_tokens_are_bytes(tokenizer, script):
    assert tokenizer("hé").input_ids == [256, 104, 195, 169]
    assert tokenizer.bos_token_id == script.BOS_ID == len(tokenizer) - 1
    # Every byte that UTF-8 has, through every length of character it has.
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)]))
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_packaged_tokenizer_is_the_scripts(tokenizer, script):
    made = json.loads(script.build_tokenizer().backend_tokenizer.to_str())
    assert json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8")) == made
    assert tokenizer.model_max_length == script.CONTEXT


def test_split_is_by_whole_files(split):
    train, held_out = split
    assert not set(train) & set(held_out)
    assert train == sorted(train, key=lambda path: path.as_posix())
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = {folder for path in (*train, *held_out) for folder in path.relative_to(root).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip"}


def test_held_out_text_is_predicted(model, script, split):
    _, held_out = split
    # The starts of files are mostly prose and imports, the rest mostly code: some of both.
    texts = [path.read_bytes()[: 4 * (script.CONTEXT - 1)] for path in held_out[::4]]
    assert script.held_out_loss(model, texts) <= 2.0


def test_a_folder_that_is_there_is_not_written_over(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_demo_model.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []
