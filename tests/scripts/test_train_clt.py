"""The transcoder's trainer: killed and resumed it is the run that never was; what it saves is what was measured."""

import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import mmcache
import small_models
from clt_trainer import LAYERS, SCRIPT, WIDTH, command, files, load_script, log, make_store, run
from mmcache.training.token_filter import Split, members
from stores_and_processes import FORKS, damage, flip, without_sync

KINDS = ("jumprelu", "topk")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)
    # Which is also what a fork can have, and as quick for so little.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        return make_store(tmp_path_factory.mktemp("clt") / "acts", dtype=torch.bfloat16)


def refusal(script, store, out, **options):
    """Run it, and give what it said when it refused."""
    done = run(script, store, out, **options)
    assert done.exit_code == 2, done.output
    return done.stderr


def killed_run(script, arguments, countdown):
    """Run it in a fork that kills itself at the `countdown`th of its steps and writes; give how it ended."""
    child = os.fork()
    if not child:
        calls = iter(range(1, 10**9))

        def deadly(work):
            def counted(*args, **named):
                if next(calls) == countdown:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = work(*args, **named)
                # Behind it as well: a step that is not in the log, a file that has just got its name.
                if next(calls) == countdown:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return counted

        code = 1
        try:
            torch.set_num_threads(1)
            script.Run.take, os.replace = deadly(script.Run.take), deadly(os.replace)
            for module in script.publishers:
                module.publish = deadly(module.publish)
            code = CliRunner().invoke(script.main, arguments).exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@FORKS
@kinds
def test_killed_anywhere_it_is_the_run_that_never_was(script, store, tmp_path, kind):
    options = {"activation": kind, "lr": 0.01}
    assert run(script, store, tmp_path / "whole", **options).exit_code == 0
    whole, out, choose = files(tmp_path / "whole"), tmp_path / "killed", random.Random(kind)  # noqa: S311
    # All places of the first checkpoint's making: the second leaves a temporary file. Then anywhere: a checkpoint is
    # made every 7 steps, so that some kills lose all that a run did.
    for kills in itertools.count():
        code = killed_run(script, command(store, out, **options), kills + 1 if kills < 4 else choose.randrange(1, 60))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert kills != 1 or list(out.glob(".checkpoint.pt.*.tmp"))
    assert kills >= 7
    assert files(out) == whole
    losses = log(out)
    assert [entry["step"] for entry in losses] == list(range(1, 41))
    assert losses[-1]["error"] < losses[0]["error"] * 0.5
    # Complete, it finds nothing to do.
    assert run(script, store, out, **options).exit_code == 0
    assert files(out) == whole


def test_the_seed_matters_and_how_often_it_is_saved_does_not(script, store, tmp_path):
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, more in zip(outs, ({}, {"checkpoint_every": 1}, {"seed": 1}), strict=True):
        assert run(script, store, out, steps=8, **more).exit_code == 0
    assert files(outs[0]) == files(outs[1])
    assert log(outs[0]) != log(outs[2])


def test_rates_rise_and_fall_and_the_penalty_rises(script, store, tmp_path, monkeypatch):
    real, seen = script.Run.take, []
    losses = script.steps.losses

    def take(self, batch):
        found = real(self, batch)
        seen.append(self.optimizer.param_groups[0]["lr"])
        return found

    def penalised(clt, reads, writes, penalty):
        seen.append(penalty)
        return losses(clt, reads, writes, penalty)

    monkeypatch.setattr(script.Run, "take", take)
    monkeypatch.setattr(script.steps, "losses", penalised)
    assert run(script, store, tmp_path / "out", steps=20, lr=0.01, sparsity=0.5).exit_code == 0
    np.testing.assert_allclose(seen[::2], [0.5 * step / 20 for step in range(1, 21)])
    np.testing.assert_allclose(seen[1::2], [0.005] + [0.01] * 16 + [0.0075, 0.005, 0.0025])


