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

small = pytest.importorskip("small_models")

# They are imported as they are asked for, so the group itself lists none.
COMMANDS = main.list_commands(None)
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(autouse=True)
def threads():
    """The command computes with the threads of its plan, and has no process of its own here."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    result = run("extract", model, corpus, "--out", acts, "--context-length", "32", "--shard-tokens", "256", "--json")
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
        (["extract", "no-such-model-folder/x/y", str(README), "--out", "x"], "cannot be loaded as a model"),
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


def test_every_command_stands_in_the_readme():
    text = README.read_text()
    for command in COMMANDS:
        assert command in text, command


def without_constants(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_printed_is_json_whatever_the_numbers_are(tmp_path):
    rows = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    with mmcache.FullActivationCache.with_capacity(1, tmp_path / "cache") as cache:
        cache.push(rows[:1])
    printed = run("show", str(tmp_path / "cache"), "0", "0", "--json").stdout
    row = json.loads(printed, parse_constant=without_constants)[0]
    # As zarr writes them, and as float() reads them.
    assert row["values"] == [1.0, "NaN", "Infinity", "-Infinity"]
    assert [float(value) for value in row["values"][2:]] == [torch.inf, -torch.inf]
    # No row counts, so its mean norm is no number.
    printed = run("stats", str(tmp_path / "cache"), "--json", code=1).stdout
    layer = json.loads(printed, parse_constant=without_constants)[0]["layers"][0]
    assert (layer["non_finite"], layer["rows"], layer["mean_norm"]) == (1, 0, "NaN")
    for command in (["show", "--", "0", "0"], ["show", "--", "0"], ["stats"]):
        run(command[0], str(tmp_path / "cache"), *command[1:], code=int(command == ["stats"]))


def test_a_path_is_printed_as_it_is(model, corpus, tmp_path):
    # Square brackets are markup to the library that draws the tables.
    path = tmp_path / "acts[bold][/x]"
    shown = run("extract", model, corpus, "--out", str(path), "--layers", "0", "--sites", " mlp_in ,mlp_out").stdout
    assert "acts[bold][/x]" in shown.replace("\n", "")
    assert "acts[bold][/x]" in run(str(path)).stdout.replace("\n", "")


def test_rows_that_are_not_there_yet_are_a_finding(model, corpus, tmp_path):
    out = tmp_path / "acts"
    run("extract", model, corpus, "--out", str(out), "--shard-tokens", "256")
    (out / "mlp_in" / "c.0.1.0").unlink()
    result = run("show", str(out), "1", "300", "--site", "mlp_in", code=1)
    assert "shard c.0.1.0 of mlp_in is not there" in result.stderr
    assert result.stdout == ""
    run("show", str(out), "1", "300", "--site", "mlp_out")
    run("show", str(out), "1", "100", "--site", "mlp_in")


def test_a_plan_without_any_token_leaves_the_path_free(model, corpus, tmp_path):
    arguments = ["extract", model, corpus, "--out", str(tmp_path / "acts"), "--max-tokens"]
    assert "no room for the first context: raise it" in run(*arguments, "3", code=2).stderr
    assert "no mmcache store there" in run("info", arguments[4], code=2).stderr
    run(*arguments, "300", "--context-length", "16")
    assert mmcache.open(tmp_path / "acts").n_tokens <= 300


def test_a_damaged_store_is_a_finding(model, corpus, tmp_path):
    out = tmp_path / "acts"
    run("extract", model, corpus, "--out", str(out), "--layers", "0")
    text = (out / "zarr.json").read_text()
    (out / "zarr.json").unlink()
    (out / "zarr.json").write_text(text.replace("mlp_in", "mlp_on"))
    for command in (["info", str(out)], ["stats", str(out)], ["show", str(out), "0"]):
        assert "does not match its own digest" in run(*command, code=1).stderr


def test_numerics_are_accepted_with_the_flag_and_shown(model, corpus, tmp_path):
    arguments = ["extract", model, corpus, "--out", str(tmp_path / "acts"), "--layers", "0"]
    run(*arguments)
    (tmp_path / "acts" / "mlp_in" / "c.0.0.0").unlink()
    refused = run(*arguments, "--batch-size", "3", code=2)
    assert "batch_size  8 in the store, 3 now" in refused.stderr
    run(*arguments, "--batch-size", "3", "--accept-numerics")
    view = json.loads(run("info", str(tmp_path / "acts"), "--json").stdout)
    assert [numerics["batch_size"] for numerics in view["source"]["accepted"]] == [3]


def test_the_plans_threads_are_used_again(model, corpus, tmp_path):
    arguments = ["extract", model, corpus, "--out", str(tmp_path / "acts"), "--layers", "0"]
    torch.set_num_threads(1)
    run(*arguments)
    torch.set_num_threads(2)
    run(*arguments)  # another number of threads would be refused
    assert mmcache.open(tmp_path / "acts").source["numerics"]["threads"] == 1


def test_options_reach_the_job(model, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"body": f"text {number}"}) + "\n" for number in range(50)))
    result = run(
        "extract", model, str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "acts"), "--field", "body", "--pack",
        "--context-length", "20", "--layers", "0-1,2", "--dtype", "float16", "--compute-dtype", "float64",
        "--layout", "layer", "--max-tokens", "200", "--device", "cpu", "--sites", "resid_mid", "--json",
    )  # fmt: skip
    view = json.loads(result.stdout)
    identity = view["source"]["identity"]
    assert (view["n_tokens"], view["n_sequences"], view["layers"]) == (200, 10, [0, 1, 2])
    assert (view["dtype"], view["layout"], list(view["sites"])) == ("float16", "layer", ["resid_mid"])
    assert (identity["compute_dtype"], identity["pack"]) == ("float64", True)


def test_python_m_mmcache_is_the_command_and_nothing_but_data_is_on_stdout(model, corpus, tmp_path):
    command = [sys.executable, "-m", "mmcache", "extract", model, corpus, "--out", str(tmp_path / "acts"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["complete"]
    assert "tokens/s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    shown = run(command, "--help").stdout
    assert "Usage:" in shown
    assert ("--json" in shown) == any("--json" in option.opts for option in main.get_command(None, command).params)


@pytest.mark.parametrize("width", ["20", "60", "200"])
def test_terminals_of_any_width(model, corpus, acts, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    again = ["extract", model, corpus, "--out", acts, "--context-length", "32", "--shard-tokens", "256"]
    for command in (
        ["sites", model],
        again,
        [*again, "--dry-run"],
        ["info", acts],
        ["show", acts, "0"],
        ["stats", acts],
    ):
        run(*command)


def test_no_number_is_cut_in_two_on_a_common_terminal(acts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = run("stats", acts).stdout.split()
    for site in ("mlp_in", "mlp_out"):
        found = mmcache.open(acts)[site].statistics
        for layer in range(3):
            # Half a number is another number: 0.5 and 67 in the next line read as 0.5.
            for value in (found.min_norm[layer], found.max_norm[layer], found.std[layer].max()):
                assert f"{float(value):.3g}" in words
