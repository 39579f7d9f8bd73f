"""The page's server: what comes, that every number of a panel is the view's, and how the command begins and ends."""

import contextlib
import functools
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import small_models

pytest.importorskip("starlette", reason="the page needs mmcache[view]")
pytest.importorskip("plotly", reason="the page needs mmcache[view]")

import mmcache
from damaged_stores import extracted, grown
from mmcache import view as views
from mmcache.cli import main
from mmcache.errors import ArgumentError, StoreNotFoundError
from mmcache.models.loading import load_model
from mmcache.view import server as page_module
from mmcache.view.figures import plotly_js
from mmcache.view.panels import PANELS, Source
from mmcache.view.server import Page, serve
from page_requests import IMAGE, SCRIPT, ask, hostile_names, hostile_tokens, serving

DIRECTION = np.random.default_rng(0).normal(size=32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    extracted(folder / "acts", sites=("mlp_in", "resid_post"))
    np.save(folder / "direction.npy", DIRECTION)
    return folder / "acts"


@pytest.fixture(scope="module")
def page(path):
    with serving(Source(path, path.parent / "direction.npy")) as page:
        yield page


@pytest.fixture(scope="module")
def store(path):
    return mmcache.open(path)


def data(page, where):
    answer = ask(page, where)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    return json.loads(answer.body)


# What comes.

PANEL_CASES = {
    "health.json?site=mlp_in": lambda s: views.health(s, "mlp_in"),
    "health.json": lambda s: views.health(s, "mlp_in"),
    "norms.json?site=resid_post&bins=3": lambda s: views.norms(s, "resid_post", bins=3),
    "norms.json?start=10&stop=30": lambda s: views.norms(s, "mlp_in", start=10, stop=30),
    "apart.json?site=resid_post": lambda s: views.apart(s, "resid_post"),
    "dimensions.json?most=3": lambda s: views.dimensions(s, "mlp_in", most=3),
    "dimension.json?layer=2&dimension=5": lambda s: views.dimension(s, "mlp_in", 2, 5),
    "sequence.json?sequence=2": lambda s: views.sequence(s, "mlp_in", 0, 2),
    "sequence.json?sequence=-1&layer=1&by=dimension&dimension=3": (
        lambda s: views.sequence(s, "mlp_in", 1, -1, by="value", direction=3)
    ),
    "sequence.json?by=direction&start=4": (
        lambda s: views.sequence(s, "mlp_in", 0, 0, by="value", direction=DIRECTION, start=4)
    ),
    "sequence.json?by=difference&layer=2": lambda s: views.sequence(s, "mlp_in", 2, 0, by="difference"),
    "token.json?position=20&context=3": lambda s: views.token(s, "mlp_in", 20, context=3),
    "token.json?position=-1&site=resid_post": lambda s: views.token(s, "resid_post", -1),
    "top.json?layer=1&dimension=7&k=2": lambda s: views.top(s, "mlp_in", 1, 7, k=2),
    "top.json": lambda s: views.top(s, "mlp_in", 0, DIRECTION),
    "find.json?text=and%20so": lambda s: views.find(s, "and so"),
    "find.json?id=97&most=1&start=5": lambda s: views.find(s, token=97, most=1, start=5),
}


@pytest.mark.parametrize("where", PANEL_CASES)
def test_a_panels_data_are_the_views(page, store, where):
    view = PANEL_CASES[where](store)
    expected = json.loads(json.dumps(view.to_json(), allow_nan=False))
    found = data(page, f"/{where}")
    made = eval(found["python"], {"mmcache": mmcache, "store": store, "direction": DIRECTION})  # noqa: S307 -- ours
    assert json.loads(json.dumps(made.to_json()["data"])) == found["data"]
    # The page's says more: all that was asked for.
    assert found["python"].startswith(expected["python"].removesuffix(")"))
    expected["python"] = found["python"]
    assert found == expected
    drawn = data(page, f"/{where}{'&' if '?' in where else '?'}figure=1&dark=1")
    figure = drawn.pop("figure")
    assert drawn == expected
    assert figure == json.loads(view.figure(dark=True).to_json())
    brief = data(page, f"/{where}{'&' if '?' in where else '?'}brief=1")
    tables = {name for name, value in view.data.items() if isinstance(value, np.ndarray) and value.ndim > 1}
    assert brief["data"] == {name: value for name, value in expected["data"].items() if name not in tables}


def test_every_panel_is_compared():
    assert {where.partition(".")[0] for where in PANEL_CASES} == set(PANELS) - {"overview", "lens"}


def test_the_overview_is_the_commands(page, path):
    assert data(page, "/overview.json")["data"] == json.loads(json.dumps(views.overview(path)))


def test_the_lens_is_there_where_a_model_was_given(path, tmp_path):
    model = load_model("demo", None)
    made = mmcache.extract(model, small_models.byte_tokenizer(), ["some text " * 9], tmp_path / "acts",
                           sites=("resid_post",), shard_tokens=4096)  # fmt: skip
    expected = views.lens(made, "resid_post", 5, views.Unembedding.of(model), k=3)
    with serving(Source(tmp_path / "acts", unembedding="demo")) as page:
        found = data(page, "/lens.json?position=5&k=3")
        assert found.pop("python") == "mmcache.view.lens(store, 'resid_post', 5, unembedding, k=3)"
        assert found.items() <= json.loads(json.dumps(expected.to_json())).items()
        about = data(page, "/page.json")
        assert about["lens"]
        assert "unembedding = mmcache.view.Unembedding.load('demo')" in about["python"]
        ask(page, "/lens.json?position=5&k=300")
    with serving(Source(path)) as page:
        assert ask(page, "/lens.json").status == 400
        assert not data(page, "/page.json")["lens"]


def test_what_the_page_is_told_at_first(page, store):
    about = data(page, "/page.json")
    assert about["layers"] == [0, 1, 2]
    assert about["n_tokens"] == store.n_tokens
    assert about["direction"]
    names = {}
    exec(about["python"], names)  # noqa: S102 -- it is for people to run
    assert names["store"].n_tokens == store.n_tokens
    np.testing.assert_array_equal(names["direction"], DIRECTION)
    for where in ("/top.json", "/norms.json?start=3&stop=9", "/sequence.json?by=direction", "/overview.json"):
        told = data(page, where)
        made = eval(told["python"], names)  # noqa: S307 -- as above
        ready = made if isinstance(made, dict) else made.to_json()["data"]
        assert json.loads(json.dumps(ready)) == told["data"]
    for site, facts in about["sites"].items():
        assert facts["d_model"] == 32
        room = facts["map_tokens"]
        assert views.norms(store, site, stop=min(room, store.n_tokens))["level"] == "tokens"


def test_tokens_are_shown_one_by_one_where_the_page_says_so(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"wide": 16384}, n_layers=3, dtype=torch.float32) as writer:
        rows = torch.ones(3, 200, 16384)
        writer.append(torch.arange(200), {"wide": rows})
    with serving(Source(tmp_path / "acts")) as page:
        room = data(page, "/page.json")["sites"]["wide"]["map_tokens"]
        assert 1 < room < 200
        assert data(page, f"/norms.json?start=0&stop={room}&brief=1")["data"]["level"] == "tokens"
        assert data(page, f"/norms.json?start=0&stop={room + 1}&brief=1")["data"]["level"] == "chunks"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("norms.json?bins=0", "bins is '0': expected a whole number from 1 to 2000"),
        ("norms.json?bins=10000", "bins is '10000'"),
        ("norms.json?start=x", "start is 'x': expected a whole number"),
        ("norms.json?start=1_0", "start is '1_0'"),
        ("norms.json?start=%D9%A3", "expected a whole number"),
        ("norms.json?start=" + "9" * 30, "expected a whole number"),
        ("norms.json?start=5&stop=2", "positions 5 to 2 are not in mlp_in"),
        ("norms.json?site=nothing", "site 'nothing' not in"),
        ("norms.json?site=..", "site '..' not in"),
        ("norms.json?start=1&start=2", "start is given twice"),
        ("norms.json?nothing=1", "no parameter 'nothing' here: there are site, start, stop, bins"),
        ("norms.json?figure=2", "figure is '2': expected 0 or 1"),
        ("health.json?layer=1", "no parameter 'layer' here"),
        ("dimension.json?dimension=32", "dimension 32 not in mlp_in"),
        ("dimension.json?layer=9", "layer 9"),
        ("sequence.json?by=nothing", "by is 'nothing': expected one of norm, dimension, direction, difference"),
        ("sequence.json?by=dimension", "needs dimension"),
        ("sequence.json?by=difference", "the first that is stored"),
        ("sequence.json?sequence=900", "sequence 900 not in store"),
        ("token.json?position=100000", "position 100000 not in store"),
        ("find.json", "exactly one of them"),
        ("find.json?text=a&id=1", "exactly one of them"),
        ("top.json?k=0", "k is '0'"),
        ("lens.json", "--unembedding"),
        ("overview.json?figure=1", "has no figure"),
    ],
)
def test_bad_parameters_are_told(page, where, said):
    answer = ask(page, f"/{where}")
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert said in json.loads(answer.body)["error"]


