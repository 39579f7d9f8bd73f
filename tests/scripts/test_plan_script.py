"""`scripts/plan.py`: its sizes are those of real stores, its hours follow from what it is told."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import mmcache
from mmcache.format.names import RESERVED
from mmcache.models.loading import DEMO, load_model, load_tokenizer
from stores_and_processes import without_sync

SCRIPTS = Path(__file__).parents[2] / "scripts"
# The public counts, norms and biases included, which the plan leaves out: a few in ten thousand.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.fixture(scope="module")
def parts():
    """Give `plan.py` and the modules behind it by name."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("models", "size", "figures", "writing", "reading", "measuring", "checking", "machine")
        yield {"plan": importlib.import_module("plan")} | {
            name: importlib.import_module(f"planning.{name}") for name in names
        }
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def plan(parts, monkeypatch, capsys):
    """Run the command in this process: its exit code, what it printed, and what it said of errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        try:
            code = parts["plan"].main()
        except SystemExit as left:
            code = left.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def said(plan):
    """Plan, and give what `--json` says."""

    def run(*arguments):
        code, out, err = plan(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def seconds(said, name):
    return next(part["seconds"] for part in said["writing"]["parts"] if part["name"] == name)


def files_of(path, array):
    return [file.stat().st_size for file in (path / array).glob("c.*")]


def demo_store(path, **options):
    texts = list(np.random.default_rng(0).integers(0, 255, (9, 100)))
    mmcache.extract(load_model("demo", None), load_tokenizer("demo"), texts, path, context_length=100, **options)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, []),
        ({"shard_tokens": 256}, ["--shard-tokens", 256]),
        ({"layout": "layer", "shard_tokens": 256}, ["--layout", "layer", "--shard-tokens", 256]),
        ({"layers": [0, 2, 3], "dtype": torch.float32}, ["--layers", "0,2-3", "--dtype", "float32"]),
        ({"sites": ["resid_mid"], "shard_tokens": 512}, ["--sites", "resid_mid", "--shard-tokens", 512]),
        ({"sites": ["model.layers.*.mlp.down_proj:in"]}, ["--sites", "model.layers.*.mlp.down_proj:in=384"]),
    ],
)  # fmt: skip
def test_bytes_and_shards_are_those_of_a_real_extraction(tmp_path, said, options, arguments):
    demo_store(tmp_path / "acts", **options)
    store = said("demo", "--tokens", 900, "--context-length", 100, *arguments)["store"]
    with mmcache.open(tmp_path / "acts") as real:
        assert list(store["sites"]) == list(real.sites)
        assert store["shard_tokens"] == real.shard_tokens
        assert (store["tokens"], store["sequences"]) == (real.n_tokens, real.n_sequences)
        files = {site: files_of(tmp_path / "acts", site) for site in real.sites}
    assert store["sites"] == {site: sum(sizes) for site, sizes in files.items()}
    assert store["shards"] == sum(map(len, files.values()))
    assert store["columns"] == sum(sum(files_of(tmp_path / "acts", array)) for array in RESERVED)
    metadata = [tmp_path / "acts" / name / "zarr.json" for name in (*files, *RESERVED)]
    # All but the root, which says where the store came from too.
    root = (tmp_path / "acts" / "zarr.json").stat().st_size
    assert 0 < store["metadata"] - sum(file.stat().st_size for file in metadata) < root


def test_statistics_that_are_merged_are_those_in_the_shards(tmp_path, said):
    demo_store(tmp_path / "acts", shard_tokens=512)
    store = said("demo", "--tokens", 512, "--context-length", 100, "--shard-tokens", 512)["store"]
    found = 0
    for site in ("mlp_in", "mlp_out"):
        with safe_open(tmp_path / "acts" / site / "c.0.0.0", framework="np") as shard:
            found += sum(shard.get_tensor(name).nbytes for name in mmcache.format.shard.STATISTICS)
    assert store["statistics"] == found


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_preset_has_the_parameters_that_its_makers_say(parts, name):
    model = parts["models"].find_model(name)
    assert set(PARAMETERS) == set(parts["models"].PRESETS)
    assert model.parameters == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert model.layers * model.block < model.parameters


@pytest.mark.parametrize(
    ("name", "bytes_a_token"), [("gpt2", 36_864), ("gemma-2-2b", 239_616), ("llama-3-8b", 524_288)]
)
def test_a_token_takes_what_the_design_says(said, name, bytes_a_token):
    assert said(name, "--tokens", 1000)["store"]["bytes_a_token"] == bytes_a_token


def test_the_demo_is_counted_matrix_by_matrix(parts):
    model = parts["models"].find_model("demo")
    matrices = [weight.numel() for weight in load_model("demo", None).parameters() if weight.ndim == 2]
    assert model.parameters == sum(matrices)
    assert model.block == (sum(matrices) - 257 * 128) / 4


def test_a_config_is_found_by_file_folder_and_name(parts):
    find = parts["models"].find_model
    one, two, three = find("demo"), find(str(DEMO)), find(str(DEMO / "config.json"))
    assert vars(one) | {"name": ""} == vars(two) | {"name": ""} == vars(three) | {"name": ""}


def test_three_numbers_are_a_model(parts):
    model = parts["models"].find_model("12,768,85e6")
    assert (model.layers, model.width, model.block, model.parameters) == (12, 768, 85_000_000 // 12, 85_000_000)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.sampled_from(["token", "layer"]))
def test_more_tokens_never_take_fewer_bytes_or_shards(parts, one, two, layout):
    few, many = sorted((one, two))
    sizes = [
        parts["size"].measure(
            parts["size"].planned(
                {"mlp_in": 64}, (0, 1), tokens, -(-tokens // 128), dtype="bfloat16", layout=layout, shard_tokens=2048
            )
        )
        for tokens in (few, many)
    ]
    assert sizes[0].bytes <= sizes[1].bytes
    assert sizes[0].shards <= sizes[1].shards
    for size in sizes:
        assert size.bytes == size.tokens * size.bytes_a_token + size.overhead + size.columns + size.metadata


def test_more_of_anything_never_takes_longer(said):
    base = ["gemma-2-2b", "--tokens", "10M", "--gpus", 8, "--network", "25G"]
    plain = said(*base)["writing"]["seconds"]
    for more in (
        ["--mfu", 0.5], ["--disks", 4], ["--disk-write", "9G"], ["--network", "100G"],
        ["--token-ids"], ["--layers", "0-12"], ["--sites", "mlp_in"],
    ):  # fmt: skip
        assert said(*base, *more)["writing"]["seconds"] <= plain, more


def test_twice_the_gpus_take_half_the_time_of_what_they_share(said):
    one, two = (said("gemma-2-2b", "--tokens", "10M", "--gpus", gpus) for gpus in (4, 8))
    for name in ("forward passes", "copy to staging", "checksums, statistics", "name and sync shards"):
        assert seconds(two, name) == pytest.approx(seconds(one, name) / 2)
    for name in ("tokenise", "write", "merge the statistics"):
        assert seconds(two, name) == pytest.approx(seconds(one, name))


def test_a_worker_with_a_gpu_has_one_thread_for_its_digests(said):
    for cores in (1, 64):
        found = said("gpt2", "--tokens", "10M", "--gpus", 2, "--cores", cores)
        rate = found["figures"]["digest"]["value"]
        assert seconds(found, "checksums, statistics") == pytest.approx(10e6 * 36_864 / (2 * rate))


def test_only_as_many_layers_are_run_as_are_wanted(said):
    whole, third = (
        seconds(said("gpt2", "--tokens", "1M", "--layers", layers), "forward passes") for layers in ("0-11", "3")
    )
    assert third == pytest.approx(whole / 3)


def test_what_overlaps_counts_once_and_the_rest_adds_up(said):
    writing = said("gpt2", "--tokens", "10M")["writing"]
    serial = sum(part["seconds"] for part in writing["parts"] if part["phase"] != "together")
    lanes = {}
    for part in writing["parts"]:
        if part["phase"] == "together":
            lanes[part["lane"]] = lanes.get(part["lane"], 0) + part["seconds"]
    assert writing["together_seconds"] == pytest.approx(max(lanes.values()))
    assert writing["seconds"] == pytest.approx(serial + max(lanes.values()))


def test_without_a_gpu_what_needs_the_processor_adds_up(said):
    writing = said("demo", "--tokens", "1M", "--gpu", "cpu", "--forward", 10_000, "--cores", 2)["writing"]
    names = ("forward passes", "copy to staging", "checksums, statistics")
    assert writing["together_seconds"] == pytest.approx(sum(seconds({"writing": writing}, name) for name in names))


@pytest.mark.parametrize(
    ("arguments", "bottleneck"),
    [
        (["--disk-write", "100M"], "write"),
        (["--disk-write", "1T"], "checksums, statistics"),
        (["--disk-write", "1T", "--workers", 64, "--flops", "5T"], "forward passes"),
        (["--disk-write", "1T", "--network", "1G"], "network"),
    ],
)
def test_the_bottleneck_is_what_is_slow(said, arguments, bottleneck):
    writing = said("llama-3-8b", "--tokens", "100M", *arguments)["writing"]
    assert writing["bottleneck"] == bottleneck
    assert writing["times"] > 1


def test_at_a_thousand_workers_it_is_what_one_of_them_does_alone(said):
    arguments = ["llama-3-8b", "--tokens", "2G", "--gpus", 1000, "--disk-write", "1T", "--disk-read", "1T"]
    writing = said(*arguments)["writing"]
    assert writing["bottleneck"] == "merge the statistics"
    crowd = said(*arguments, "--names", "1M")
    assert crowd["writing"]["bottleneck"] == "last looks"
    # Every one of them lists the names of all shards, in two passes, twice.
    assert seconds(crowd, "last looks") >= 4 * 1000 * crowd["store"]["shards"] / 1e6


def test_a_petabyte_is_more_than_a_process_can_address(said, parts):
    one_tensor = parts["reading"].one_tensor
    assert not said("llama-3-8b", "--tokens", "2G")["reading"]["one_tensor"]
    assert said("llama-3-8b", "--tokens", "100M")["reading"]["one_tensor"]
    tera = 1 << 40
    assert one_tensor([84 * tera, 41 * tera])
    assert not one_tensor([86 * tera])
    assert not one_tensor([43 * tera] * 3)


def test_an_epoch_waits_for_the_disk_or_for_training(said):
    base = ["gpt2", "--tokens", "10M"]
    disk = said(*base)["reading"]
    assert (disk["bottleneck"], disk["tokens_a_second"]) == ("disk", pytest.approx(1.1e9 / 36_864))
    slow = said(*base, "--train-tokens-per-second", 1000, "--epochs", 3)["reading"]
    assert (slow["bottleneck"], slow["epochs_seconds"]) == ("training", pytest.approx(30_000))


def test_json_says_all_of_it(said):
    found = said("gpt2", "--tokens", "1M", "--gpus", 2)
    assert set(found) == {"model", "store", "machine", "writing", "reading", "figures"}
    for part in found["writing"]["parts"]:
        assert set(part) == {"name", "seconds", "phase", "why", "remedy", "lane"}
        assert part["phase"] in ("before", "together", "after")
        assert part["seconds"] > 0
    assert {part["name"] for part in found["writing"]["parts"]} >= {found["writing"]["bottleneck"], "tokenise"}
    assert all(figure["source"] and figure["unit"] for figure in found["figures"].values())
    assert found["writing"]["gpu_hours"] == pytest.approx(2 * found["writing"]["seconds"] / 3600)


def test_what_is_given_replaces_a_figure_and_says_so(said):
    figures = said("gpt2", "--tokens", "1M", "--disk-write", "5G")["figures"]
    assert figures["disk write"] == {"value": 5e9, "unit": "bytes/s", "source": "as given"}
    assert figures["disk read"]["source"] != "as given"


def test_people_are_told_the_bytes_the_time_and_the_bottleneck(plan):
    code, out, _ = plan("gpt2", "--tokens", "100M", "--figures")
    assert code == 0
    assert "36,864 bytes" in out
    assert "bottleneck" in out
    assert "checksums, statistics" in out
    assert "four million real empty files" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "MODEL"),
        (["gpt2"], "--tokens"),
        (["nothing", "--tokens", "1M"], "no model"),
        (["1,2", "--tokens", "1M"], "no model"),
        (["1,x,3", "--tokens", "1M"], "LAYERS,WIDTH,PARAMETERS"),
        (["gpt2", "--tokens", "0"], "positive"),
        (["gpt2", "--tokens", "nan"], "positive"),
        (["gpt2", "--tokens", "1.5"], "whole"),
        (["gpt2", "--tokens", "1M", "--layers", "12"], "layers 0 to 11"),
        (["gpt2", "--tokens", "1M", "--layers", "5-3"], "layers 0 to 11"),
        (["gpt2", "--tokens", "1M", "--layers", "a"], "expected a layer"),
        (["gpt2", "--tokens", "1M", "--sites", "tokens"], "--sites"),
        (["gpt2", "--tokens", "1M", "--sites", "mlp_in,mlp_in"], "twice"),
        (["gpt2", "--tokens", "1M", "--sites", "mlp_in=0"], "no number"),
        (["gpt2", "--tokens", "1M", "--dtype", "int8"], "invalid choice"),
        (["gpt2", "--tokens", "1M", "--shard-tokens", "999"], "nearest good number"),
        (["gpt2", "--tokens", "1M", "--mfu", "1.5"], "--mfu"),
        (["gpt2", "--tokens", "1M", "--gpu", "cpu"], "--forward"),
        (["gpt2", "--tokens", "1M", "--machines", "2"], "--machines"),
        (["gpt2", "--tokens", "1M", "--sequences", "3"], "--sequences"),
        (["gpt2", "--check"], "demo"),
    ],
)
def test_bad_arguments_are_told_with_exit_2(plan, arguments, problem):
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert problem in err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"model_type": "mixtral"}', "mixtral"),
        ('{"model_type": "llama", "num_hidden_layers": "4"}', "num_hidden_layers"),
        ('{"model_type": "llama", "num_hidden_layers": -4, "hidden_size": 8}', "num_hidden_layers"),
        ('{"model_type": "llama", "num_hidden_layers": 4}', "hidden_size"),
    ],
)
def test_a_config_that_makes_no_sense_is_told_with_exit_2(plan, tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    code, _, err = plan(tmp_path, "--tokens", "1M")
    assert code == 2
    assert problem in err


def test_the_check_makes_a_store_and_finds_its_bytes_as_planned(parts, tmp_path, monkeypatch):
    without_sync(monkeypatch)
    monkeypatch.setattr(parts["checking"], "_WRITTEN", 16 << 20)
    monkeypatch.setattr(parts["measuring"], "_DIGESTED", 4 << 20)
    machine = parts["machine"].Machine(0, 1, 1, 1, 2, 0.0, 0.4)
    figures = dict(parts["figures"].MEASURED_HERE)
    checked = parts["checking"].check(tmp_path, machine, figures, tokens=9_000, repeats=1)
    # Times are the machine's; that they are compared is shown below.
    exact = {name: one for name, one in checked.items() if name != "seconds"}
    assert parts["checking"].differences(exact, 0) == []
    assert checked["shards"]["found"] == 4
    assert min(checked["seconds"].values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_check_fails_beyond_its_tolerance(parts, plan, monkeypatch):
    checked = {"bytes": {"planned": 100, "found": 100}, "seconds": {"planned": 8.0, "found": 10.0}}
    monkeypatch.setattr(parts["checking"], "check", lambda *_args, **_options: checked)
    assert plan("demo", "--check")[0] == 0
    code, out, _ = plan("demo", "--check", "--tolerance", 0.1)
    assert code == 1
    assert "NOT AS PLANNED: seconds" in out
    checked["bytes"]["planned"] = 101
    code, out, _ = plan("demo", "--check", "--json")
    assert code == 1
    assert len(json.loads(out)["wrong"]) == 1


def test_what_is_measured_replaces_its_figures(parts, tmp_path, monkeypatch):
    measuring = parts["measuring"]
    for name, small in (("_NAMES", 300), ("_BYTES", 16 << 20), ("_MERGED", 3), ("_DIGESTED", 4 << 20)):
        monkeypatch.setattr(measuring, name, small)
    manifest = parts["size"].planned(
        {"mlp_in": 64}, (0, 1), 10_000, 10, dtype="bfloat16", layout="token", shard_tokens=2048
    )
    told = []
    found = measuring.measured(tmp_path, manifest, told.append)
    assert set(found) < set(parts["figures"].MEASURED_HERE)
    assert len(told) == len(found) == 8
    assert all(figure.value > 0 for figure in found.values())
    for name, figure in found.items():
        assert (figure.unit, figure.source) == (parts["figures"].MEASURED_HERE[name].unit, "measured now")
    # Nothing was left out: a look that finds nothing would be a million times as quick.
    assert found["look"].value < 1e8
    assert list(tmp_path.iterdir()) == []


def test_arithmetic_needs_no_transformers():
    code = (
        "import atexit, runpy, sys; sys.argv = ['plan.py', 'demo', '--tokens', '1M', '--json'];"
        "atexit.register(lambda: print(sorted({'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr));"
        "runpy.run_path('plan.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    # As where a script is run by its path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])}
    done = subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["model"]["layers"] == 4
