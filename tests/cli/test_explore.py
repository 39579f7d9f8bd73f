"""The commands that look into a store: the views' numbers, on any terminal, whoever wrote what is shown."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from rich.cells import cell_len
from tokenizers import models, pre_tokenizers

import mmcache
import planted_stores
import small_models
from mmcache import view as views
from mmcache.cli import main
from planted_stores import DEAD, NAN, OUTLIER, SITE, STARTS, TOTAL, WIDTH, numbers, unstyled

WIDTHS = (20, 40, 60, 80, 200)
COLOURS = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
# What a terminal is left without: no colours of its own, no way to write elsewhere, nothing that hides.
WORDS = ["\x1b[31mred", "[bold]x[/bold]", "user\u202eexe", "\x07bell", "[/]", ":smile:", "\x9b2J", "a\x1b]0;title\x07b"]
SHOWN = ["␛[31mred", "[bold]x[/bold]", r"user\u202eexe", "␇bell", "[/]", ":smile:", r"\x9b2J", "a␛]0;title␇b"]
VECTOR = np.random.default_rng(8).normal(size=WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("looking")
    planted_stores.planted(path / "acts").close()
    np.save(path / "direction.npy", VECTOR)
    return path


@pytest.fixture(scope="module")
def store(folder):
    return mmcache.open(folder / "acts")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A store whose tokens are what terminals obey."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 -- no password
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")  # noqa: S106
    path = tmp_path_factory.mktemp("hostile") / "acts"
    mmcache.extract(
        small_models.llama(bos_token_id=None), tokenizer, [" ".join(WORDS * 3)] * 3, path, sites=("mlp_in",),
        context_length=24, batch_size=3, shard_tokens=64,
    ).close()  # fmt: skip
    return path


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    """Paths are short here, and have no digits that could be taken for a store's."""
    monkeypatch.chdir(folder)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments, code=0, width=80, env=None):
    result = CliRunner().invoke(main, list(arguments), env={"COLUMNS": str(width)} | (env or {}))
    assert result.exit_code == code, result.output
    return result.stdout


def plain(view):
    """A view as it comes back from JSON."""
    return json.loads(json.dumps(view.to_json() if isinstance(view, views.View) else views.json_ready(view)))


# Every command but `info`, and its exit code.
LOOKS = {
    "info": (["info", "acts"], 0),
    "stats": (["stats", "acts"], 1),
    "stats of chunks": (["stats", "acts", "--start", "100", "--stop", "890"], 1),
    "stats of tokens": (["stats", "acts", "--start", str(NAN - 5), "--stop", str(NAN + 6)], 1),
    "a layer": (["show", "acts", "0"], 0),
    "a row": (["show", "acts", "1", "350"], 0),
    "a row that is not finite": (["show", "acts", "0", str(NAN)], 0),
    "every layer": (["show", "acts", "1", str(NAN), "--every-layer"], 0),
    "a sequence": (["show", "acts", "0", "--sequence", "3"], 0),
    "a sequence by a value": (["show", "acts", "1", "--sequence", "3", "--dimension", "2"], 0),
    "a sequence by differences": (["show", "acts", "1", "--sequence", "3", "--by", "difference"], 0),
    "top": (["top", "acts", "1", str(OUTLIER)], 0),
    "top by a direction": (["top", "acts", "1", "--direction", "direction.npy"], 0),
    "find": (["find", "acts", "--token", "11"], 0),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("env", [{}, COLOURS], ids=["pipe", "colours"])
def test_every_line_fits_and_no_number_is_cut(look, width, env):
    arguments, code = LOOKS[look]
    found = unstyled(run(*arguments, code=code, width=width, env=env))
    assert max(map(cell_len, found.split("\n"))) <= width
    # Passages are cut where the terminal ends, and say so.
    lines = [line for line in found.splitlines() if "⟨" not in line]
    whole = numbers(unstyled(run(*arguments, code=code, width=200, env=env)).replace("«", " "))
    # Layers and stretches of a map are as many as there is room for.
    room = {"2", "3"} if look == "stats of tokens" else set()
    assert numbers("\n".join(lines)) <= whole | room


@pytest.mark.parametrize("look", LOOKS)
def test_a_pipe_gets_no_escape_codes_and_a_terminal_only_colours(look):
    arguments, code = LOOKS[look]
    assert "\x1b" not in run(*arguments, code=code)
    shown = run(*arguments, code=code, env=COLOURS)
    assert "\x1b[" in shown
    assert "\x1b" not in unstyled(shown)


@pytest.mark.parametrize("look", LOOKS)
def test_no_color_is_respected(look):
    arguments, code = LOOKS[look]
    shown = run(*arguments, code=code, env=COLOURS | {"NO_COLOR": "1"})
    codes = {part for found in re.findall(r"\x1b\[([0-9;]*)m", shown) for part in found.split(";")}
    # Bold, dim, italic, underlined and reversed are no colours.
    assert codes <= {"", "0", "1", "2", "3", "4", "7"}


def test_a_real_terminal_has_colours(folder):
    command = [sys.executable, "-m", "mmcache", "show", "acts", "1", "--sequence", "3"]
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "50"}
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env, cwd=folder) as process:
            os.close(theirs)
            parts = []
            try:
                while part := os.read(ours, 1 << 16):
                    parts.append(part)
            except OSError:  # that is how the other end is told to be closed
                pass
        assert process.returncode == 0
    finally:
        os.close(ours)
    shown = b"".join(parts).decode().replace("\r\n", "\n")
    assert re.search(r"\x1b\[[0-9;]*48;2;\d+;\d+;\d+m", shown)
    assert max(map(cell_len, unstyled(shown).split("\n"))) <= 50
    assert f"document {len(STARTS) - 1}" in unstyled(shown)


