"""`mmcache view`: the page."""

from __future__ import annotations

from pathlib import Path

import click

from mmcache.commands.shared import PATH
from mmcache.errors import ArgumentError

__all__ = ["view"]


@click.command()
@PATH
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="To serve on.  [one that is free]")
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="A .npy or .safetensors file of one vector, to look along.",
)
@click.option("--unembedding", metavar="MODEL", help="The model whose head the logit lens uses.")
def view(path: Path, port: int, no_browser: bool, direction: Path | None, unembedding: str | None) -> None:
    """Look at the store at PATH in the browser: a page on this machine, for you alone, until Ctrl-C."""
    try:
        from mmcache.view.page import serve  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise ArgumentError(f"the page needs {error.name}: pip install 'mmcache[view]'") from error

    def announce(url: str) -> None:
        click.echo(url)
        click.echo("Press Ctrl-C to end.", err=True)

    serve(path, port=port, open_browser=not no_browser, direction=direction, unembedding=unembedding, announce=announce)
