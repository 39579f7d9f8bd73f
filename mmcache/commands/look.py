"""`mmcache show` and `mmcache stats`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mmcache.commands.shared import JSON, PATH, SITE, print_json
from mmcache.store import open_store
from mmcache.terminal import draw_show, draw_statistics
from mmcache.view import layer_view, row_view, statistics_view

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["show", "stats"]


def _one_site(path: Path, site: str | None) -> tuple[Any, list[str]]:
    store = open_store(path, partial=True)
    return store, [site] if site else list(store.sites)


@click.command()
@PATH
@click.argument("layer", type=int)
@click.argument("position", type=int, required=False)
@SITE
@JSON
def show(path: Path, layer: int, position: int | None, site: str | None, as_json: bool) -> None:
    """Show LAYER of a store, or its row at POSITION (negative: from the end, written after `--`)."""
    store, names = _one_site(path, site)
    views = [
        layer_view(store, name, layer) if position is None else row_view(store, name, layer, position) for name in names
    ]
    if as_json:
        print_json(views)
        return
    console = Console()
    for view in views:
        draw_show(console, view)


@click.command()
@PATH
@SITE
@JSON
def stats(path: Path, site: str | None, as_json: bool) -> None:
    """Print each layer's norms, spread and health, from the statistics that the shards carry."""
    store, names = _one_site(path, site)
    views = [statistics_view(store, name) for name in names]
    if as_json:
        print_json(views)
    else:
        for view in views:
            draw_statistics(Console(), view)
    if any(row["non_finite"] for view in views for row in view["layers"]):
        sys.exit(1)
