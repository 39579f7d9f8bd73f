"""`mmcache view`: the page."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import click

from mmcache.cli.options import PATH, TRUST
from mmcache.cli.signals import ended_at_once
from mmcache.errors import ArgumentError

__all__ = ["view"]


@click.command()
@PATH
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to serve on.  [any free port]")
@click.option("--no-browser", is_flag=True, help="Print the address only; do not open a browser.")
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="A .npy or .safetensors file with one vector: a direction to show.",
)
@click.option("--unembedding", metavar="MODEL", help="Model whose unembedding the logit lens uses.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the address and a token for scripts, as JSON.")
def view(
    path: Path,
    port: int,
    no_browser: bool,
    direction: Path | None,
    unembedding: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Open a store in a browser.

    The page is served from this machine to you alone, until Ctrl-C. The printed address opens the page once; after
    that, a new one is printed. Scripts can request the data of each panel at /PANEL.json, with the header
    "Authorization: Bearer TOKEN"; --json prints the token.
    """
    with ended_at_once() as tidy:
        try:
            from mmcache.view.server import serve  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise ArgumentError(f"the page needs {error.name}: pip install 'mmcache[view]'") from error

        def announce(url: str, token: str) -> None:
            click.echo(json.dumps({"url": url, "token": token}) if as_json else url)

        serve(
            path, tidy=tidy, port=port, open_browser=not no_browser, direction=direction, unembedding=unembedding,
            trust_remote_code=trust_remote_code, announce=announce, tell=functools.partial(click.echo, err=True),
        )  # fmt: skip
