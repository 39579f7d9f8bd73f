"""`mmcache export`, `mmcache verify` and `mmcache repair`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mmcache.cli.options import DTYPES, FOLDER, JSON, LEVEL, PATH, layer_numbers, names, print_json
from mmcache.cli.progress import BytesBar
from mmcache.cli.signals import stoppable
from mmcache.cli.terminal import draw_exported, draw_repaired, draw_report
from mmcache.ops.export import export as export_store
from mmcache.ops.repair import repair as repair_store
from mmcache.ops.verify import verify as verify_store

if TYPE_CHECKING:
    from mmcache.ops.verify import Level

__all__ = ["export", "repair", "verify"]


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