def loaded(out):
    """Read a folder as circuit-tracer does: sizes from the tensors, everything else by its file's number."""
    count = len(list(out.glob("W_enc_*.safetensors")))
    encoders = [load_file(out / f"W_enc_{layer}.safetensors") for layer in range(count)]
    decoders = [load_file(out / f"W_dec_{layer}.safetensors") for layer in range(count)]
    names = ("W_enc", "b_enc", "b_dec", "threshold")
    parts = {name: np.stack([file[f"{name}_{layer}"] for layer, file in enumerate(encoders)]) for name in names}
    assert all(len(file) == 4 for file in encoders)
    return parts, [file[f"W_dec_{layer}"] for layer, file in enumerate(decoders)]


def reconstructed(out, rows):
    """Give what a saved transcoder makes of raw rows `[tokens, layers, width]`, and its features' activations."""
    parts, decoders = loaded(out)
    active, found = [], np.repeat(parts["b_dec"][None].astype(np.float64), len(rows), axis=0)
    for layer, decoder in enumerate(decoders):
        assert decoder.shape == (parts["W_enc"].shape[1], len(decoders) - layer, rows.shape[2])
        before = rows[:, layer] @ parts["W_enc"][layer].T + parts["b_enc"][layer]
        active.append(before * (before > parts["threshold"][layer]))
        found[:, layer:] += np.einsum("tf,fld->tld", active[-1], decoder)
    return found, np.stack(active, axis=1)


def held_out_rows(store):
    chosen = members(Split("validation"), store)
    spans = np.asarray(store.sequences)
    at = np.concatenate([np.arange(start, stop) for (start, stop, *_), held in zip(spans, chosen, strict=True) if held])
    at = at[(store.flags.numpy()[at] & 3) == 0]
    return [store[site].gather(at).double().numpy() for site in ("mlp_in", "mlp_out")]


@kinds
@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "layout": "layer"}], ids=["token", "layer"]
)
def test_what_is_saved_is_what_was_measured_and_has_learnt(script, tmp_path, kind, options):
    store = make_store(tmp_path / "acts", **options)
    done = run(script, store, tmp_path / "out", activation=kind, steps=150, lr=3e-3)
    assert done.exit_code == 0
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    reads, writes = held_out_rows(store)
    found, active = reconstructed(tmp_path / "out", reads)
    missed = ((writes - found) ** 2).sum(axis=(0, 2))
    explained = 1 - missed / ((writes - writes.mean(axis=0)) ** 2).sum(axis=(0, 2))
    assert said["tokens"] == len(reads)
    np.testing.assert_allclose(said["explained_variance"], explained, rtol=1e-4)
    np.testing.assert_allclose(said["mean_explained_variance"], explained.mean(), rtol=1e-4)
    np.testing.assert_allclose(said["l0"], (active > 0).sum(axis=2).mean(axis=0), rtol=1e-3)
    assert said["dead"] == (active == 0).all(axis=0).sum(axis=1).tolist()
    # Every layer, although one writes with 90 times the other's deviation, and far from zero.
    assert explained.min() > 0.6
    assert f"mean explained variance {said['mean_explained_variance']:.4f}" in " ".join(done.stdout.split())
    assert "100%" in done.stderr
    assert "step 14  loss" in done.stderr
    config = (tmp_path / "out" / "config.yaml").read_text().splitlines()
    assert dict(line.split(": ", 1) for line in config) == {
        "model_name": '"unknown"',
        "model_kind": '"cross_layer_transcoder"',
        "feature_input_hook": '"mlp.hook_in"',
        "feature_output_hook": '"hook_mlp_out"',
        "layers": "[0, 1, 2]",
    }


@kinds
def test_circuit_tracer_loads_it(script, store, tmp_path, kind):
    loading = pytest.importorskip(
        "circuit_tracer.transcoder.cross_layer_transcoder",
        reason="pip install --no-deps circuit-tracer, and what that imports: its pins do not suit ours",
    )
    assert run(script, store, tmp_path / "out", activation=kind).exit_code == 0
    clt = loading.load_clt(
        str(tmp_path / "out"), "mlp.hook_in", device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False
    )
    reads, _ = held_out_rows(store)
    found = clt(torch.from_numpy(reads).float().transpose(0, 1)).detach().transpose(0, 1)
    np.testing.assert_allclose(found.numpy(), reconstructed(tmp_path / "out", reads)[0], atol=1e-4)


def transcoder(script, k, seed=0):
    torch.manual_seed(seed)
    clt = script.clt.CrossLayerTranscoder(LAYERS, WIDTH, 12, k)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return clt


