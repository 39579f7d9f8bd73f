"""`mmcache info`, which imports no torch, so that it answers at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mmcache.cli.options import JSON, PATH, print_json
from mmcache.cli.render import draw_overview
from mmcache.read.describe import overview

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["info"]


@click.command()
@PATH
@JSON
def info(path: Path, as_json: bool) -> None:
    """Show model, shape, size and completeness of a store."""
    view = overview(path)
    if as_json:
        print_json(view)
    else:
        draw_overview(Console(), view)
    if not view["complete"]:
        sys.exit(1)
