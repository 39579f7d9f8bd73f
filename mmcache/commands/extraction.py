"""`mmcache extract` and `mmcache sites`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from mmcache.capture import probe
from mmcache.commands.shared import DTYPES, JSON, layer_numbers, names, print_json
from mmcache.corpus import read_texts
from mmcache.job import Extraction
from mmcache.loading import load_model, load_tokenizer
from mmcache.overview import overview
from mmcache.plain import sites_table
from mmcache.progress import ProgressBar
from mmcache.ranks import find_rank
from mmcache.signals import stoppable
from mmcache.sites import describe, resolve
from mmcache.tables import draw_rows
from mmcache.terminal import draw_overview, draw_survey
from mmcache.threads import plan_threads

if TYPE_CHECKING:
    from mmcache.ranks import Rank

__all__ = ["extract", "sites"]

_GOES_ON = "What is finished is in {}; the same command goes on from there"


def _batch_size(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"--batch-size {text!r}: expected a number, or auto") from None


@click.command()
@click.argument("model")
@click.argument("corpus", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The store, new or to be gone on with.")
@click.option("--sites", default="mlp_in,mlp_out", show_default=True, help="Which activations, by comma.")
@click.option("--layers", help="Which layers, such as 0-5,8; all of them by default.")
@click.option("--context-length", type=int, help="Tokens a context at most.  [1024, or less if the model can't]")
@click.option("--pack", is_flag=True, help="Fill contexts with several documents, which then see each other.")
@click.option("--batch-size", default="8", show_default=True, help="Contexts a forward pass, or auto.")
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True, help="The storage dtype.")
@click.option("--compute-dtype", type=DTYPES, help="What the model computes in.  [as its checkpoint]")
@click.option("--layout", type=click.Choice(["token", "layer"]), default="token", show_default=True)
@click.option("--shard-tokens", type=int, help="Tokens a shard.  [256 MiB of the widest site]")
@click.option("--max-tokens", type=int, help="Store whole contexts up to this many tokens; may grow later.")
@click.option("--device", help="Where the model runs.  [cuda if there is one, else cpu]")
@click.option("--field", default="text", show_default=True, help="The key of the text in JSON lines and datasets.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and write nothing.")
@click.option("--strict", is_flag=True, help="Refuse NaN and infinity instead of counting them.")
@click.option("--accept-numerics", is_flag=True, help="Go on although batch size, device, threads or versions differ.")
@JSON
def extract(model: str, corpus: tuple[str, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Run MODEL (a folder or hub name, or `demo`) over CORPUS, and store its activations.

    CORPUS is text, .jsonl, .parquet or .npy files, dataset folders, or the name of a dataset on the hub. The
    same command goes on after an interruption.
    """
    with stoppable(_GOES_ON.format(out)):
        _extract(model, corpus, out, options, as_json=as_json)


def _extract(model: str, corpus: tuple[str, ...], out: Path, options: dict[str, Any], *, as_json: bool) -> None:
    rank = find_rank()
    # One worker tells how far all of them are.
    console = Console(stderr=True, quiet=rank.number > 0)
    device = options["device"] or _device(rank)
    plan_threads(out, rank)
    job = Extraction(
        load_model(model, options["compute_dtype"]),
        load_tokenizer(model),
        out,
        sites=names(options["sites"]),
        layers=layer_numbers(options["layers"]),
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
            print_json(vars(survey))
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
    if rank.number > 0:
        return
    if as_json:
        print_json(overview(store.path))
    else:
        draw_overview(Console(), overview(store.path))


def _device(rank: Rank) -> str:
    """Give each of the workers on a machine a device of its own, as long as there are enough."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{rank.local % torch.cuda.device_count()}" if rank.launcher else "cuda"


@click.command()
@click.argument("model")
@click.option("--sites", help="Only these, module paths included, by comma.")
@JSON
def sites(model: str, sites: str | None, as_json: bool) -> None:
    """Say which activations MODEL has: each site, its modules, its shape."""
    loaded = load_model(model, None)
    found = resolve(loaded, names(sites)) if sites else describe(loaded)
    rows = sites_table(found, probe(loaded, [site.name for site in found]))
    if as_json:
        print_json(rows)
    else:
        draw_rows(Console(), f"{type(loaded).__name__}", rows)