@pytest.mark.parametrize("k", [None, 3])
def test_folded_it_does_to_raw_rows_what_it_did_to_scaled_ones(script, k):
    clt, rows = transcoder(script, k), torch.randn(200, LAYERS, WIDTH)
    if k:
        clt.encode(rows)
    read_scale, write_scale = torch.rand(2, LAYERS, WIDTH) * 5 + 0.1
    raw = clt.folded(read_scale, write_scale).eval()
    clt.eval()
    active = clt.encode(rows * read_scale)[1]
    assert torch.allclose(raw.encode(rows)[1], active, atol=1e-5)
    assert 0 < (active > 0).float().mean() < 0.6
    assert torch.allclose(raw.decode(active), clt.decode(active) / write_scale, atol=1e-4)


@given(st.floats(0, 3), st.floats(0.01, 2), st.floats(-2, 2))
def test_the_gradient_of_jumprelu_is_the_formulas(script, offset, threshold, upstream):
    value = torch.tensor(threshold - 1.5 + offset, dtype=torch.float64, requires_grad=True)
    edge = torch.tensor(threshold, dtype=torch.float64, requires_grad=True)
    found = script.clt.JumpReLU.apply(value, edge)
    found.backward(torch.tensor(upstream, dtype=torch.float64))
    over, near = value.item() > threshold, abs(value.item() - threshold) < script.clt.BANDWIDTH / 2
    assert found.item() == (value.item() if over else 0)
    assert value.grad.item() == (upstream if over else 0)
    assert edge.grad.item() == (-upstream * threshold / script.clt.BANDWIDTH if near else 0)


def test_the_gradient_of_the_threshold_is_that_of_the_mean(script):
    # The mean over rows is smooth where no single row is: values uniform on [0, 3] have the density 1/3.
    values = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    edge = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    script.clt.JumpReLU.apply(values, edge.expand_as(values)).mean().backward()
    means = [(values * (values > at)).mean().item() for at in (1.15, 1.25)]
    assert edge.grad.item() == pytest.approx((means[1] - means[0]) / 0.1, rel=1e-3)
    assert edge.grad.item() == pytest.approx(-1.2 / 3, rel=1e-3)


def test_topk_keeps_what_writes_most_and_remembers_how_much_that_was(script):
    clt, rows = transcoder(script, 3), torch.randn(50, LAYERS, WIDTH)
    before, active = (part.detach().numpy() for part in clt.encode(rows))
    norms = np.stack([np.sqrt((decoder.detach().numpy() ** 2).sum(axis=(1, 2))) for decoder in clt.W_dec])
    for layer in range(LAYERS):
        written = np.maximum(before[layer], 0) * norms[layer]
        least = np.sort(written, axis=None)[-150]
        np.testing.assert_array_equal(active[layer] > 0, written >= least * (1 - 1e-6))
        assert (active[layer] > 0).sum() == 150
        assert clt.cutoff[layer].item() == pytest.approx(least, rel=1e-6)
        np.testing.assert_allclose(clt.thresholds()[layer].numpy(), least / norms[layer], rtol=1e-5)
    first = clt.cutoff.clone()
    clt.encode(rows * 2)
    assert torch.all(clt.cutoff > first)
    assert torch.all(clt.cutoff < first * 1.2)