def test_json_is_the_views(store):
    wanted = {
        "info": views.overview("acts"),
        "a layer": [views.layer_view(store, SITE, 0)],
        "every layer": views.token(store, SITE, NAN),
        "a sequence": views.sequence(store, SITE, 0, 3),
        "a sequence by a value": views.sequence(store, SITE, 1, 3, by="value", direction=2),
        "a sequence by differences": views.sequence(store, SITE, 1, 3, by="difference"),
        "top": views.top(store, SITE, 1, OUTLIER),
        "top by a direction": views.top(store, SITE, 1, VECTOR),
        "find": views.find(store, token=11),
    }
    for look, view in wanted.items():
        arguments, code = LOOKS[look]
        assert json.loads(run(*arguments, "--json", code=code)) == plain(view), look


def test_the_json_of_statistics_has_every_view_of_a_site(store):
    found = json.loads(run("stats", "acts", "--json", code=1))[0]
    for view in (
        views.norms(store, SITE),
        views.health(store, SITE),
        views.apart(store, SITE),
        views.dimensions(store, SITE),
    ):
        assert found.pop(view.name) == plain(view)
    assert found == plain(views.statistics_view(store, SITE))
    part = json.loads(run("stats", "acts", "--start", "100", "--stop", "200", "--json", code=1))[0]
    assert part["norms"] == plain(views.norms(store, SITE, start=100, stop=200))