def test_an_unknown_panel_is_not_there(page):
    answer = ask(page, "/nothing.json")
    assert answer.status == 404
    assert "no such panel" in json.loads(answer.body)["error"]


def test_what_fails_inside_is_not_shown(page, monkeypatch):
    def broken(*_):
        raise RuntimeError("a secret of the machine's")

    monkeypatch.setitem(PANELS, "health", type(PANELS["health"])(broken, PANELS["health"].parameters))
    answer = ask(page, "/health.json")
    assert answer.status == 500
    assert json.loads(answer.body) == {"error": "this failed inside mmcache: the terminal says how"}
    assert answer.headers["content-security-policy"]
    assert ask(page, "/norms.json").status == 200


def test_without_a_direction_the_page_says_how_to_give_one(path):
    with serving(Source(path)) as page:
        for where in ("/top.json", "/sequence.json?by=direction"):
            answer = ask(page, where)
            assert answer.status == 400
            assert "--direction" in json.loads(answer.body)["error"]


def test_a_store_of_which_shards_are_missing_is_shown(tmp_path):
    extracted(tmp_path / "acts")
    gone = sorted((tmp_path / "acts/mlp_in").glob("c.*"))[1]
    gone.unlink()
    with serving(Source(tmp_path / "acts")) as page:
        assert not data(page, "/overview.json")["data"]["complete"]
        assert "NaN" in str(data(page, "/norms.json?bins=100")["data"]["mean"])
        answer = ask(page, "/token.json?position=70")
        assert answer.status == 400
        assert "mlp_in" in json.loads(answer.body)["error"]