@pytest.mark.parametrize("k", [None, 3])
def test_the_loss_is_its_formula(script, k):
    clt, (reads, writes) = transcoder(script, k), torch.randn(2, 20, LAYERS, WIDTH)
    found = {name: value.item() for name, value in script.clt.losses(clt, reads, writes, 0.25).items()}
    before, active = (part.detach().double() for part in clt.encode(reads))
    norms, edges = clt.norms().detach().double(), clt.thresholds().detach().double()
    error = revival = sparsity = 0.0
    for token in range(20):
        predicted = clt.b_dec.detach().double().clone()
        for layer in range(LAYERS):
            for feature in range(12):
                value = active[layer, token, feature]
                predicted[layer:] += value * clt.W_dec[layer][feature].detach()
                sparsity += float(torch.tanh(4 * value * norms[layer, feature])) / 20
                below = edges[layer, feature] - before[layer, token, feature]
                revival += float(below.clamp(min=0) * norms[layer, feature]) / 20
        error += float(((predicted - writes[token]) ** 2).mean(dim=1).sum()) / 20
    assert found["error"] == pytest.approx(error, rel=1e-4)
    expected = error + 1e-5 * revival + (0 if k else 0.25 * sparsity)
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert found["l0"] == pytest.approx((active > 0).sum().item() / 60, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("jumprelu", {"activation": "topk"}, "activation was jumprelu, and is topk"),
        ("jumprelu", {"features": 25}, "features was 24, and is 25"),
        ("jumprelu", {"steps": 41}, "steps was 12, and is 41"),
        ("jumprelu", {"batch_size": 65}, "batch_size was 64, and is 65"),
        ("jumprelu", {"lr": 0.1}, r"lr was 0.001, and is 0.1"),
        ("jumprelu", {"sparsity": 0.1}, "sparsity was 0.004, and is 0.1"),
        ("jumprelu", {"seed": 1}, "seed was 0, and is 1"),
        ("jumprelu", {"k": 5}, None),
        ("jumprelu", {"checkpoint_every": 3}, None),
        ("topk", {"k": 5}, "k was 4, and is 5"),
        ("topk", {"sparsity": 0.1}, None),
    ],
    ids=str,
)
def test_a_resume_with_other_settings_is_refused(script, store, tmp_path, kind, change, said):
    options = {"activation": kind, "steps": 12}
    assert run(script, store, tmp_path / "out", **options).exit_code == 0
    before = files(tmp_path / "out")
    if said is None:
        assert run(script, store, tmp_path / "out", **options | change).exit_code == 0
    else:
        assert said in refusal(script, store, tmp_path / "out", **options | change)
    assert files(tmp_path / "out") == before


def test_a_resume_on_another_store_is_refused(script, store, tmp_path):
    assert run(script, store, tmp_path / "out", steps=8).exit_code == 0
    other = make_store(tmp_path / "acts", [41] * 60, dtype=torch.bfloat16)
    assert "store was" in refusal(script, other, tmp_path / "out", steps=8)


def test_a_damaged_checkpoint_is_said_to_be(script, store, tmp_path):
    out = tmp_path / "out"
    assert run(script, store, out, steps=8).exit_code == 0
    path, chooser = out / "checkpoint.pt", random.Random(0)  # noqa: S311
    good = path.read_bytes()
    flips = [flip(chooser.randrange(len(good))) for _ in range(10)]
    for change in [*flips, lambda data: data[:-1], lambda data: data[:4], lambda _: b"", lambda _: b"PK" * 500]:
        damage(path, change)
        assert "checkpoint.pt is damaged, or not of this script: take another" in refusal(script, store, out, steps=8)
        path.write_bytes(good)


