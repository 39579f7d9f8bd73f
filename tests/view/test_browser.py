"""The page in a real browser: each panel draws, zooms, says what numpy says, and runs nothing of a stranger's."""

import contextlib
import http.server
import json
import queue
import struct
import sys
import threading
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qsl

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page needs mmcache[view]")
pytest.importorskip("plotly", reason="the page needs mmcache[view]")

import mmcache
from browser_pages import PLOT, Tab, browsing, contrast, number, screenshots
from mmcache.view.open_browser import open_browser
from mmcache.view.panels import Source
from page_requests import IMAGE, SCRIPT, ask, demo_store, hostile_names, hostile_tokens, serving

LAYER, DIMENSION = 2, 17
VIEWS = {
    "overview": "",
    "health": "?panel=health",
    "norms": "?panel=norms",
    "norms of tokens": "?panel=norms&start=1000&stop=1100",
    "dimensions": "?panel=dimensions&site=resid_post",
    "one dimension": "?panel=dimensions&layer=2&dimension=17",
    "text": "?panel=text&sequence=1",
    "one token": "?panel=text&position=1000&layer=2",
    "text by a dimension": "?panel=text&sequence=2&by=dimension&dimension=17&layer=2",
    "top": "?panel=top&dimension=17&layer=2",
    "top of a direction": "?panel=top&by=direction&layer=1&k=3",
    "search": "?panel=search&text=self",
    "search for an id": "?panel=search&id=256",
    "lens": "?panel=lens&position=1000&site=resid_post",
}


@pytest.fixture(scope="module")
def browser():
    with browsing() as started:
        yield started


@pytest.fixture(scope="module")
def store(browser, tmp_path_factory):  # noqa: ARG001 -- nothing is made where nothing looks
    folder = tmp_path_factory.mktemp("browser")
    made = demo_store(folder / "acts", max_tokens=12_000, shard_tokens=1024)
    np.save(folder / "direction.npy", np.random.default_rng(0).normal(size=128))
    return made


@pytest.fixture(scope="module")
def served(store):
    with serving(Source(store.path, store.path.parent / "direction.npy", "demo")) as page:
        yield page


@pytest.fixture(scope="module")
def context(browser):
    return browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")


@pytest.fixture
def tab(context, served):
    tab = Tab(context, served)
    yield tab
    tab.close()


def rows_of(store, site, layer):
    """All rows of a layer in float64, and which of them count."""
    return store[site].get_layer(layer).double().numpy(), (store.flags.numpy() & 7) == 0


# Drawn.


@pytest.mark.parametrize("name", VIEWS)
def test_each_panel_draws_in_every_window_light_and_dark(tab, tmp_path, name):
    looks, shown = {}, set()
    for width, first, then in ((1280, "light", "dark"), (400, "dark", "light")):
        tab.sheet.set_viewport_size({"width": width, "height": 800})
        (tab.open if width == 1280 else tab.show)(VIEWS[name])
        for scheme in (first, then):
            if scheme == then:
                tab.recolour(then)
            assert tab.texts("[role=alert]") == []
            assert tab.texts("main h2")
            assert tab.texts(".waiting") == []
            assert not tab.overflows()
            figures = tab.sheet.locator(".figure").all()
            assert all(figure.locator("svg.main-svg").count() for figure in figures)
            tab.keep(tmp_path, f"{name} {width} {scheme}")
            looks[scheme] = tab.sheet.evaluate(LOOKS)
            shown.add((width, *tab.texts("#panel")))
    assert len(shown) == 2
    assert not set(looks["light"]["papers"]) & set(looks["dark"]["papers"])
    for said, ink, paper in [*looks["light"]["texts"], *looks["dark"]["texts"]]:
        assert contrast(ink, paper) >= 4.5, (said, ink, paper)


