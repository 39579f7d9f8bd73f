"""`mmcache top` and `mmcache find`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mmcache.cli.options import CONTEXT, DIRECTION, JSON, PATH, SITE, one_site, print_json
from mmcache.cli.passages import draw_find, draw_top
from mmcache.read.store import open_store
from mmcache.view import find as find_tokens
from mmcache.view import load_direction
from mmcache.view import top as top_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.view.dimensions import Direction

__all__ = ["find", "top"]


@click.command()
@PATH
@click.argument("layer", type=int)
@click.argument("dimension", type=int, required=False)
@DIRECTION
@SITE
@click.option("-k", type=int, default=10, show_default=True, help="Tokens to show, at the top and from each band.")
@CONTEXT
@JSON
def top(
    path: Path,
    layer: int,
    dimension: int | None,
    direction: Path | None,
    site: str | None,
    k: int,
    context: int,
    as_json: bool,
) -> None:
    """Show the tokens where a dimension is largest.

    Give DIMENSION of LAYER, or a --direction. Some tokens from each lower band are shown too.
    """
    wanted: Direction
    if dimension is not None and direction is None:
        wanted = dimension
    elif direction is not None and dimension is None:
        wanted = load_direction(direction)
    else:
        raise click.UsageError("DIMENSION, or --direction FILE: exactly one of them")
    store = open_store(path, partial=True)
    view = top_tokens(store, one_site(store, site), layer, wanted, k=k, context=context)
    if as_json:
        print_json(view.to_json())
    else:
        draw_top(Console(), view)


@click.command()
@PATH
@click.argument("text", required=False)
@click.option("--token", type=int, help="Search for a token by its id.")
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="Maximum matches to list.")
@click.option("--start", type=click.IntRange(min=0), default=0, help="First position to search.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="Number of tokens to search."
)
@CONTEXT
@JSON
def find(
    path: Path,
    text: str | None,
    token: int | None,
    limit: int,
    start: int,
    tokens: int,
    context: int,
    as_json: bool,
) -> None:
    """Find TEXT, or a token, in a store. Exit code 1 if there is no match."""
    if (text is None) == (token is None):
        raise click.UsageError("TEXT, or --token ID: exactly one of them")
    store = open_store(path, partial=True)
    view = find_tokens(store, text, token=token, start=start, most_tokens=tokens, most=limit, context=context)
    if as_json:
        print_json(view.to_json())
    else:
        draw_find(Console(), view)
    if not view["count"]:
        sys.exit(1)
