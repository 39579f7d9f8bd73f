"""The commands that show a store: `mmcache show`, `stats`, `top`, `find` and `view`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mmcache.cli.options import CONTEXT, DIRECTION, JSON, PATH, SITE, TRUST, one_site, print_json
from mmcache.cli.progress import ended_at_once
from mmcache.cli.render_views import (
    draw_apart,
    draw_dimensions,
    draw_find,
    draw_health,
    draw_norms,
    draw_sequence,
    draw_show,
    draw_statistics,
    draw_token,
    draw_top,
    map_width,
)
from mmcache.errors import ArgumentError
from mmcache.read.store import open_store
from mmcache.view import (
    Detokenizer,
    apart,
    dimensions,
    health,
    layer_view,
    load_direction,
    norms,
    row_view,
    sequence,
    statistics_view,
    token,
)
from mmcache.view import find as find_tokens
from mmcache.view import top as top_tokens
from mmcache.view.tokens import surroundings

if TYPE_CHECKING:
    from mmcache.read.store import Store
    from mmcache.view import View
    from mmcache.view.dimensions import Direction

__all__ = ["find", "show", "stats", "top", "view"]

# Ranges of a norm map in JSON; this many tokens or fewer are shown one by one.
_BINS = 240


@click.command()
@PATH
@click.argument("layer", type=int)
@click.argument("position", type=int, required=False)
@SITE
@click.option("--every-layer", is_flag=True, help="Show the token at POSITION in all layers.")
@click.option("--sequence", "number", type=int, help="Show the text of this sequence, coloured by a number.")
@click.option(
    "--by", type=click.Choice(["norm", "value", "difference"]),
    help="With --sequence: which number; difference is to the layer before.  [norm, or value of a direction]",
)  # fmt: skip
@click.option("--dimension", type=int, help="With --sequence: the value of this dimension.")
@DIRECTION
@click.option("--start", type=int, default=0, help="With --sequence: the first token to show.")
@CONTEXT
@JSON
def show(path: Path, layer: int, position: int | None, site: str | None, as_json: bool, **options: Any) -> None:
    """Show a layer, a row of it, or the text of a sequence.

    LAYER alone shows the layer, with POSITION one row, with --sequence a text. A negative POSITION counts from the end;
    write it after `--`.
    """
    _check_show(position, options)
    store = open_store(path, partial=True)
    console = Console()
    if options["number"] is not None:
        view = _sequence(store, one_site(store, site), layer, options)
        print_json(view.to_json()) if as_json else draw_sequence(console, view)
    elif position is not None and options["every_layer"]:
        name = one_site(store, site)
        store[name].rows_of([layer])
        view = token(store, name, position, context=options["context"])
        print_json(view.to_json()) if as_json else draw_token(console, view, layer)
    else:
        names = [site] if site else list(store.sites)
        views = [_rows(store, name, layer, position, options["context"]) for name in names]
        if as_json:
            print_json(views)
            return
        for summary in views:
            draw_show(console, summary)


def _check_show(position: int | None, options: dict[str, Any]) -> None:
    if options["number"] is not None and (position is not None or options["every_layer"]):
        raise click.UsageError("POSITION and --every-layer show a token, --sequence a text: one of them")
    if position is None and options["every_layer"]:
        raise click.UsageError("--every-layer shows one token: POSITION is missing")
    asked = [name for name in ("by", "dimension", "direction") if options[name] is not None]
    if options["number"] is None and (asked or options["start"]):
        raise click.UsageError(f"--{(asked or ['start'])[0]} is about a sequence's text: --sequence is missing")
    if options["dimension"] is not None and options["direction"] is not None:
        raise click.UsageError("--dimension and --direction: one of them")
    named = options["dimension"] is not None or options["direction"] is not None
    if options["by"] is not None and (options["by"] == "value") != named:
        raise click.UsageError("--by value is the value of a --dimension or a --direction, and nothing else is")


def _sequence(store: Store, site: str, layer: int, options: dict[str, Any]) -> View:
    direction = options["dimension"]
    if options["direction"] is not None:
        direction = load_direction(options["direction"])
    by = options["by"] or ("norm" if direction is None else "value")
    return sequence(store, site, layer, options["number"], by=by, direction=direction, start=options["start"])


def _rows(store: Store, site: str, layer: int, position: int | None, context: int) -> dict[str, Any]:
    if position is None:
        return layer_view(store, site, layer)
    view = row_view(store, site, layer, position)
    if not store.has_tokens:
        return view
    return view | surroundings(store, view["position"], context, Detokenizer(store))


@click.command()
@PATH
@SITE
@click.option("--start", type=int, help="Only the norm map, from this position.")
@click.option("--stop", type=int, help="Only the norm map, up to (not including) this position.")
@JSON
def stats(path: Path, site: str | None, start: int | None, stop: int | None, as_json: bool) -> None:
    """Print norms, spread and health of each layer.

    Everything comes from the statistics stored in the shards.
    """
    store = open_store(path, partial=True)
    found = []
    for name in [site] if site else store.sites:
        record = statistics_view(store, name)
        found.append(record)
        if as_json:
            views = [_norms(store, name, start, stop, _BINS), *(view(store, name) for view in _WHOLE)]
            record |= {view.name: view.to_json() for view in views}
        elif start is None and stop is None:
            _draw(Console(), store, record)
        else:
            draw_norms(Console(), _norms(store, name, start, stop, map_width(Console())))
    if as_json:
        print_json(found)
    if any(row["non_finite"] for record in found for row in record["layers"]):
        sys.exit(1)


_WHOLE = (health, apart, dimensions)


def _norms(store: Store, site: str, start: int | None, stop: int | None, bins: int) -> View:
    first, last = start or 0, store.n_tokens if stop is None else stop
    return norms(store, site, start=first, stop=last, bins=_BINS if last - first <= _BINS else bins)


def _draw(console: Console, store: Store, record: dict[str, Any]) -> None:
    site = record["site"]
    draw_statistics(console, record)
    draw_norms(console, norms(store, site, bins=map_width(console)))
    draw_health(console, health(store, site))
    draw_apart(console, apart(store, site))
    draw_dimensions(console, dimensions(store, site))


@click.command()
@PATH
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to serve on.  [any free port]")
@click.option("--no-browser", is_flag=True, help="Print the address only; do not open a browser.")
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="A .npy or .safetensors file with one vector: a direction to show.",
)
@click.option("--unembedding", metavar="MODEL", help="Model whose unembedding the logit lens uses.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the address and a token for scripts, as JSON.")
def view(
    path: Path,
    port: int,
    no_browser: bool,
    direction: Path | None,
    unembedding: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Open a store in a browser.

    The page is served from this machine to you alone, until Ctrl-C. The printed address opens the page once; after
    that, a new one is printed. Scripts can request the data of each panel at /PANEL.json, with the header
    "Authorization: Bearer TOKEN"; --json prints the token.
    """
    with ended_at_once() as tidy:
        try:
            from mmcache.view.server import serve  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise ArgumentError(f"the page needs {error.name}: pip install 'mmcache[view]'") from error

        def announce(url: str, token: str) -> None:
            click.echo(json.dumps({"url": url, "token": token}) if as_json else url)

        serve(
            path, tidy=tidy, port=port, open_browser=not no_browser, direction=direction, unembedding=unembedding,
            trust_remote_code=trust_remote_code, announce=announce, tell=functools.partial(click.echo, err=True),
        )  # fmt: skip


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
