"""`mmcache push` and `mmcache pull`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mmcache.commands.shared import JSON, PATH, layer_numbers, names, print_json
from mmcache.progress import BytesBar
from mmcache.signals import stoppable
from mmcache.tables import draw_pairs
from mmcache.transfer import pull as pull_store
from mmcache.transfer import push as push_store
from mmcache.units import size

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.transfer import Transferred

__all__ = ["pull", "push"]

_URL = click.argument("url")
_SITES = click.option("--sites", help="Only these, by comma.")
_SEQUENCES = click.option(
    "--sequences", metavar="NUMBERS", help="Only the shards in which these lie, such as 100-200,300."
)
_AGAIN = "What was copied stays; the same command goes on"


@click.command()
@PATH
@_URL
@_SITES
@_SEQUENCES
@JSON
def push(path: Path, url: str, sites: str | None, sequences: str | None, as_json: bool) -> None:
    """Copy the store at PATH to URL in object storage, such as s3://bucket/acts.

    Shards are verified before they are sent. The same command goes on where another one stopped, and adds what it was
    not told to copy before. Exit 1 if the store at PATH does not have all of what was asked for.
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
    """Copy the store at URL in object storage, or a part of it, into the folder PATH.

    Shards are verified before they have their names. The same command goes on where another one stopped, and adds what
    it was not told to copy before. Exit 1 if the store at URL does not have all of what was asked for.
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
