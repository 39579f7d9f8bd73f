"""Make the README's pictures, of the demo model on Python's own sources: a terminal, and the page.

    python scripts/screenshots.py [--out docs] [--only terminal|page]

A browser, Chromium or Chrome, draws the page; it needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sysconfig
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import mmcache
from mmcache.cli.render_views import draw_health, draw_norms, draw_statistics, map_width
from mmcache.models.loading import load_model, load_tokenizer
from mmcache.view import health, norms, statistics_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from mmcache.read.store import Store

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Without the browser's own network requests, and without features that containers lack.
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-quic",
)  # fmt: skip
_NAME = "demo-acts"
_COLUMNS = 88
_WINDOW = (1280, 850)
# A text coloured by its norms, and one of its tokens at every layer.
_SHOWN = "panel=text&site=mlp_out&layer=2&sequence=3&by=norm&position=1600"


def demo_store(path: Path) -> Store:
    """Make the store that `scripts/demo` makes."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [*sorted((stdlib / "json").glob("*.py")), *sorted((stdlib / "logging").glob("*.py"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return mmcache.extract(load_model("demo", None), load_tokenizer("demo"), texts, path, sites=("mlp_in", "mlp_out"))


def terminal(store: Store, site: str) -> str:
    """The first part of `mmcache stats`, as SVG."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor",
                      no_color=False)  # fmt: skip
    draw_statistics(console, statistics_view(store, site))
    draw_norms(console, norms(store, site, bins=map_width(console)))
    draw_health(console, health(store, site))
    drawn = console.export_svg(title=f"mmcache stats {_NAME} --site {site}")
    # Drop fonts from the web: any monospaced font works, since each line has a fixed width.
    return re.sub(r"\s*@font-face \{.*?\}|<!--.*?-->\s*", "", drawn, flags=re.DOTALL)


def browser_path() -> str | None:
    """The path of the browser; None if there is none."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A running browser, closed afterwards."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 -- the terminal needs none

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser_path(), args=list(_FLAGS))
        try:
            yield started
        finally:
            started.close()


def page(path: Path, started: Browser, picture: Path) -> None:
    """Serve the page of a store, and take a picture of it."""
    from mmcache.view.panels import Source  # noqa: PLC0415 -- as above
    from mmcache.view.server import Page  # noqa: PLC0415 -- the terminal needs none

    served = Page(Source(path))
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        sheet = started.new_page(viewport={"width": _WINDOW[0], "height": _WINDOW[1]}, color_scheme="light")
        root, _, token = served.one_time_url().partition("#")
        sheet.goto(f"{root}?{_SHOWN}#{token}")
        sheet.wait_for_selector("body[data-ready='1']", state="attached")
        sheet.screenshot(path=picture)
        sheet.close()
    finally:
        served.stop()
        thread.join()
        served.source.store.close()


def main() -> None:
    """Make the pictures asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder without such pictures; docs if not given, anew")
    parser.add_argument("--only", choices=["terminal", "page"])
    given = parser.parse_args()
    out: Path = given.out or Path("docs")
    for name in ("terminal.svg", "page.png"):
        if given.out and (out / name).exists():
            parser.error(f"{out / name} is there: take another --out, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _NAME
        store = demo_store(path)
        if given.only != "page":
            (out / "terminal.svg").write_text(terminal(store, "mlp_out"), encoding="utf-8")
        store.close()
        if given.only != "terminal":
            if browser_path() is None:
                parser.exit(1, f"the page's picture needs one of {', '.join(_BROWSERS)}\n")
            with browser() as started:
                page(path, started, out / "page.png")


if __name__ == "__main__":
    main()
