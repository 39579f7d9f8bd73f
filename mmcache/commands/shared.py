"""What commands share: options, JSON, and lists of names and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmcache.plain import json_ready

__all__ = ["DTYPES", "JSON", "LEVEL", "PATH", "SITE", "layer_numbers", "names", "print_json"]

DTYPES = click.Choice(["float32", "float16", "bfloat16", "float64"])
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
PATH = click.argument("path", type=click.Path(path_type=Path))
LEVEL = click.option(
    "--level", type=click.Choice(["full", "quick"]), default="full", show_default=True,
    help="Every byte, or presence, sizes, headers and metadata.",
)  # fmt: skip
SITE = click.option("--site", help="Only this site.")


def print_json(data: Any) -> None:
    """Print plain data as JSON; NaN and infinities as zarr writes them."""
    click.echo(json.dumps(json_ready(data), indent=2, ensure_ascii=False, allow_nan=False))


def names(text: str) -> list[str]:
    """Read a list by comma."""
    return [name.strip() for name in text.split(",")]


def layer_numbers(text: str | None) -> list[int] | None:
    """Read `0-5,8` as layer numbers."""
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
