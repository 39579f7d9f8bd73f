"""The page's server: who may ask, what comes, and that every number of a panel is the view's."""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import small
import torch
from click.testing import CliRunner

pytest.importorskip("starlette", reason="the page needs mmcache[view]")
pytest.importorskip("plotly", reason="the page needs mmcache[view]")

from broken import extracted, grown
from pages import IMAGE, SCRIPT, ask, hostile_names, hostile_tokens, serving

import mmcache
from mmcache import view as views
from mmcache.cli import main
from mmcache.errors import ArgumentError, StoreNotFoundError
from mmcache.loading import load_model
from mmcache.view.figures import plotly_js
from mmcache.view.page import Page, serve
from mmcache.view.panels import PANELS, Source

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


# Who may ask.


def test_only_the_loopback_address_is_listened_to(page):
    assert page._socket.getsockname()[0] == "127.0.0.1"
    assert re.fullmatch(rf"http://127\.0\.0\.1:{page.port}/\?token=[\w-]{{43}}", page.url)


@pytest.mark.parametrize("where", ["/", "/page.json", "/norms.json", "/plotly.js", "/page.css", "/nothing"])
def test_without_the_token_nothing_comes(page, where):
    for headers in ({}, {"Cookie": f"mmcache-{page.port}=wrong"}, {"Cookie": f"mmcache-1={page.token}"}):
        answer = ask(page, where, token=False, **headers)
        assert answer.status == 403
        assert answer.body == b"refused: open the address that `mmcache view` printed\n"
        assert "set-cookie" not in answer.headers
    for token in ("", "x", page.token[:-1], page.token + "x", "%FF%00", "é"):
        assert ask(page, f"{where}?token={quote(token)}", token=False).status == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(page):
    answer = ask(page, "/?panel=text&query=a%26b%20c")
    assert answer.status == 303
    assert answer.headers["location"] == "/?panel=text&query=a%26b+c"
    cookie = answer.headers["set-cookie"]
    name, value = cookie.split(";")[0].split("=", 1)
    assert (name, value) == (f"mmcache-{page.port}", page.token)
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert ask(page, "/", token=False, Cookie=f"other=1; {name}={value}").status == 200
    assert ask(page, "/norms.json", token=False, Cookie=f"{name}={value}").status == 200


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}", "[::1]:{}"])
def test_our_own_names_are_answered(page, host):
    assert ask(page, "/page.json", Host=host.format(page.port)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example:{}", "evil.example", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{}", "", "::1"]
)
def test_a_name_that_was_pointed_at_us_is_refused(page, host):
    assert ask(page, "/page.json", Host=host.format(page.port)).status in {400, 403}


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{}", ""])
def test_another_origin_is_refused(page, origin):
    assert ask(page, "/page.json", Origin=origin.format(page.port)).status == 403


def test_our_own_origin_is_answered(page):
    assert ask(page, "/page.json", Origin=f"http://127.0.0.1:{page.port}", Sec_Fetch_Site="same-origin").status == 200


def test_requests_that_other_sites_make_are_refused_but_for_a_link_that_is_followed(page):
    for site in ("cross-site", "same-site", "nonsense"):
        assert ask(page, "/page.json", Sec_Fetch_Site=site).status == 403
        assert ask(page, "/page.json", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 403
        assert ask(page, "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
        known = {"Cookie": f"mmcache-{page.port}={page.token}"}
        assert ask(page, "/", token=False, Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", **known).status == 403
    answer = ask(page, '/?panel="><script>', Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")
    assert answer.status == 200
    assert answer.body.count(b"<") == 4
    assert b"url=/?panel=%22%3E%3Cscript%3E" in answer.body
    assert "SameSite=strict" in answer.headers["set-cookie"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_it_only_shows(page, method):
    for where in ("/", "/norms.json", "/page.css"):
        answer = ask(page, where, method=method, Content_Length="0")
        assert answer.status == 405
        assert answer.headers["allow"] == "GET, HEAD"
        assert ask(page, where, method=method, token=False, Content_Length="0").status == 403


@pytest.mark.parametrize(
    "where", ["/", "/page.css", "/page.js", "/norms.json", "/norms.json?bins=0", "/plotly.js", "/no"]
)
def test_every_answer_says_what_may_run(page, where):
    token, cookie = where != "/", f"mmcache-{page.port}={page.token}"
    for answer in (ask(page, where, token=token, Cookie=cookie), ask(page, where, token=False)):
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
            "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == (
            "private, max-age=31536000, immutable" if answer.body[:2] == b"/*" else "no-store"
        )


def test_head_says_what_get_would_and_sends_nothing(page):
    for where in ("/page.css", "/norms.json", "/plotly.js"):
        head, got = ask(page, where, method="HEAD"), ask(page, where)
        assert head.body == b""
        assert head.status == got.status == 200
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize(
    "where",
    ["/../page.py", "/..%2fpage.py", "/static/page.js", "/%2e%2e/panels.py", "//etc/passwd", "/page.py", "/.js"],
)
def test_no_file_but_the_pages_own_comes(page, where):
    assert ask(page, where).status == 404


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
    made = mmcache.extract(model, small.byte_tokenizer(), ["some text " * 9], tmp_path / "acts",
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
        cookie = f"mmcache-{page.port}={page.token}"
        first = ["/", "/page.css", *(f"/{file.name}" for file in Path(views.__file__).parent.glob("static/*.js")),
                 "/overview.json", "/page.json", "/norms.json?figure=1&brief=1&site=mlp_in&bins=3"]  # fmt: skip
        plotly = json.loads(ask(page, "/page.json").body)["plotly"]
        for where in [*first, f"/{plotly}"]:
            answer = ask(page, where, token=False, Cookie=cookie, Accept_Encoding="gzip")
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


def test_the_command_prints_the_address_and_ends_by_ctrl_c(path):
    command = [shutil.which("mmcache", path=Path(sys.executable).parent), "view", str(path), "--no-browser"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = running.stdout.readline().strip()
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", url).groups()
        given = type("Given", (), {"port": int(port), "token": token})
        assert data(given, "/overview.json")["data"]["path"] == str(path)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=20)
    finally:
        running.kill()
        running.communicate()
    assert told == "Press Ctrl-C to end.\n"
    assert running.returncode == 0


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
    monkeypatch.delitem(sys.modules, "mmcache.view.page")
    done = CliRunner().invoke(main, ["view", str(path)])
    assert done.exit_code == 2
    assert "the page needs uvicorn: pip install 'mmcache[view]'" in done.output


def test_the_browser_is_opened_at_the_address_that_is_told(path, monkeypatch):
    told, opened = [], []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(Page, "run", lambda page: page._socket.close())
    serve(path, announce=told.append)
    serve(path, announce=told.append, open_browser=False)
    assert len(told) == 2
    assert opened == told[:1]


def test_a_page_needs_a_store_and_a_port_that_is_one(path, tmp_path):
    with pytest.raises(StoreNotFoundError):
        Source(tmp_path)
    with pytest.raises(ArgumentError, match="port is 70000"):
        Page(Source(path), port=70_000)
