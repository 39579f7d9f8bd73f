"""`mmcache push` and `mmcache pull`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mmcache.cli.options import JSON, PATH, layer_numbers, names, print_json
from mmcache.cli.progress import BytesBar
from mmcache.cli.signals import stoppable
from mmcache.cli.tables import draw_pairs
from mmcache.ops.transfer import pull as pull_store
from mmcache.ops.transfer import push as push_store
from mmcache.text import size

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.ops.transfer import Transferred

__all__ = ["pull", "push"]

_URL = click.argument("url")
_SITES = click.option("--sites", help="Only these sites, separated by commas.")
_SEQUENCES = click.option(
    "--sequences", metavar="NUMBERS", help="Only the shards with these sequences, such as 100-200,300."
)
_AGAIN = "What was copied stays; run the same command to resume"


@click.command()
@PATH
@_URL
@_SITES
@_SEQUENCES
@JSON
def push(path: Path, url: str, sites: str | None, sequences: str | None, as_json: bool) -> None:
    """Copy a store, or a part of it, to object storage.

    URL is an address such as s3://bucket/acts. Shards are verified before they are sent. Run the same command to
    resume. Other --sites or --sequences are added to the copy. Exit code 1 if the store at PATH does not have
    everything that was asked for.
    """
    wanted, numbers = names(sites) if sites else None, layer_numbers(sequences)
    with stoppable(_AGAIN), BytesBar(Console(stderr=True)) as bar:
        done = push_store(path, url, sites=wanted, sequences=numbers, progress=bar.update)
    _say(done, as_json=as_json)


@click.command()
@_URL
@PATH
@_SITES
@_SEQUENCES
@JSON
def pull(url: str, path: Path, sites: str | None, sequences: str | None, as_json: bool) -> None:
    """Copy a store, or a part of it, from object storage.

    URL is an address such as s3://bucket/acts, PATH the folder to create. Shards are verified before they appear.
    Run the same command to resume. Other --sites or --sequences are added to the copy. Exit code 1 if the store at
    URL does not have everything that was asked for.
    """
    wanted, numbers = names(sites) if sites else None, layer_numbers(sequences)
    with stoppable(_AGAIN), BytesBar(Console(stderr=True)) as bar:
        done = pull_store(url, path, sites=wanted, sequences=numbers, progress=bar.update)
    _say(done, as_json=as_json)


def _say(done: Transferred, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done))
    else:
        pairs = {
            "from": done.source,
            "copied": f"{done.shards:,} shards, {size(done.bytes)}",
            "there already": f"{done.there:,} shards",
            "missing": f"{done.missing:,} shards, which {done.source} does not have" if done.missing else "none",
        }
        draw_pairs(Console(), done.destination, pairs)
    if done.missing:
        sys.exit(1)
