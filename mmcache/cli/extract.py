"""The commands that run a model: `mmcache extract` and `mmcache sites`."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from mmcache.cli.options import DTYPES, JSON, TRUST, layer_numbers, names, print_json
from mmcache.cli.progress import ProgressBar, stoppable
from mmcache.cli.render import draw_overview, draw_rows, draw_survey
from mmcache.cluster import extract as cluster_extract
from mmcache.cluster import named
from mmcache.extraction.bucket_upload import planned_in_bucket, staging_folder
from mmcache.extraction.corpus import check_sources, read_texts
from mmcache.extraction.job import Extraction
from mmcache.extraction.provenance import plan_threads
from mmcache.extraction.special_tokens import BOS_CHOICES
from mmcache.models.capture import probe
from mmcache.models.loading import load_model, load_tokenizer
from mmcache.models.sites import describe, resolve
from mmcache.read.describe import overview
from mmcache.storage.connection import placed
from mmcache.system.launcher import find_rank
from mmcache.urls import is_url, redacted

if TYPE_CHECKING:
    from mmcache.extraction.estimate import Survey
    from mmcache.models.sites import ResolvedSite
    from mmcache.read.store import Store
    from mmcache.system.launcher import Rank

__all__ = ["extract", "sites"]

_RESUME = "What is finished is in {}; run the same command to resume"


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
@click.option("--out", required=True, help="The store to create or resume: a folder, or s3://bucket/prefix.")
@click.option(
    "--sites",
    default="mlp_in,mlp_out",
    show_default=True,
    help="Which activations, separated by commas; `mmcache sites MODEL` lists them.",
)
@click.option("--layers", help="Which layers, such as 0-5,8.  [all]")
@click.option("--context-length", type=int, help="Maximum tokens per context.  [1024, or the model's maximum]")
@click.option(
    "--pack",
    is_flag=True,
    help="Put several documents into one context; they attend to each other. Without: one document per context.",
)
@click.option(
    "--bos", type=click.Choice(BOS_CHOICES), default="auto", show_default=True,
    help="Begin contexts with a BOS: as the tokenizer does, always, or never.",
)  # fmt: skip
@click.option("--batch-size", default="8", show_default=True, help="Contexts per forward pass, or auto.")
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True, help="Storage dtype.")
@click.option("--compute-dtype", type=DTYPES, help="Dtype the model computes in.  [as its checkpoint]")
@click.option(
    "--layout", type=click.Choice(["token", "layer"]), default="token", show_default=True,
    help="token: all layers of a token side by side, for training. layer: each layer apart.",
)  # fmt: skip
@click.option("--shard-tokens", type=int, help="Tokens per shard.  [256 MiB of the widest site]")
@click.option("--max-tokens", type=int, help="Store whole contexts up to this many tokens. Can be raised later.")
@click.option("--device", help="Device of the model.  [cuda if available, else cpu]")
@click.option("--device-map", help="Spread a model over several GPUs, as in transformers: auto, balanced, …")
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Run on a Ray cluster: host:port of its head, or auto. Without ADDRESS: this machine.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="With --ray: number of workers.  [one per GPU, else one per machine]"
)
@click.option("--num-gpus", type=click.FloatRange(min=0), help="With --ray: GPUs per worker.  [1 if there are any]")
@click.option(
    "--field", default="text", show_default=True, help="Key or column of the text in .jsonl, .parquet and datasets."
)
@click.option("--dry-run", is_flag=True, help="Estimate size and time, and write nothing.")
@click.option(
    "--staging",
    type=click.Path(path_type=Path),
    help="With a bucket: folder for shards to upload.  [below the user's cache folder]",
)
@click.option(
    "--staging-bytes",
    type=int,
    help="With a bucket: maximum size of that folder.  [4 GiB, or a quarter of the free space]",
)
@click.option("--strict", is_flag=True, help="Stop at NaN or infinity instead of counting them.")
@click.option("--accept-numerics", is_flag=True, help="Resume although batch size, device, threads or versions differ.")
@TRUST
@JSON
def extract(model: str, corpus: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Run MODEL over CORPUS, and store its activations.

    MODEL is a folder, a name on the Hugging Face hub, or `demo`. CORPUS is text, .jsonl, .parquet or .npy files,
    dataset folders, or the name of a dataset on the hub. After an interruption, run the same command to resume.
    """
    out = str(placed(out))
    left = f"{out}, what was not sent yet in {staging_folder(out, options['staging'])}" if is_url(out) else out
    with stoppable(_RESUME.format(left)):
        _extract(model, corpus, out, options, as_json=as_json)


