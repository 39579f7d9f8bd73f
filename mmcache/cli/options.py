"""What the commands share: options, JSON output, and parsing of lists of names and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmcache.storage.connection import placed
from mmcache.text import json_ready, plain_json, visible

if TYPE_CHECKING:
    from mmcache.read.store import Store

__all__ = [
    "CONTEXT",
    "DIRECTION",
    "DTYPES",
    "JSON",
    "LEVEL",
    "PATH",
    "SITE",
    "TRUST",
    "layer_numbers",
    "names",
    "one_site",
    "print_json",
]

DTYPES = click.Choice(["float32", "float16", "bfloat16", "float64"])
TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code from the model's folder. It can do anything."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


class _Place(click.ParamType[Any]):
    """A folder as a Path, or an address in a bucket without its credentials."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002 -- click's signature
        return placed(value)


PLACE = _Place()
PATH = click.argument("path", type=PLACE)
FOLDER = click.argument("path", type=click.Path(path_type=Path))
LEVEL = click.option(
    "--level", type=click.Choice(["full", "quick"]), default="full", show_default=True,
    help="full: every byte. quick: presence, sizes, headers and metadata.",
)  # fmt: skip
SITE = click.option("--site", help="Only this site.")
CONTEXT = click.option(
    "--context", type=click.IntRange(min=0), default=12, show_default=True, help="Tokens to show before and after each."
)
DIRECTION = click.option(
    "--direction", type=click.Path(path_type=Path), metavar="FILE",
    help="Use the dot product with the vector in a .npy or .safetensors file.",
)  # fmt: skip


def print_json(data: Any) -> None:
    """Print data as JSON; NaN and infinities as zarr writes them."""
    click.echo(plain_json(json.dumps(json_ready(data), indent=2, ensure_ascii=False, allow_nan=False)))


def one_site(store: Store, site: str | None) -> str:
    """The site asked for, or the only one.

    Raises:
        UsageError: none was asked for, and there are several.
    """
    if site is None and len(store.sites) > 1:
        raise click.UsageError(
            f"the store has several sites: choose one with --site ({visible(', '.join(store.sites))})"
        )
    return store.sites[0] if site is None else site


def names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",")]


def layer_numbers(text: str | None) -> list[int] | None:
    """The layer numbers in a text such as `0-5,8`; None for None."""
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