def test_a_store_without_a_tokenizer_and_a_cache_without_rows_are_shown(tmp_path):
    grown(tmp_path / "grown")
    with serving(Source(tmp_path / "grown")) as page:
        assert data(page, "/sequence.json")["data"]["texts"][0].startswith("⟨")
    mmcache.FullActivationCache.with_capacity(3, tmp_path / "empty").close()
    with serving(Source(tmp_path / "empty")) as page:
        assert data(page, "/overview.json")["data"]["n_tokens"] == 0
        assert data(page, "/page.json")["sites"] == {"resid_post": {"d_model": 0, "chunk_tokens": 0, "map_tokens": 0}}
        assert ask(page, "/norms.json").status == 400


# How much of it comes.


def test_the_first_sight_is_small_and_needs_no_row_and_no_tokenizer(store, monkeypatch):
    def never(*_, **__):
        pytest.fail("rows, or the tokenizer, were read")

    for kind, name in ((mmcache.SiteView, "gather"), (mmcache.Store, "tokenizer_json"), (mmcache.Store, "read_tokens")):
        monkeypatch.setattr(kind, name, never)
    fresh = Source(store.path)
    with serving(fresh) as page:
        wire = 0
        first = ["/", "/page.css", *(f"/{file.name}" for file in Path(views.__file__).parent.glob("static/*.js")),
                 "/overview.json", "/page.json", "/norms.json?figure=1&brief=1&site=mlp_in&bins=3"]  # fmt: skip
        plotly = json.loads(ask(page, "/page.json").body)["plotly"]
        for where in [*first, f"/{plotly}"]:
            answer = ask(page, where, Accept_Encoding="gzip")
            assert answer.status == 200, where
            assert len(answer.body) < 500 or answer.headers["content-encoding"] == "gzip"
            wire += len(answer.body)
        assert 1_000_000 < wire < 2_000_000


