"""A browser that looks at the page, and keeps a record of what went wrong in it and what it asked for."""

import contextlib
import importlib.util
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "screenshots.py"
# Of figures: where clicks and drags go.
PLOT = ".nsewdrag[data-subplot=xy]"


def screenshots():
    """The script that makes the pictures of the README."""
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def browsing():
    """A browser, or a skip that says why there is none."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    script = screenshots()
    if script.browser_path() is None:
        pytest.skip("no Chromium here: the page is not looked at in a browser")
    with script.browser() as started:
        yield started


class Tab:
    """A tab of the browser, in which nothing may go wrong and which may ask nobody but the page.

    `trouble` is what the console says, what scripts throw, what is asked for in vain, dialogs; `asked` all addresses.
    """

    def __init__(self, context, served):
        self.root = f"http://127.0.0.1:{served.port}/"
        self.sheet = context.new_page()
        self.trouble, self.asked = [], []
        self.sheet.set_viewport_size({"width": 1280, "height": 800})
        on = self.sheet.on
        on("console", lambda said: self.trouble.append(f"console: {said.text}"))
        on("pageerror", lambda error: self.trouble.append(f"thrown: {error}"))
        on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        on("request", lambda request: self.asked.append(request.url))
        # What is left behind by going on is given up, not failed.
        on("requestfailed", lambda one: "ERR_ABORTED" in (one.failure or "") or self.trouble.append(f"lost: {one.url}"))
        on("response", lambda one: one.status < 400 or self.trouble.append(f"{one.status}: {one.url}"))
        kept = f"localStorage.setItem('mmcache-secret', '{served.access.secret}')"
        self.sheet.add_init_script(f"if (location.href.startsWith('{self.root}')) {kept}")

    def ready(self):
        """Wait until the panel is done."""
        self.sheet.wait_for_selector("body[data-ready='1']", state="attached")

    def open(self, query=""):
        """Open an address of the page."""
        self.sheet.goto(self.root + query)
        self.ready()

    def show(self, query):
        """Go to an address as Back and Forward do, which loads nothing anew."""
        self.sheet.evaluate("document.body.dataset.ready = '0'")
        self.sheet.evaluate("where => { history.pushState(null, '', where); dispatchEvent(new Event('popstate')); }",
                            self.root + query)  # fmt: skip
        self.ready()

    def recolour(self, scheme):
        """Let the system go light or dark, which it was not, and wait until the page is drawn anew."""
        self.sheet.evaluate("document.body.dataset.ready = '0'")
        self.sheet.emulate_media(color_scheme=scheme)
        self.ready()

    @contextlib.contextmanager
    def going(self):
        """Do something that takes the page to another address, and wait until it is there."""
        before = self.sheet.url
        yield
        self.sheet.wait_for_url(lambda url: url != before)
        self.ready()

    @property
    def query(self):
        """What the address says."""
        return urlsplit(self.sheet.url).query

    def click_plot(self, figure, across, down=0.5):
        """Click into a figure, at parts of its width and height."""
        box = self.sheet.locator(f"{figure} {PLOT}").bounding_box()
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        # What a click means is what was hovered over before.
        self.sheet.mouse.move(x - 1, y)
        self.sheet.mouse.move(x, y)
        self.sheet.wait_for_selector(f"{figure} .hoverlayer .hovertext")
        self.sheet.mouse.click(x, y)

    def texts(self, selector):
        """What all elements of a kind say."""
        return self.sheet.locator(selector).all_inner_texts()

    def rows(self, table):
        """The cells of a table, row by row."""
        return [row.locator("td").all_inner_texts() for row in self.sheet.locator(f"{table} tbody tr").all()]

    def overflows(self):
        """Whether the page is wider than its window."""
        return self.sheet.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

    def keep(self, folder, name):
        """Keep a picture, where the one who runs the tests asks for it."""
        folder = Path(os.environ.get("MMCACHE_ARTEFACTS") or folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.sheet.screenshot(path=folder / f"{re.sub(r'[^a-z0-9]+', '-', name)}.png", full_page=True)

    def close(self):
        """Close it: nothing went wrong, and nobody else was asked."""
        hacked = self.sheet.evaluate("window.__hacked")
        self.sheet.close()
        assert not self.trouble
        assert hacked is None
        elsewhere = [url for url in self.asked if not url.startswith((self.root, "data:", "blob:"))]
        assert not elsewhere


def number(text):
    """A number as the page writes it."""
    return float(text.replace(",", ""))


def contrast(one, other):
    """How far two colours, as the browser writes them, are apart in lightness: 4.5 is what WCAG asks of texts."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)