# What is behind the page, its frames and figures; and of some texts their colour, and what is behind them.
LOOKS = """(() => {
    const styled = (selector) => [...document.querySelectorAll(selector)].map((one) => [one, getComputedStyle(one)]);
    const behind = (one) => {
        for (let at = one; at; at = at.parentElement) {
            const found = getComputedStyle(at).backgroundColor;
            if (!found.startsWith("rgba") && found !== "transparent") return found;
        }
        return "rgb(255, 255, 255)";
    };
    const papers = styled("body, .frame:not(.hint), .figure .main-svg:first-child")
        .map(([, style]) => style.backgroundColor).filter((colour) => !colour.startsWith("rgba"));
    const texts = styled("h1, h2, h3, nav button, label, p.note, dt, dd, th, td, a, .link, .context, .token")
        .map(([one, style]) => [one.textContent.slice(0, 40), style.color, behind(one)]);
    return { papers, texts };
})()"""


def test_the_views_above_are_every_panel(tab):
    tab.open()
    tabs = tab.sheet.locator("[role=tab]").evaluate_all("tabs => tabs.map(tab => tab.dataset.panel)")
    assert tabs == list(dict.fromkeys(dict(parse_qsl(query[1:])).get("panel", "overview") for query in VIEWS.values()))


def test_an_address_opens_the_page_once_and_its_token_goes_nowhere(browser, served):
    url, sent = served.one_time_url(), []
    root, _, token = url.partition("#")
    with contextlib.closing(browser.new_context()) as context, contextlib.closing(context.new_page()) as sheet:
        sheet.on("request", lambda request: sent.append(request.url))
        sheet.goto(f"{root}?panel=search#{token}")
        sheet.wait_for_selector("body[data-ready='1']", state="attached")
        assert sheet.url == f"{root}?panel=search"
        assert sheet.evaluate("[document.cookie, document.referrer, history.length]") == ["", "", 2]
        assert context.cookies() == []
        assert not [address for address in sent if token.partition("=")[2] in address]
        # It goes on without the token, in other tabs too; a used one does no harm where the secret is.
        sheet.reload()
        sheet.wait_for_selector("body[data-ready='1'] #query", state="attached")
        with contextlib.closing(context.new_page()) as other:
            other.goto(f"{root}?panel=search#{token}")
            other.wait_for_selector("body[data-ready='1'] #query", state="attached")
    with contextlib.closing(browser.new_context()) as context, contextlib.closing(context.new_page()) as sheet:
        sheet.goto(url)
        sheet.wait_for_selector("[role=alert]")
        assert "each is good once" in sheet.inner_text("[role=alert]")
        # As somebody pastes the next one into the same tab.
        sheet.goto(served.one_time_url())
        sheet.wait_for_selector("body[data-ready='1']", state="attached")


class _Listener(http.server.BaseHTTPRequestHandler):
    """Another program's page on this machine, which writes down what browsers send it."""

    heard: ClassVar[list[str]] = []

    def do_GET(self):
        self.heard.append(f"{self.path} {self.headers}")
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_page_of_another_port_gets_nothing_that_opens_ours(browser, served, elsewhere):
    with contextlib.closing(browser.new_context()) as context, contextlib.closing(context.new_page()) as sheet:
        sheet.goto(served.one_time_url())
        sheet.wait_for_selector("body[data-ready='1']", state="attached")
        sheet.goto(elsewhere)
        sheet.wait_for_load_state()
        assert len(_Listener.heard) >= 1
        assert not [said for said in _Listener.heard if served.access.secret in said or "Cookie" in said]
        assert sheet.evaluate("localStorage.length") == 0
        ask = """address => fetch(address, { credentials: "include" }).then(() => "answered", () => "kept away")"""
        for name in ("page.json", "overview.json", "", "page.js"):
            assert sheet.evaluate(ask, served.root + name) == "kept away"
        # A link to us may be followed, and the page that has it gets no hold of ours.
        with context.expect_page() as opened:
            sheet.evaluate("address => { window.ours = open(address) }", served.root)
        opened.value.wait_for_selector("body[data-ready='1']", state="attached")
        assert sheet.evaluate("window.ours.closed")