def test_plotly_is_packed_once_and_may_be_kept(page):
    packed = ask(page, "/plotly.js", Accept_Encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plotly_js()[1]
    assert "immutable" in packed.headers["cache-control"]
    plain = ask(page, "/plotly.js")
    assert plain.body == plotly_js()[1]


def test_data_are_packed(page):
    packed, plain = ask(page, "/dimensions.json", Accept_Encoding="gzip"), ask(page, "/dimensions.json")
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body) / 2


def test_nothing_of_the_page_is_from_elsewhere():
    for file in Path(views.__file__).parent.glob("static/*"):
        text = file.read_text()
        assert "://" not in text, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), (
            file.name
        )


# Strangers' stores.


def test_names_and_metadata_of_a_strangers_store_come_as_data(tmp_path):
    hostile_names(tmp_path / "acts")
    with serving(Source(tmp_path / "acts")) as page:
        assert data(page, "/overview.json")["data"]["metadata"]["note"] == SCRIPT
        told = data(page, f"/norms.json?site={quote(IMAGE)}&figure=1")
        assert told["data"]["site"] == IMAGE
        assert "<" not in told["figure"]["layout"]["title"]["text"]
        answer = ask(page, f"/norms.json?site={quote(SCRIPT)}")
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"


def test_tokens_of_a_strangers_store_come_as_data(tmp_path):
    hostile_tokens(tmp_path / "acts")
    with serving(Source(tmp_path / "acts")) as page:
        told = data(page, "/norms.json?stop=24&figure=1")
        assert SCRIPT in "".join(told["data"]["texts"])
        assert "<script" not in json.dumps(told["figure"])


# The command.