def test_a_row_comes_with_its_text(store):
    found = json.loads(run("show", "acts", "1", "350", "--json", "--context", "2"))[0]
    assert found["text"] == f"⟨{planted_stores.tokens()[350]}⟩"
    assert found["before"] == "".join(f"⟨{one}⟩" for one in planted_stores.tokens()[348:350])
    assert {name: found[name] for name in views.row_view(store, SITE, 1, 350)} == plain(
        views.row_view(store, SITE, 1, 350)
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_all_that_was_planted_is_pointed_out(width):
    found = " ".join(run("stats", "acts", code=1, width=width).split())
    assert f"layer 0: 2 rows with NaN or infinity, the first at position {NAN}" in found
    assert "layer 1: 1 rows of zeros" in found
    assert f"layer 2: 1 dimensions are the same in every row: {DEAD}" in found
    here = planted_stores.stored()[1][planted_stores.counted()[1]]
    rms = np.sqrt(np.square(here).mean(axis=0))
    assert f"[{OUTLIER}] {rms[OUTLIER] / np.median(rms):.1f}x" in found
    first = np.linalg.norm(planted_stores.stored()[0, STARTS], axis=-1)
    assert f"{first.mean():.4g}" in found
    assert f"{first.max():.4g}" in found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("env", [{}, COLOURS], ids=["pipe", "colours"])
def test_text_of_a_stranger_is_shown_and_not_obeyed(hostile, width, env):
    for arguments in (
        ["show", str(hostile), "1", "--sequence", "0"],
        ["show", str(hostile), "1", "5"],
        ["show", str(hostile), "1", "5", "--every-layer"],
        ["top", str(hostile), "1", "3", "-k", "2"],
        ["find", str(hostile), "red", "--limit", "2"],
        ["stats", str(hostile), "--start", "0", "--stop", "20"],
    ):
        found = unstyled(run(*arguments, width=width, env=env))
        assert all(letter.isprintable() or letter == "\n" for letter in found), arguments
        assert max(map(cell_len, found.split("\n"))) <= width
    if width == 200:
        shown = unstyled(run("show", str(hostile), "1", "--sequence", "0", width=width, env=env))
        for word in SHOWN:
            assert shown.count(word) >= 3, word


def test_json_of_a_strangers_text_has_nothing_that_is_obeyed(hostile):
    found = run("show", str(hostile), "1", "--sequence", "0", "--json")
    assert all(letter.isprintable() or letter == "\n" for letter in found)
    assert {text.strip() for text in json.loads(found)["data"]["texts"]} == set(WORDS)


def test_a_text_is_found_with_its_escapes(hostile):
    store = mmcache.open(hostile)
    found = run("find", str(hostile), "\x1b[31mred", width=200)
    assert f"{views.find(store, chr(27) + '[31mred')['count']} times in 3 sequences" in found
    assert "« ␛[31mred»" in found
    assert "\x1b" not in found


def test_what_is_not_there_is_a_finding():
    assert "0 times in 0 sequences" in run("find", "acts", "--token", "999", code=1)
    assert json.loads(run("find", "acts", "--token", "999", "--json", code=1))["data"]["matches"] == []
    assert f"0 of {TOTAL} tokens" in run("find", "acts", "--token", "11", "--start", str(TOTAL + 1), code=1)


def test_all_are_counted_and_some_are_listed():
    count = int((planted_stores.tokens() == 11).sum())
    shown = run("find", "acts", "--token", "11", "--limit", "0")
    assert f"{count} times" in shown
    assert f"and {count} more: raise --limit to list them" in shown
    part = json.loads(run("find", "acts", "--token", "11", "--start", "100", "--tokens", "300", "--json"))["data"]
    assert part["count"] == (planted_stores.tokens()[100:400] == 11).sum()


def test_a_site_that_is_well_is_no_finding(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 16}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(torch.arange(50), {"a": torch.randn(1, 50, 16)})
    assert "nothing is wrong" in run("stats", str(tmp_path / "acts"))


def test_of_several_sites_one_has_to_be_named_where_one_is_shown(tmp_path):
    path = str(tmp_path / "acts")
    with mmcache.create(path, sites={"a": 16, "b": 16}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(torch.arange(50), {"a": torch.randn(1, 50, 16), "b": torch.randn(1, 50, 16)})
    for arguments in (["top", path, "0", "1"], ["show", path, "0", "--sequence", "0"]):
        failed = CliRunner().invoke(main, arguments)
        assert failed.exit_code == 2
        assert "choose one with --site (a, b)" in failed.stderr
        run(*arguments, "--site", "b")
    assert [one["site"] for one in json.loads(run("show", path, "0", "--json"))] == ["a", "b"]
    assert [one["site"] for one in json.loads(run("stats", path, "--json"))] == ["a", "b"]
    assert [one["site"] for one in json.loads(run("stats", path, "--site", "b", "--json"))] == ["b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top", "acts", "1"], "exactly one of them"),
        (["top", "acts", "1", "2", "--direction", "direction.npy"], "exactly one of them"),
        (["top", "acts", "1", "--direction", "acts"], "is no direction"),
        (["top", "acts", "1", "99"], "dimension 99 not in resid_post (d_model=16)"),
        (["top", "acts", "9", "0"], "layer 9"),
        (["top", "acts", "1", "0", "-k", "0"], "k is 0"),
        (["top", "acts", "1", "0", "--site", "mlp_on"], "mlp_on"),
        (["find", "acts"], "exactly one of them"),
        (["find", "acts", "a", "--token", "3"], "exactly one of them"),
        (["find", "acts", "text"], "keeps no tokenizer"),
        (["find", "acts", "--token", "3", "--start", "-1"], "-1 is not in the range"),
        (["show", "acts", "1", "2", "--sequence", "0"], "one of them"),
        (["show", "acts", "1", "--every-layer"], "POSITION is missing"),
        (["show", "acts", "1", "2", "--dimension", "3"], "--sequence is missing"),
        (["show", "acts", "1", "--start", "3"], "--start is about a sequence's text"),
        (["show", "acts", "1", "--sequence", "0", "--by", "value"], "--by value is the value of"),
        (["show", "acts", "1", "--sequence", "0", "--by", "norm", "--dimension", "2"], "--by value is the value of"),
        (["show", "acts", "1", "--sequence", "0", "--dimension", "2", "--direction", "direction.npy"], "one of them"),
        (["show", "acts", "0", "--sequence", "0", "--by", "difference"], "layer 0 is the first"),
        (["show", "acts", "1", "--sequence", "9"], "sequence 9"),
        (["show", "acts", "1", "--sequence", "0", "--start", "999"], "token 999 not in sequence 0"),
        (["show", "acts", "7", "3", "--every-layer"], "layer 7"),
        (["stats", "acts", "--start", "5", "--stop", "5"], "positions 5 to 5 are not in"),
    ],
)
def test_what_was_asked_wrongly_is_told_in_words(arguments, said):
    failed = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert failed.exit_code == 2, failed.output
    assert said in failed.stderr
    assert failed.stdout == ""


def test_directions_come_from_either_kind_of_file(tmp_path, store):
    safetensors.torch.save_file({"direction": torch.from_numpy(VECTOR)}, tmp_path / "v.safetensors")
    for file in ("direction.npy", str(tmp_path / "v.safetensors")):
        found = json.loads(run("show", "acts", "2", "--sequence", "3", "--direction", file, "--json"))
        assert found == plain(views.sequence(store, SITE, 2, 3, by="value", direction=VECTOR))
