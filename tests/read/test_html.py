"""Stores, sites and caches in a notebook: tables that say the truth, in HTML that nobody's text can leave."""

from html.parser import HTMLParser

import pytest
import torch

import mmcache
from damaged_stores import MAKERS, grown
from mmcache.text import ranges, size

EVIL = ['<script src="//x">', "</td></table><b>out", "a & b < c", "'\"><img src=x onerror=y>", "&lt;b&gt;"]


class Table(HTMLParser):
    """Rows of cells, whether every tag is closed, and which tags and attributes there are."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.tags, self.attributes = [], [], set(), set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def table(thing):
    """The rows of what a notebook shows, as a dict by their first cell."""
    found = Table(thing._repr_html_())
    assert found.tags <= {"table", "caption", "b", "thead", "tbody", "tr", "th", "td"}
    assert found.attributes <= {("style", "text-align: left")}
    return {row[0]: row[1] if len(row) == 2 else row[1:] for row in found.rows}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_store_is_shown_with_its_sites(tmp_path, make):
    make(tmp_path / "acts").close()
    store = mmcache.open(tmp_path / "acts")
    found = table(store)
    assert found["path"] == str(store.path)
    assert found["store"] == f"{store.kind}, layout {store.layout}, complete"
    assert found["tokens"] == f"{store.n_tokens:,} in {store.n_sequences:,} sequences"
    assert found["layers"] == f"{store.n_layers} ({ranges(store.layers)})"
    assert found["dtype"] == str(store.dtype)
    files = {site: list((tmp_path / "acts" / site).glob("c.*")) for site in store.sites}
    assert found["size"] == size(sum(file.stat().st_size for some in files.values() for file in some))
    for site, some in files.items():
        shape = f"[{', '.join(map(str, store[site].shape))}]"
        assert found[site] == [
            shape, f"{len(some)} of {len(some)}", size(sum(file.stat().st_size for file in some)),
        ]  # fmt: skip
        shown = table(store[site])
        assert (shown["site"], shown["shape"], shown["dtype"]) == (site, shape, str(store.dtype))
        assert shown["shards"] == f"{len(some)} of {len(some)}, complete"
        assert shown["layout"] == store.layout
        assert shown["size"] == size(store[site].get_layer(store.layers[0]).nbytes * store.n_layers)


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_what_is_missing_is_told(tmp_path, layout):
    grown(tmp_path / "acts", layout).close()
    (tmp_path / "acts" / "a" / "c.0.1.0").unlink()
    store = mmcache.open(tmp_path / "acts", partial=True)
    shards = 3 if layout == "token" else 6
    assert table(store)["store"] == f"grown, layout {layout}, not complete: 1 shards are missing"
    assert table(store)["a"][1] == f"{shards - 1} of {shards}"
    assert table(store)["b"][1] == f"{shards} of {shards}"
    assert table(store["a"])["shards"] == f"{shards - 1} of {shards}, not complete: 1 shards are missing"


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_of_a_stranger_is_taken_for_html(tmp_path, evil):
    # A folder's name has no slash, a path does.
    folder, site = tmp_path / evil, evil.replace("/", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with mmcache.create(folder, sites={site: 4}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(torch.arange(3), {site: torch.randn(1, 3, 4)})
    store = mmcache.open(folder)
    assert table(store)["path"] == str(folder)
    assert table(store)[site][0] == "[1, 3, 4]"
    assert table(store[site])["site"] == site
    for thing in (store, store[site]):
        assert "<script" not in thing._repr_html_()
        assert "<img" not in thing._repr_html_()


def test_a_cache_says_what_it_holds_at_every_point_of_its_life(tmp_path):
    cache = mmcache.FullActivationCache.with_capacity(2, tmp_path / "<b>cache")
    assert table(cache) == {"path": str(tmp_path / "<b>cache"), "cache": "being filled"}
    for _ in range(2):
        cache.push(torch.randn(30, 8))
    cache.flush()
    about = {"shape": "[2, 30, 8]", "dtype": "torch.float32", "size": size(2 * 30 * 8 * 4)}
    cache.get_position(0, 0)
    found = table(cache)
    assert {name: found[name] for name in about} == about
    assert (found["cache"], found["site"]) == ("being filled", "resid_post")
    cache.close()
    assert table(cache)["cache"] == "closed"
    again = mmcache.FullActivationCache.open(tmp_path / "<b>cache")
    assert {name: table(again)[name] for name in about} == about
    assert table(again)["cache"] == "open for reading"


def test_a_store_without_rows_is_shown(tmp_path):
    mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2, dtype=torch.float32).close()
    store = mmcache.open(tmp_path / "acts")
    assert table(store)["a"] == ["[2, 0, 8]", "0 of 0", "0 B"]
    assert table(store["a"])["shards"] == "0 of 0, complete"