@contextlib.contextmanager
def command(path, *options, **environment):
    """The command, running; ended for good at last."""
    name = shutil.which("mmcache", path=Path(sys.executable).parent)
    running = subprocess.Popen(
        [name, "view", str(path), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def given(root, secret):
    """Another process's page, as `ask` needs it."""
    return SimpleNamespace(port=int(root.rpartition(":")[2].strip("/")), access=SimpleNamespace(secret=secret))


def test_the_command_prints_an_address_and_the_next_one_when_it_was_used(path):
    with command(path, "--no-browser") as running:
        root, token = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)#token=(\S+)\n", running.stdout.readline()).groups()
        answer = ask(given(root, token), "/session", method="POST")
        secret = json.loads(answer.body)["secret"]
        assert data(given(root, secret), "/overview.json")["data"]["path"] == str(path)
        again, other = re.fullmatch(r"(\S+)#token=(\S+)\n", running.stdout.readline()).groups()
        assert again == root
        assert other not in {token, secret}
        # Nobody reads the terminal any more: those who look at the page go on.
        running.stdout.close()
        assert json.loads(ask(given(root, other), "/session", method="POST").body) == {"secret": secret}
        assert data(given(root, secret), "/overview.json")["data"]["path"] == str(path)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
        assert running.stderr.read() == "Press Ctrl-C to end.\n"


def test_scripts_get_the_secret_as_json_and_a_signal_ends_it_whatever_is_open(path):
    with command(path, "--no-browser", "--json") as running, contextlib.ExitStack() as stack:
        told = json.loads(running.stdout.readline())
        root, _, token = told["url"].partition("#token=")
        page = given(root, told["token"])
        assert data(page, "/overview.json")["data"]["path"] == str(path)
        assert ask(given(root, token), "/session", method="POST").status == 200
        assert json.loads(running.stdout.readline())["token"] == told["token"]
        head = f"GET /top.json?k=200&context=200 HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n"
        asked = f"{head}Authorization: Bearer {told['token']}\r\n\r\n"
        # Idle, half sent, being computed.
        for said in ("", head, *[asked] * 8):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", page.port), 20))
            one.sendall(said.encode())
        began = time.monotonic()
        for _ in range(2):
            running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        assert time.monotonic() - began < 20
        assert running.stderr.read() == "Press Ctrl-C to end.\n"


def test_no_token_is_in_an_argument_list_and_the_file_that_opens_the_browser_is_removed(path, tmp_path):
    browser = tmp_path / "browser"
    # It never loads what it is given.
    browser.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given.part; mv {tmp_path}/given.part {tmp_path}/given\n')
    browser.chmod(0o755)
    private = tmp_path / "private"
    private.mkdir()
    with command(path, BROWSER=str(browser), XDG_RUNTIME_DIR=str(private)) as running:
        printed = running.stdout.readline().partition("token=")[2].strip()
        while not (tmp_path / "given").exists():
            time.sleep(0.02)
        opened = (tmp_path / "given").read_text().strip()
        assert opened.startswith("file://")
        file = Path(url2pathname(urlsplit(opened).path))
        assert file.parent.parent == private
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        root, token = re.search(r"(http://127\.0\.0\.1:\d+/)#token=([\w-]+)", file.read_text()).groups()
        assert token != printed
        listed = [Path(f"/proc/{running.pid}/cmdline").read_text(), opened]
        assert not [said for said in listed if token in said or printed in said]
        assert ask(given(root, token), "/session", method="POST").status == 200
        assert list(private.iterdir()) == []


class _EndedError(BaseException):
    """Instead of the end of the process."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", ["panels.open_store", "server._listening", "open_browser.webbrowser.open", "server.Page.run"]
)
def test_a_signal_ends_it_without_a_word_while_it_starts(path, tmp_path, monkeypatch, number, moment):
    ended = []

    def end(status):
        ended.append((status, list(tmp_path.iterdir())))
        raise _EndedError

    def signalled(*_, **__):
        seen.append(list(tmp_path.iterdir()))
        os.kill(os.getpid(), number)
        time.sleep(20)

    def listening(port):
        made.append(before_listening(port))
        return made[-1]

    seen, made, before_listening = [], [], page_module._listening
    monkeypatch.setattr(page_module, "_listening", listening)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("os._exit", end)
    for place in ("webbrowser.open", "mmcache.view.server.Page.run"):
        monkeypatch.setattr(place, lambda _: time.sleep(20))
    monkeypatch.setattr(f"mmcache.view.{moment}", signalled)
    before = signal.getsignal(number)
    with pytest.raises(_EndedError):
        main(["view", str(path)])
    for listener in made:
        listener.close()
    assert ended == [(0, [])]
    assert signal.getsignal(number) is before
    assert bool(seen[0]) is (moment in {"open_browser.webbrowser.open", "server.Page.run"})


def test_where_no_browser_can_be_opened_the_address_is_enough(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Page, "run", lambda page: page._socket.close())
    tell = functools.partial(print, file=sys.stderr)

    def failing(_url):
        raise webbrowser.Error

    for found in (lambda _: False, failing):
        monkeypatch.setattr("webbrowser.open", found)
        with contextlib.ExitStack() as tidy:
            serve(path, tidy=tidy, announce=print, tell=tell)
            said = capsys.readouterr()
            while said.err.count("\n") < 2:
                time.sleep(0.02)
                said = SimpleNamespace(out=said.out, err=said.err + capsys.readouterr().err)
        assert said.err.endswith("no browser can be opened here: open the address yourself, or say --no-browser\n")
        assert "#token=" in said.out
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(
        "mmcache.view.open_browser._redirect", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with contextlib.ExitStack() as tidy:
        serve(path, tidy=tidy, announce=print, tell=tell)
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_told(page, path):
    done = CliRunner().invoke(main, ["view", str(path), "--no-browser", "--port", str(page.port)])
    assert done.exit_code == 2
    assert f"port {page.port} cannot be used (Address already in use)" in done.output


def test_what_the_command_cannot_read_is_told(path, tmp_path):
    for arguments in ([str(tmp_path)], [str(path), "--direction", str(path / "zarr.json")]):
        done = CliRunner().invoke(main, ["view", "--no-browser", *arguments])
        assert done.exit_code == 2
        assert done.output.startswith("mmcache: ")


def test_what_is_missing_is_told(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mmcache.view.server")
    done = CliRunner().invoke(main, ["view", str(path)])
    assert done.exit_code == 2
    assert "the page needs uvicorn: pip install 'mmcache[view]'" in done.output


def test_a_page_needs_a_store_and_a_port_that_is_one(path, tmp_path):
    with pytest.raises(StoreNotFoundError):
        Source(tmp_path)
    with pytest.raises(ArgumentError, match="port is 70000"):
        Page(Source(path), port=70_000)
