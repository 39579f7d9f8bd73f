"""The commands on whole stores: `mmcache export`, `verify`, `repair`, `push` and `pull`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mmcache.cli.options import DTYPES, FOLDER, JSON, LEVEL, PATH, layer_numbers, names, print_json
from mmcache.cli.progress import BytesBar, stoppable
from mmcache.cli.render import draw_exported, draw_pairs, draw_repaired, draw_report
from mmcache.ops.export import export as export_store
from mmcache.ops.repair import repair as repair_store
from mmcache.ops.transfer import pull as pull_store
from mmcache.ops.transfer import push as push_store
from mmcache.ops.verify import verify as verify_store
from mmcache.text import size

if TYPE_CHECKING:
    from mmcache.ops.transfer import Transferred
    from mmcache.ops.verify import Level

__all__ = ["export", "pull", "push", "repair", "verify"]


@click.command()
@FOLDER
@click.option("--to", required=True, type=click.Choice(["safetensors", "npy"]), help="Kind of files.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--sites", help="Only these sites, separated by commas.")
@click.option("--layers", help="Only these layers, such as 0-5,8.")
@click.option("--dtype", type=DTYPES, help="Cast to this dtype.  [as stored; bfloat16 in npy as uint16 bits]")
@JSON
def export(path: Path, to: Any, out: Path, sites: str | None, layers: str | None, dtype: Any, as_json: bool) -> None:
    """Export a store, or a part of it, to other formats.

    The files can be read without mmcache. Whole shards become hard links. A link is the store's own file: editing
    it damages the store.
    """
    wanted, numbers = names(sites) if sites else None, layer_numbers(layers)
    with stoppable("Nothing was exported"), BytesBar(Console(stderr=True)) as bar:
        done = export_store(path, out, to=to, sites=wanted, layers=numbers, dtype=dtype, progress=bar.update)
    if as_json:
        print_json({**vars(done), "path": str(done.path)})
    else:
        draw_exported(Console(), done)


@click.command()
@PATH
@LEVEL
@JSON
def verify(path: Path | str, level: Level, as_json: bool) -> None:
    """Check a store for damage. Exit code 1 if there is any."""
    with stoppable("Nothing was changed"), BytesBar(Console(stderr=True)) as bar:
        report = verify_store(path, level, progress=bar.update)
    if as_json:
        print_json({**asdict(report), "ok": report.ok})
    else:
        draw_report(Console(), report)
    if not report.ok:
        sys.exit(1)


@click.command()
@FOLDER
@LEVEL
@JSON
def repair(path: Path, level: Level, as_json: bool) -> None:
    """Move bad files of a store aside.

    Then the rest can be read, and `extract` can make them again. Nothing is deleted: bad files go to PATH/.set-aside.
    Exit code 1 if anything is lost or could not be repaired.
    """
    with stoppable(f"Run the same command to resume with {path}"), BytesBar(Console(stderr=True)) as bar:
        done = repair_store(path, level, progress=bar.update)
    if as_json:
        print_json(asdict(done))
    else:
        draw_repaired(Console(), done)
    if done.lost or done.left:
        sys.exit(1)


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
