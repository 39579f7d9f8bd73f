"""`mmcache show` and `mmcache stats`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mmcache.cli.charts import draw_apart, draw_dimensions, draw_health, draw_norms, draw_statistics, map_width
from mmcache.cli.options import CONTEXT, DIRECTION, JSON, PATH, SITE, one_site, print_json
from mmcache.cli.passages import draw_sequence, draw_show, draw_token
from mmcache.read.store import open_store
from mmcache.view import (
    Words,
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
from mmcache.view.tokens import surroundings

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.read.store import Store
    from mmcache.view import View

__all__ = ["show", "stats"]

# Stretches of a norm map in JSON; of so few tokens, each is drawn.
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
    return view | surroundings(store, view["position"], context, Words(store))


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