def test_a_log_of_something_else_is_never_cut(script, store, tmp_path):
    out = tmp_path / "out"
    assert run(script, store, out, steps=8).exit_code == 0
    whole = (out / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for other in (
        whole[:-1],
        b"".join(lines[::-1]),
        b"my own notes\n" * 100,
        whole.replace(b'"step": 8', b'"step": 9'),
    ):
        (out / "log.jsonl").write_bytes(other)
        assert "log.jsonl is not the log that checkpoint.pt was made with" in refusal(script, store, out, steps=8)
        assert (out / "log.jsonl").read_bytes() == other


@pytest.mark.parametrize(
    ("behind", "kept"),
    [
        (b'{"step": 9, "loss": 1.0}\n{"step": 10, "loss": 1.0}\n', False),
        (b'{"step": 9, "loss": 1.0}\n{"ste', False),
        (b'{"step": 9, "loss": 1.0}\n{"step": 10, "lo', False),
        (b'{"step": 11, "loss": 1.0}\n', True),
        (b"my own notes\n", True),
        (b"my own notes", True),
        (bytes(100), True),
    ],
)
def test_what_is_behind_the_checkpoint_s_steps_is_kept_unless_it_is_the_run_s(script, store, tmp_path, behind, kept):
    out = tmp_path / "out"
    assert run(script, store, out, steps=8).exit_code == 0
    whole = files(out)
    with (out / "log.jsonl").open("ab") as file:
        file.write(behind)
    assert run(script, store, out, steps=8).exit_code == 0
    aside = out / "log-behind-step-8.jsonl"
    assert aside.exists() == kept
    if kept:
        assert aside.read_bytes() == behind
        aside.unlink()
    assert files(out) == whole


@pytest.mark.parametrize(
    "name", ["log.jsonl", "config.yaml", "evaluation.json", "W_enc_0.safetensors", ".notes.tmp", "a/b", "checkpoint.pt"]
)
def test_nothing_of_others_is_written_over(script, store, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text('{"step": 1}\n')
    before = small_models.identities(tmp_path / "out")
    said = refusal(script, store, tmp_path / "out", steps=1)
    assert name.split("/")[0] in said
    assert "take another --out" in said
    after = small_models.identities(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {"log.jsonl"}


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_log_that_is_a_link_is_not_followed(script, store, tmp_path, make):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").touch()
    make(tmp_path / "mine", tmp_path / "out" / "log.jsonl")
    assert "log.jsonl" in refusal(script, store, tmp_path / "out", steps=1)
    assert (tmp_path / "mine").read_bytes() == b""


def test_one_run_a_folder(script, store, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "log.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing" in refusal(script, store, tmp_path / "out")
    assert run(script, store, tmp_path / "out", steps=1).exit_code == 0


def test_a_store_that_does_not_do_is_refused(script, tmp_path):
    assert "no mmcache store there" in refusal(script, tmp_path / "none", tmp_path / "out")
    other = make_store(tmp_path / "other", [5] * 4, sites=("mlp_in", "resid_post"))
    assert "'mlp_out'" in refusal(script, other, tmp_path / "out")
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "cache") as cache:
        for _ in range(2):
            cache.push(torch.randn(5, 8))
    assert "'mlp_in'" in refusal(script, tmp_path / "cache", tmp_path / "out")
    uneven = make_store(tmp_path / "uneven", [5] * 4, widths=(8, 6))
    assert "mlp_in is 8 wide, and mlp_out 6" in refusal(script, uneven, tmp_path / "out")
    empty = make_store(tmp_path / "empty", [])
    assert refusal(script, empty, tmp_path / "out")
    only_bos = make_store(tmp_path / "bos", [1] * 20)
    assert refusal(script, only_bos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "topk", "k": 25}, "--k is 25: a layer has 24 features"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"device": "toaster"}, "device is 'toaster'"),
        ({"batch_size": 0}, "--batch-size"),
        ({"features": 0}, "--features"),
        ({"lr": -1}, "--lr"),
        ({"epochs": 0}, "--epochs"),
        ({"activation": "gelu"}, "--activation"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(script, store, tmp_path, options, said):
    assert said in refusal(script, store, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused(script, store, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in refusal(script, store, out)
    (tmp_path / "out" / "checkpoint.pt").mkdir(parents=True)
    assert "checkpoint.pt" in refusal(script, store, tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_values_that_are_not_finite_end_it(script, tmp_path):
    store = make_store(tmp_path / "acts")
    with mmcache.create(
        tmp_path / "bad", sites={"mlp_in": WIDTH, "mlp_out": WIDTH}, n_layers=LAYERS, dtype=torch.float32
    ) as writer:
        for at in range(0, 400, 40):
            rows = {site: store[site].gather(range(at, at + 40)).float().transpose(0, 1) for site in store.sites}
            rows["mlp_out"][1, 7, 3] = torch.nan
            writer.append(torch.ones(40, dtype=torch.int32), rows)
    said = refusal(script, mmcache.open(tmp_path / "bad"), tmp_path / "out")
    assert "the loss of step 1 is nan: see `mmcache stats" in said


def test_a_single_sequence_is_trained_on_and_not_measured(script, tmp_path):
    store = make_store(tmp_path / "acts", [400])
    done = run(script, store, tmp_path / "out", steps=8)
    assert done.exit_code == 0
    assert "training on everything, and measuring nothing: the validation part of" in done.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert len(log(tmp_path / "out")) == 8
    assert reconstructed(tmp_path / "out", torch.randn(5, LAYERS, WIDTH).numpy())[0].shape == (5, LAYERS, WIDTH)


def test_as_a_command(store, tmp_path):
    words = [sys.executable, SCRIPT, *command(store, tmp_path / "out", steps=3)]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out tokens: mean explained variance" in " ".join(done.stdout.split())