def test_the_file_that_opens_the_browser_leads_to_the_page_and_is_gone_when_it_has(
    browser, served, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    opened = queue.Queue()
    monkeypatch.setattr("webbrowser.open", lambda url: (opened.put(url), True)[1])
    with contextlib.ExitStack() as tidy:
        open_browser(served.one_time_url, tidy, pytest.fail)
        url = opened.get(timeout=20)
        assert len(list(tmp_path.iterdir())) == 1
        with contextlib.closing(browser.new_context()) as context, contextlib.closing(context.new_page()) as sheet:
            sheet.goto(url)
            sheet.wait_for_selector("body[data-ready='1']", state="attached")
            assert sheet.url == served.root
            assert list(tmp_path.iterdir()) == []
            # Where the page goes, and is loaded anew, browsers say on and on that another place led to it.
            sheet.click("[data-panel=health]")
            sheet.reload()
            sheet.wait_for_selector("body[data-ready='1'] [data-view=health]", state="attached")


# The norm map.


def span(tab):
    """The positions that the map is of."""
    return [int(tab.sheet.locator(f"#{name}").input_value()) for name in ("start", "stop")]


def test_clicks_on_the_map_lead_down_to_a_token_and_its_layers(tab, store):
    tab.open()
    wide = store.n_tokens
    while "one token" not in tab.texts("[data-view=norms] .note")[0]:
        with tab.going():
            tab.click_plot("#norm-map", 0.62)
        start, stop = span(tab)
        assert 0 < stop - start < wide
        assert start <= 0.64 * store.n_tokens
        assert stop >= 0.5 * store.n_tokens
        wide = stop - start
    tokens = tab.texts("[data-view=norms] .token")
    assert len(tokens) == wide
    with tab.going():
        tab.click_plot("#norm-map", 60.5 / wide)
    position = start + 60
    assert f"position={position}" in tab.query
    assert tab.sheet.locator("[aria-current=true]").get_attribute("data-token-position") == str(position)
    row = store["mlp_in"].get_position(0, position).double().numpy()
    assert len(tab.rows("#token-layers")) == 4
    for layer, (number_of, norm, cosine, largest) in enumerate(tab.rows("#token-layers")):
        before, row = row, store["mlp_in"].get_position(layer, position).double().numpy()
        assert int(number_of) == layer
        assert number(norm) == pytest.approx(np.linalg.norm(row), rel=1e-4)
        if layer:
            expected = before @ row / np.linalg.norm(before) / np.linalg.norm(row)
            assert number(cosine) == pytest.approx(expected, abs=1e-4)
        assert int(largest.split()[0]) == np.abs(row).argmax()


def test_a_stretch_that_is_dragged_over_is_zoomed_into(tab):
    tab.open("?panel=norms&start=1000&stop=1200")
    box = tab.sheet.locator(f"#norm-map {PLOT}").bounding_box()
    across = box["y"] + box["height"] / 2
    with tab.going():
        tab.sheet.mouse.move(box["x"] + 0.25 * box["width"], across)
        tab.sheet.mouse.down()
        tab.sheet.mouse.move(box["x"] + 0.4 * box["width"], across, steps=4)
        tab.sheet.mouse.move(box["x"] + 0.5 * box["width"], across + 3, steps=4)
        tab.sheet.mouse.up()
    start, stop = span(tab)
    assert start == pytest.approx(1050, abs=3)
    assert stop == pytest.approx(1100, abs=3)
    assert len(tab.texts("[data-view=norms] .token")) == stop - start


def test_buttons_zoom_and_move_as_clicks_do(tab, store):
    tab.open("?panel=norms")
    steps = 0
    while not tab.sheet.locator("#zoom-in").is_disabled():
        with tab.going():
            tab.sheet.click("#zoom-in")
        steps += 1
    assert steps >= 3
    start, stop = span(tab)
    assert 1 <= stop - start <= 8
    with tab.going():
        tab.sheet.click("#later")
    assert span(tab) == [stop, 2 * stop - start]
    while not tab.sheet.locator("#zoom-out").is_disabled():
        with tab.going():
            tab.sheet.click("#zoom-out")
    assert span(tab) == [0, store.n_tokens]


def test_a_huge_store_is_drawn_from_statistics_alone_and_zoomed_step_by_step(context, tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    try:
        from benchmarks.huge import huge_store  # noqa: PLC0415 -- not on the path otherwise
    finally:
        sys.path.pop(0)
    huge_store(tmp_path / "huge", 600, layers=2, d_model=64)
    read = []
    gather = mmcache.SiteView.gather
    monkeypatch.setattr(mmcache.SiteView, "gather", lambda *given, **more: (read.append(1), gather(*given, **more))[1])
    with serving(Source(tmp_path / "huge")) as page:
        tab = Tab(context, page)
        tab.open()
        assert tab.sheet.locator("#norm-map svg.main-svg").count()
        assert not read
        widths = [600 * 4096]
        while widths[-1] > 240:
            with tab.going():
                tab.click_plot("#norm-map", 0.4)
            widths.append(np.diff(span(tab))[0])
        assert read
        tab.close()
    assert widths == sorted(widths, reverse=True)
    assert len(widths) >= 3


# The numbers.


def test_search_finds_every_place_of_a_word(tab, store):
    tab.open("?panel=search")
    tab.sheet.fill("#query", "self")
    with tab.going():
        tab.sheet.press("#query", "Enter")
    found = []
    sequences = 0
    for start, stop in np.asarray(store.sequences)[:, :2]:
        # A token is a byte; what is none of the text, is none of it.
        text = bytes(min(int(token), 255) for token in store.tokens[start:stop])
        places = [start + at for at in range(len(text)) if text.startswith(b"self", at)]
        sequences += bool(places)
        found += places
    assert len(found) > 50
    assert tab.texts("#count")[0].startswith(f"{len(found)} matches in {sequences} sequences; the first 50:")
    links = tab.sheet.locator(".contexts [data-position]")
    assert links.evaluate_all("all => all.map(one => Number(one.dataset.position))") == found[:50]
    assert set(tab.texts(".contexts mark")) == {"self"}
    with tab.going():
        links.nth(7).click()
    chosen = tab.sheet.locator("#text [aria-current=true]")
    assert chosen.get_attribute("data-token-position") == str(found[7])
    assert chosen.inner_text() == "s"


def test_the_top_contexts_of_a_dimension_are_the_largest_values(tab, store):
    tab.open("?panel=top")
    for name, value in (("site", "resid_post"), ("layer", str(LAYER))):
        with tab.going():
            tab.sheet.select_option(f"#{name}", value)
    with tab.going():
        tab.sheet.fill("#dimension", str(DIMENSION))
        tab.sheet.press("#dimension", "Enter")
    rows, counts = rows_of(store, "resid_post", LAYER)
    values = np.where(counts, rows[:, DIMENSION], -np.inf)
    best = np.argsort(-values, kind="stable")[:10]
    links = tab.sheet.locator("[data-band=top] [data-position]")
    assert links.evaluate_all("all => all.map(one => Number(one.dataset.position))") == best.tolist()
    told = [number(text) for text in tab.texts("[data-band=top] .value")]
    assert told == pytest.approx(values[best], rel=1e-4)
    marked = [text.replace("↵", "\n") for text in tab.texts("[data-band=top] mark")]
    assert marked == [chr(store.tokens[position]) for position in best]
    assert tab.texts("[data-view=top] .note")[0].startswith(f"{counts.sum():,} tokens were looked at")


def test_a_dimension_that_is_chosen_has_the_moments_of_its_values(tab, store):
    tab.open(f"?panel=dimensions&site=resid_post&layer={LAYER}")
    rows, counts = rows_of(store, "resid_post", LAYER)
    rms = np.sqrt(np.square(rows[counts]).mean(axis=0))
    ratios = rms / np.median(rms)
    for told, ratio, size, mean, std in tab.rows("#outliers"):
        column = rows[counts][:, int(told)]
        expected = [ratios[int(told)], rms[int(told)], column.mean(), column.std()]
        assert [number(text) for text in (ratio, size, mean, std)] == pytest.approx(expected, rel=1e-3)
    largest = [int(row[0]) for row in tab.rows("#outliers")]
    assert largest == np.argsort(-ratios)[: len(largest)].tolist()
    with tab.going():
        tab.sheet.click(f"[data-dimension='{largest[1]}']")
    mean, std, count = map(number, tab.texts("[data-view=dimension] dd"))
    column = rows[counts][:, largest[1]]
    assert [mean, std, count] == pytest.approx([column.mean(), column.std(), counts.sum()], rel=1e-3)


def test_a_text_is_coloured_by_the_numbers_of_its_tokens(tab, store):
    tab.open(VIEWS["text by a dimension"])
    tokens = tab.sheet.locator("#text .token")
    told = tokens.evaluate_all("all => all.map(one => Number(one.dataset.value))")
    start, stop = np.asarray(store.sequences)[2, :2]
    assert told == pytest.approx(store["mlp_in"].get_layer(2)[start:stop, 17].double().numpy(), rel=1e-5)
    strengths = tokens.evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--strength')))")
    order = np.argsort(np.abs(told))
    assert (np.diff(np.array(strengths)[order]) >= 0).all()


# The address.


def test_what_was_done_is_in_the_address_and_back_undoes_it(tab, context, served):
    tab.open("?panel=text&sequence=2&layer=1")
    seen = [tab.texts("#panel")]
    steps = [
        lambda: tab.sheet.select_option("#by", "difference"),
        lambda: tab.sheet.click("#text .token >> nth=40"),
        lambda: tab.sheet.click("#token-layers .link >> nth=2"),
    ]
    for step in steps:
        with tab.going():
            step()
        tab.sheet.wait_for_load_state("networkidle")
        seen.append(tab.texts("#panel"))
    other = Tab(context, served)
    other.open(f"?{tab.query}")
    assert other.texts("#panel") == seen[-1]
    other.sheet.reload()
    other.ready()
    assert other.texts("#panel") == seen[-1]
    other.close()
    for before in seen[-2::-1]:
        with tab.going():
            tab.sheet.go_back()
        assert tab.texts("#panel") == before


# Keys.


def test_tabs_are_reached_by_arrows(tab):
    tab.open()
    tab.sheet.keyboard.press("Tab")
    names = [text.lower() for text in tab.texts("[role=tab]")]
    for name in [*names[1:], names[0]]:
        tab.sheet.keyboard.press("ArrowRight")
        tab.ready()
        assert tab.sheet.locator("#panel").get_attribute("data-shown") == name
        assert tab.texts("[role=tab][aria-selected=true]")[0].lower() == name
        assert tab.sheet.evaluate("document.activeElement.dataset.panel") == name
    tab.sheet.keyboard.press("End")
    tab.ready()
    assert tab.sheet.locator("#panel").get_attribute("data-shown") == names[-1]
    tab.sheet.keyboard.press("ArrowLeft")
    tab.ready()
    assert tab.sheet.locator("#panel").get_attribute("data-shown") == names[-2]


@pytest.mark.parametrize("query", ["?panel=text&sequence=1", "?panel=norms&start=512&stop=612"])
def test_tokens_are_reached_by_tab_and_arrows_and_opened_by_enter(tab, store, query):
    tab.open(query)
    focused = "document.activeElement.dataset.tokenPosition ?? ''"
    for _ in range(40):
        tab.sheet.keyboard.press("Tab")
        if tab.sheet.evaluate(focused):
            break
    assert tab.sheet.evaluate(focused) == "512"
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.sheet.keyboard.press(key)
    assert tab.sheet.evaluate(focused) == "514"
    with tab.going():
        tab.sheet.keyboard.press("Enter")
    tab.sheet.wait_for_selector("#token-layers")
    assert "position=514" in tab.query
    assert tab.texts("#token-text") == [chr(store.tokens[514])]


# What is offered of each view.


def test_the_python_of_each_view_runs_and_gives_its_data(tab, served):
    tab.open()
    for query in VIEWS.values():
        tab.show(query)
        frames = tab.sheet.locator("[data-view]:not([data-view=provenance])").all()
        assert frames
        for frame in frames:
            code = frame.locator(".python code")
            assert not code.is_visible()
            frame.get_by_role("button", name="Python", exact=True).click()
            *lines, last = code.inner_text().splitlines()
            names = {"mmcache": mmcache}
            exec("\n".join(lines), names)  # noqa: S102 -- it is for people to run
            made = eval(last, names)  # noqa: S307 -- as above
            made = made if isinstance(made, dict) else made.to_json()["data"]
            href = frame.get_by_role("link", name="JSON", exact=True).get_attribute("href")
            told = json.loads(ask(served, f"/{href}").body)["data"]
            assert json.loads(json.dumps(made)) == told


def test_the_data_open_in_a_tab_of_their_own(tab, context):
    tab.open("?panel=health")
    with context.expect_page() as opened:
        tab.sheet.click("text=JSON")
    opened.value.wait_for_selector("body[data-ready='1']", state="attached")
    assert json.loads(opened.value.inner_text("body"))["view"] == "health"
    assert opened.value.url == f"{tab.root}health.json?site=mlp_in"
    opened.value.close()


def test_the_picture_for_the_readme_is_taken(browser, store, tmp_path):
    screenshots().page(store.path, browser, tmp_path / "page.png")
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">I", picture[16:20]) == (1280,)
    assert 10_000 < len(picture) < 300_000


# Strangers' stores.


def walk(tab, queries):
    """Look at panels, and touch what can be touched."""
    for query in queries:
        tab.show(query)
        for width in (400, 1280):
            tab.sheet.set_viewport_size({"width": width, "height": 800})
            assert not tab.overflows()
        tab.sheet.evaluate("document.querySelectorAll('.frame > header button').forEach(one => one.click())")
        for plot in tab.sheet.locator(PLOT).all():
            plot.hover(position={"x": 40, "y": 20})
        assert tab.sheet.evaluate("window.__hacked") is None


def test_markup_and_scripts_in_tokens_stay_text(context, tmp_path):
    hostile_tokens(tmp_path / "acts")
    with serving(Source(tmp_path / "acts")) as page:
        tab = Tab(context, page)
        tab.open()
        walk(tab, ["", "?panel=health", "?panel=norms&stop=24", "?panel=dimensions&dimension=1", "?panel=text",
                   "?panel=text&position=3", "?panel=top", "?panel=search&text=%3Cscript"])  # fmt: skip
        assert SCRIPT in " ".join(tab.texts(".contexts"))
        tab.open("?panel=text")
        assert SCRIPT in tab.texts("#text")[0]
        tab.close()


def test_markup_and_scripts_in_names_and_metadata_stay_text(context, tmp_path):
    hostile_names(tmp_path / "acts")
    with serving(Source(tmp_path / "acts")) as page:
        tab = Tab(context, page)
        tab.open()
        assert SCRIPT in tab.texts("[data-view=provenance]")[0]
        assert IMAGE in tab.texts("#sites")[0]
        walk(tab, ["", "?panel=health", "?panel=norms", "?panel=norms&stop=24", "?panel=dimensions&dimension=1",
                   "?panel=text", "?panel=text&position=3", "?panel=top", "?panel=search&id=3"])  # fmt: skip
        tab.close()


def test_markup_and_scripts_in_an_address_stay_text(tab):
    names = ("site", "layer", "dimension", "position", "text", "id", "by")
    given = "&".join(f"{name}={IMAGE}{SCRIPT}" for name in names)
    tab.open()
    for panel in ("health", "norms", "dimensions", "text", "top", "search", "lens"):
        tab.show(f"?panel={panel}&{given}")
        assert IMAGE in tab.texts("#panel")[0]
    # Each is refused with a sentence, which the console tells as well; a search for it finds nothing.
    assert tab.trouble
    assert all("400" in said for said in tab.trouble)
    tab.trouble = []
