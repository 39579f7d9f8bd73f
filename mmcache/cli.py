"""The command line: arguments only. Data goes to stdout, progress to stderr; exit 0 fine, 1 findings, 2 usage."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from mmcache.capture import probe
from mmcache.corpus import read_texts
from mmcache.errors import CorruptError, IncompleteError, MmcacheError, NonFiniteError, WriteError
from mmcache.export import export as export_store
from mmcache.extract import Extraction
from mmcache.loading import load_model, load_tokenizer
from mmcache.manifest import is_store, read_manifest
from mmcache.repair import repair as repair_store
from mmcache.signals import stoppable
from mmcache.sites import describe, resolve
from mmcache.store import open_store
from mmcache.terminal import (
    BytesBar,
    ProgressBar,
    draw_exported,
    draw_overview,
    draw_repaired,
    draw_report,
    draw_rows,
    draw_show,
    draw_statistics,
    draw_survey,
)
from mmcache.verify import verify as verify_store
from mmcache.view import json_ready, layer_view, overview, row_view, sites_view, statistics_view

if TYPE_CHECKING:
    from mmcache.findings import Level

__all__ = ["main"]

_DTYPES = click.Choice(["float32", "float16", "bfloat16", "float64"])
_GOES_ON = "What is finished is in {}; the same command goes on from there"
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_PATH = click.argument("path", type=click.Path(path_type=Path))
_LEVEL = click.option(
    "--level", type=click.Choice(["full", "quick"]), default="full", show_default=True,
    help="Every byte, or presence, sizes, headers and metadata.",
)  # fmt: skip
_SITE = click.option("--site", help="Which site; needed where the store has several.")


class _Group(click.Group):
    """`mmcache PATH` is `mmcache info PATH`, and our errors are told without a traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and Path(args[0]).exists():
            args = ["info", *args]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MmcacheError as error:
            click.echo(f"mmcache: {error}", err=True)
            # What was found on the disk or in the data is a finding, the rest is about how it was asked.
            sys.exit(1 if isinstance(error, CorruptError | IncompleteError | NonFiniteError | WriteError) else 2)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(json_ready(data), indent=2, ensure_ascii=False, allow_nan=False))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _layers(text: str | None) -> list[int] | None:
    """Read `0-5,8` as layer numbers."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        try:
            found += range(int(low), int(high or low) + 1)
        except ValueError:
            raise click.BadParameter(f"{text!r}: expected numbers and ranges, such as 0-5,8") from None
    return found


def _batch_size(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"--batch-size {text!r}: expected a number, or auto") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mmcache")
def main() -> None:
    """Language-model activations on disk. `mmcache PATH` says what a store is."""


@main.command()
@click.argument("model")
@click.argument("corpus", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The store, new or to be gone on with.")
@click.option("--sites", default="mlp_in,mlp_out", show_default=True, help="Which activations, by comma.")
@click.option("--layers", help="Which layers, such as 0-5,8; all of them by default.")
@click.option("--context-length", type=int, help="Tokens a context at most.  [1024, or less if the model can't]")
@click.option("--pack", is_flag=True, help="Fill contexts with several documents, which then see each other.")
@click.option("--batch-size", default="8", show_default=True, help="Contexts a forward pass, or auto.")
@click.option("--dtype", type=_DTYPES, default="bfloat16", show_default=True, help="The storage dtype.")
@click.option("--compute-dtype", type=_DTYPES, help="What the model computes in.  [as its checkpoint]")
@click.option("--layout", type=click.Choice(["token", "layer"]), default="token", show_default=True)
@click.option("--shard-tokens", type=int, help="Tokens a shard.  [256 MiB of the widest site]")
@click.option("--max-tokens", type=int, help="Store whole contexts up to this many tokens; may grow later.")
@click.option("--device", help="Where the model runs.  [cuda if there is one, else cpu]")
@click.option("--field", default="text", show_default=True, help="The key of the text in JSON lines and datasets.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and write nothing.")
@click.option("--strict", is_flag=True, help="Refuse NaN and infinity instead of counting them.")
@click.option("--accept-numerics", is_flag=True, help="Go on although batch size, device, threads or versions differ.")
@_JSON
def extract(model: str, corpus: tuple[str, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Run MODEL (a folder or hub name, or `demo`) over CORPUS, and store its activations.

    CORPUS is text, .jsonl, .parquet or .npy files, dataset folders, or the name of a dataset on the hub. The
    same command goes on after an interruption.
    """
    with stoppable(_GOES_ON.format(out)):
        _extract(model, corpus, out, options, as_json=as_json)


def _extract(model: str, corpus: tuple[str, ...], out: Path, options: dict[str, Any], *, as_json: bool) -> None:
    console = Console(stderr=True)
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    _plan_threads(out)
    job = Extraction(
        load_model(model, options["compute_dtype"]),
        load_tokenizer(model),
        out,
        sites=_names(options["sites"]),
        layers=_layers(options["layers"]),
        context_length=options["context_length"],
        pack=options["pack"],
        batch_size=_batch_size(options["batch_size"]),
        dtype=options["dtype"],
        layout=options["layout"],
        shard_tokens=options["shard_tokens"],
        max_tokens=options["max_tokens"],
        device=device,
        record={"command": shlex.join(["mmcache", *sys.argv[1:]]), "corpus": list(corpus)},
    )
    texts = read_texts(corpus, field=options["field"])
    if options["dry_run"]:
        survey = job.survey(texts)
        if as_json:
            _print_json(vars(survey))
        else:
            draw_survey(Console(), survey)
        return
    with ProgressBar(console) as bar:
        store = job.run(
            texts,
            accept_numerics=options["accept_numerics"],
            strict=options["strict"],
            planned=lambda survey: draw_survey(console, survey),
            progress=bar.update,
        )
    if as_json:
        _print_json(overview(store))
    else:
        draw_overview(Console(), overview(store))