def _extract(model: str, corpus: tuple[str, ...], out: str, options: dict[str, Any], *, as_json: bool) -> None:
    rank = find_rank()
    # One worker shows the progress of all.
    console = Console(stderr=True, quiet=not rank.leads)
    what = {
        "sites": names(options["sites"]),
        "layers": layer_numbers(options["layers"]),
        "context_length": options["context_length"],
        "pack": options["pack"],
        "bos": options["bos"],
        "batch_size": _batch_size(options["batch_size"]),
        "dtype": options["dtype"],
        "layout": options["layout"],
        "shard_tokens": options["shard_tokens"],
        "max_tokens": options["max_tokens"],
        "device": options["device"],
        "record": {"command": redacted(shlex.join(["mmcache", *sys.argv[1:]])), "corpus": [*map(redacted, corpus)]},
    }
    _check_ray(options, rank, out)
    check_sources(corpus)
    if options["address"] is not None:
        store = _by_ray(model, corpus, out, options, what, console)
    else:
        what["device"] = options["device"] or (None if options["device_map"] else _device(rank))
        plan_threads(Path(out), rank, planned_in_bucket(out, options["staging"]))
        trusted = {"trust_remote_code": options["trust_remote_code"]}
        loaded = load_model(model, options["compute_dtype"], device_map=options["device_map"], **trusted)
        staged = {name: options[name] for name in ("staging", "staging_bytes")}
        job = Extraction(loaded, load_tokenizer(model, **trusted), out, **what, **staged)
        texts = read_texts(corpus, field=options["field"])
        if options["dry_run"]:
            _print_survey(job.survey(texts), as_json=as_json)
            return
        with ProgressBar(console) as bar:
            store = job.run(texts, **_running(options, console, bar))
    if not rank.leads:
        return
    found = overview(store.where)
    if as_json:
        print_json(found)
    else:
        draw_overview(Console(), found)


def _running(options: dict[str, Any], console: Console, bar: ProgressBar) -> dict[str, Any]:
    return {
        "accept_numerics": options["accept_numerics"],
        "strict": options["strict"],
        "planned": lambda survey: draw_survey(console, survey),
        "progress": bar.update,
    }


def _print_survey(survey: Survey, *, as_json: bool) -> None:
    if as_json:
        print_json(vars(survey))
    else:
        draw_survey(Console(), survey)


def _check_ray(options: dict[str, Any], rank: Rank, out: str) -> None:
    """Check options that need a cluster, or do not work with one. Raises UsageError."""
    if options["device_map"] and options["device"]:
        raise click.UsageError("--device-map says where the model runs: leave --device out")
    if not is_url(out) and (options["staging"] or options["staging_bytes"]):
        raise click.UsageError("--staging and --staging-bytes are for a store in a bucket: leave them out")
    if options["address"] is None:
        given = [name for name in ("workers", "num_gpus") if options[name] is not None]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} is for --ray: say which cluster, or leave it out")
    elif is_url(out):
        raise click.UsageError(
            "--ray needs a folder that all machines see, not a bucket: leave --ray out, and start the same command on "
            "each machine, by torchrun or as a job array"
        )
    elif options["dry_run"]:
        raise click.UsageError("--dry-run measures on this machine: leave --ray out")
    elif rank.of > 1:
        raise click.UsageError(
            f"{rank.launcher} started this {rank.of} times, and --ray starts workers by itself: start it once"
        )


def _by_ray(
    model: str, corpus: tuple[str, ...], out: str, options: dict[str, Any], what: dict[str, Any], console: Console
) -> Store:
    name, trusted = named(model), {"trust_remote_code": options["trust_remote_code"]}
    # Ray reports lost machines on stdout, which is for data.
    with redirect_stdout(sys.stderr), ProgressBar(console) as bar:
        return cluster_extract(
            partial(load_model, name, options["compute_dtype"], device_map=options["device_map"], **trusted),
            partial(load_tokenizer, name, **trusted),
            partial(read_texts, [named(source) for source in corpus], field=options["field"]),
            out,
            address=options["address"] or None,
            workers=options["workers"],
            num_gpus=options["num_gpus"],
            **_running(options, console, bar),
            **what,
        )


def _device(rank: Rank) -> str:
    """The device of this worker: its own GPU, as long as the machine has enough."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{rank.local % torch.cuda.device_count()}" if rank.launcher else "cuda"


@click.command()
@click.argument("model")
@click.option("--sites", help="Only these sites or module paths, separated by commas.")
@TRUST
@JSON
def sites(model: str, sites: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """List the sites of MODEL, with their modules and shapes."""
    loaded = load_model(model, None, trust_remote_code=trust_remote_code)
    found = resolve(loaded, names(sites)) if sites else describe(loaded)
    rows = _sites_table(found, probe(loaded, [site.name for site in found]))
    if as_json:
        print_json(rows)
    else:
        draw_rows(Console(), f"{type(loaded).__name__}", rows)


def _sites_table(sites: tuple[ResolvedSite, ...], widths: dict[str, int]) -> list[dict[str, Any]]:
    """For each site of a model: the module whose input or output it is, and its shape."""
    return [
        {
            "site": site.name,
            "modules": f"{site.modules[0]}:{site.side}"
            + (f" … {site.modules[-1]}:{site.side}" if len(site.modules) > 1 else ""),
            "n_layers": len(site.layers),
            "shape": ["batch", "seq", widths[site.name]],
        }
        for site in sites
    ]
