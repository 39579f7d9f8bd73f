"""Every command: data on stdout, progress on stderr, exit 0 fine, 1 findings, 2 usage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import mmcache
from mmcache.cli import main

small = pytest.importorskip("small")

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small.llama().save_pretrained(folder)
    small.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("Some text of no particular meaning. " * 30)
    return str(path)


@pytest.fixture(scope="module")
def acts(model, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "acts"
    run("extract", model, corpus, "--out", str(out), "--context-length", "32", "--shard-tokens", "256")
    return str(out)


def run(*args, code=0):
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, result.output
    return result


def test_extract_says_its_plan_and_progress_on_stderr_and_the_store_on_stdout(model, corpus, tmp_path):
    result = run("extract", model, corpus, "--out", str(tmp_path / "acts"), "--json", "--layers", "0,2")
    assert json.loads(result.stdout)["layers"] == [0, 2]
    for word in ("plan", "tokens", "bytes", "free", "to do", "tokens/s"):
        assert word in result.stderr


def test_the_same_command_again_finds_nothing_to_do(model, corpus, acts):
    result = run(
        "extract", model, corpus, "--out", acts, "--context-length", "32", "--shard-tokens", "256", "--json"
    )
    assert "0 B in 0 shards" in result.stderr
    assert json.loads(result.stdout)["complete"]


def test_other_settings_are_refused_with_the_field(model, corpus, acts):
    result = run("extract", model, corpus, "--out", acts, "--context-length", "16", code=2)
    assert "context_length" in result.stderr
    assert result.stdout == ""


def test_a_dry_run_writes_nothing(model, corpus, tmp_path):
    out = tmp_path / "acts"
    said = json.loads(run("extract", model, corpus, "--out", str(out), "--dry-run", "--json").stdout)
    assert said["tokens"] == 30 * 36 + -(-30 * 36 // 127)
    assert said["bytes_a_token"] == 2 * 3 * 32 * 2
    assert said["seconds"] > 0
    assert not out.exists()
    assert "time" in run("extract", model, corpus, "--out", str(out), "--dry-run").stdout


def test_the_batch_size_is_found_once_and_kept(model, corpus, tmp_path):
    arguments = ["extract", model, corpus, "--out", str(tmp_path / "acts"), "--batch-size", "auto"]
    run(*arguments)
    chosen = mmcache.open(tmp_path / "acts").source["numerics"]["batch_size"]
    assert chosen >= 1
    run(*arguments)
    assert mmcache.open(tmp_path / "acts").source["numerics"]["batch_size"] == chosen


def test_strict_refuses_what_is_not_finite(corpus, tmp_path):
    broken = small.llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    small.byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["extract", str(tmp_path / "model"), corpus, "--sites", "mlp_out", "--layers", "1"]
    strict = run(*arguments, "--out", str(tmp_path / "strict"), "--strict", code=1)
    assert "mlp_out, layer 1" in strict.stderr
    assert not list((tmp_path / "strict" / "mlp_out").glob("c.*"))
    with pytest.warns(mmcache.NonFiniteWarning, match="mlp_out, layer 1"):
        run(*arguments, "--out", str(tmp_path / "acts"))
    assert json.loads(run("stats", str(tmp_path / "acts"), "--json", code=1).stdout)[0]["layers"][0]["non_finite"]


def test_sites_says_modules_and_shapes(model):
    found = {row["site"]: row for row in json.loads(run("sites", model, "--json").stdout)}
    assert set(found) == {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out"}
    assert found["mlp_in"]["modules"] == "model.layers.0.mlp:in … model.layers.2.mlp:in"
    assert found["mlp_in"]["shape"] == ["batch", "seq", 32]
    path = "model.layers.*.mlp.down_proj:in"
    assert json.loads(run("sites", model, "--sites", path, "--json").stdout)[0]["shape"] == ["batch", "seq", 48]
    assert "resid_post" in run("sites", model).stdout


def test_a_path_alone_is_info(acts):
    view = json.loads(run(acts, "--json").stdout)
    assert view == json.loads(run("info", acts, "--json").stdout)
    store = mmcache.open(acts)
    assert (view["n_tokens"], view["n_layers"], view["complete"]) == (store.n_tokens, 3, True)
    shown = run(acts).stdout
    for word in ("complete", "LlamaForCausalLM", "weights", "tokenizer", "corpus", "mlp_in"):
        assert word in shown


def test_an_incomplete_store_is_a_finding(model, corpus, tmp_path):
    out = tmp_path / "acts"
    run("extract", model, corpus, "--out", str(out), "--shard-tokens", "256")
    (out / "mlp_in" / "c.0.1.0").unlink()
    assert json.loads(run("info", str(out), "--json", code=1).stdout)["sites"]["mlp_in"]["missing"] == 1
    assert "NOT COMPLETE" in run("info", str(out), code=1).stdout


def test_show_prints_a_layer_or_a_row(acts):
    store = mmcache.open(acts)
    row = json.loads(run("show", acts, "--json", "--site", "mlp_out", "--", "1", "-2").stdout)[0]
    assert row["position"] == store.n_tokens - 2
    assert row["values"] == store["mlp_out"].get_position(1, -2).double().tolist()
    layer = json.loads(run("show", acts, "2", "--json").stdout)
    assert [view["site"] for view in layer] == ["mlp_in", "mlp_out"]
    assert layer[0]["mean"] == pytest.approx(float(store["mlp_in"].get_layer(2).double().mean()))
    assert "largest" in run("show", acts, "1", "5").stdout
    assert "layer 7 not in cache (n_layers=3)" in run("show", acts, "7", code=2).stderr


def test_show_and_stats_read_a_cache_too(tmp_path):
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "cache") as cache:
        cache.push(torch.arange(12.0).reshape(3, 4))
    row = json.loads(run("show", str(tmp_path / "cache"), "0", "2", "--json").stdout)[0]
    assert (row["values"], row["token"]) == ([8.0, 9.0, 10.0, 11.0], -1)
    assert json.loads(run("stats", str(tmp_path / "cache"), "--json").stdout)[0]["layers"][0]["rows"] == 3


def test_stats_are_the_store_s(acts):
    found = json.loads(run("stats", acts, "--json").stdout)
    statistics = mmcache.open(acts)["mlp_in"].statistics
    assert [row["mean_norm"] for row in found[0]["layers"]] == statistics.mean_norm.tolist()
    assert "mlp_out" in run("stats", acts).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "nowhere"], "no mmcache store there"),
        (["extract", "no-such-model-folder/x/y", "README.md", "--out", "x"], "cannot be loaded as a model"),
        (["extract", "demo", "no-such-file.txt", "--out", "x"], "is not there"),
        (["extract", "demo", str(README), "--out", "x", "--sites", "mlp_inn"], "mlp_in"),
        (["extract", "demo", str(README), "--out", "x", "--layers", "2-x"], "numbers and ranges"),
        (["extract", "demo", str(README), "--out", "x", "--layers", "9"], "layer 9 not in model"),
        (["extract", "demo", str(README), "--out", "x", "--batch-size", "many"], "expected a number, or auto"),
        (["extract", "demo", str(README)], "--out"),
        (["no-such-command"], "No such command"),
    ],
)
def test_usage_errors_are_told_in_words(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2)
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").joinpath("zarr.json").exists() or said == "is not there"


def test_a_narrow_terminal_is_no_reason_to_crash(acts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for command in (["info", acts], ["stats", acts], ["show", acts, "0", "1"]):
        run(*command)


def test_python_m_mmcache_is_the_command(acts):
    done = subprocess.run([sys.executable, "-m", "mmcache", acts, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["path"] == acts


def test_every_command_stands_in_the_readme():
    text = README.read_text()
    for command in main.commands:
        assert command in text, command