def _plan_threads(out: Path) -> None:
    """Compute with as many threads as the plan says: another number may change the last bits."""
    if is_store(out):
        threads = read_manifest(out).source.get("numerics", {}).get("threads")
        if isinstance(threads, int) and threads > 0:
            torch.set_num_threads(threads)


@main.command()
@click.argument("model")
@click.option("--sites", help="Only these, module paths included, by comma.")
@_JSON
def sites(model: str, sites: str | None, as_json: bool) -> None:
    """Say which activations MODEL has: each site, its modules, its shape."""
    loaded = load_model(model, None)
    found = resolve(loaded, _names(sites)) if sites else describe(loaded)
    rows = sites_view(found, probe(loaded, [site.name for site in found]))
    if as_json:
        _print_json(rows)
    else:
        draw_rows(Console(), f"{type(loaded).__name__}", rows)


@main.command()
@_PATH
@_JSON
def info(path: Path, as_json: bool) -> None:
    """Say what the store at PATH is: identity, shape, size, completeness."""
    view = overview(open_store(path, partial=True))
    if as_json:
        _print_json(view)
    else:
        draw_overview(Console(), view)
    if not view["complete"]:
        sys.exit(1)


def _one_site(path: Path, site: str | None) -> tuple[Any, list[str]]:
    store = open_store(path, partial=True)
    return store, [site] if site else list(store.sites)


@main.command()
@_PATH
@click.argument("layer", type=int)
@click.argument("position", type=int, required=False)
@_SITE
@_JSON
def show(path: Path, layer: int, position: int | None, site: str | None, as_json: bool) -> None:
    """Show LAYER of a store, or its row at POSITION (negative: from the end, written after `--`)."""
    store, names = _one_site(path, site)
    views = [
        layer_view(store, name, layer) if position is None else row_view(store, name, layer, position) for name in names
    ]
    if as_json:
        _print_json(views)
        return
    console = Console()
    for view in views:
        draw_show(console, view)


@main.command()
@_PATH
@_SITE
@_JSON
def stats(path: Path, site: str | None, as_json: bool) -> None:
    """Print each layer's norms, spread and health, from the statistics that the shards carry."""
    store, names = _one_site(path, site)
    views = [statistics_view(store, name) for name in names]
    if as_json:
        _print_json(views)
    else:
        for view in views:
            draw_statistics(Console(), view)
    if any(row["non_finite"] for view in views for row in view["layers"]):
        sys.exit(1)


@main.command()
@_PATH
@click.option("--to", required=True, type=click.Choice(["safetensors", "npy"]), help="What kind of files.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--sites", help="Only these, by comma.")
@click.option("--layers", help="Only these, such as 0-5,8.")
@click.option("--dtype", type=_DTYPES, help="Cast to this.  [as stored; bfloat16 in npy as uint16 bits]")
@_JSON
def export(path: Path, to: Any, out: Path, sites: str | None, layers: str | None, dtype: Any, as_json: bool) -> None:
    """Write the store at PATH, or a part of it, as files that need no mmcache.

    Whole shards become hard links: such a file is the store's own, and editing it would damage the store.
    """
    names, numbers = _names(sites) if sites else None, _layers(layers)
    with stoppable("Nothing was exported"), BytesBar(Console(stderr=True)) as bar:
        done = export_store(path, out, to=to, sites=names, layers=numbers, dtype=dtype, progress=bar.update)
    if as_json:
        _print_json({**vars(done), "path": str(done.path)})
    else:
        draw_exported(Console(), done)


@main.command()
@_PATH
@_LEVEL
@_JSON
def verify(path: Path, level: Level, as_json: bool) -> None:
    """Look for everything that is wrong with the store at PATH: exit 1 if anything is."""
    with stoppable("Nothing was changed"), BytesBar(Console(stderr=True)) as bar:
        report = verify_store(path, level, progress=bar.update)
    if as_json:
        _print_json({**asdict(report), "ok": report.ok})
    else:
        draw_report(Console(), report)
    if not report.ok:
        sys.exit(1)


@main.command()
@_PATH
@_LEVEL
@_JSON
def repair(path: Path, level: Level, as_json: bool) -> None:
    """Set aside what is bad of the store at PATH, so that the rest can be read and `extract` makes it again.

    Nothing is deleted: bad files are moved into PATH/.set-aside. Exit 1 if anything is lost, or could not be helped.
    """
    with stoppable(f"The same command goes on with {path}"), BytesBar(Console(stderr=True)) as bar:
        done = repair_store(path, level, progress=bar.update)
    if as_json:
        _print_json(asdict(done))
    else:
        draw_repaired(Console(), done)
    if done.lost or done.left:
        sys.exit(1)
