"""Make the golden stores of the current version.

They are tests/whole_product/golden/v<version>-<name>.zip, which every later version must read.

Usage: .venv/bin/python scripts/make_golden.py [--folder DIR]

Their values are computed (`value`), so that tests need no other copy; only the planned store holds activations, of the
demo model on `TEXTS`. A version's files are made once: existing files are never changed. Version 2 begins with stores
that flag first tokens; a cache has no tokens, and is of version 1.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmcache
from mmcache.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["GROWN", "STORES", "TEXTS", "value"]

FOLDER = Path(__file__).parents[1] / "tests" / "whole_product" / "golden"
# The earliest date that a zip file can hold.
_DAY = (1980, 1, 1, 0, 0, 0)
# A grown store's sequence lengths, sites and special tokens.
GROWN: Mapping[str, Any] = {
    "lengths": (5, 300, 1, 210),
    "sites": {"mlp_in": 16, "mlp_out": 8},
    "n_layers": 3,
    "special": [0],
}
TEXTS = ["import os\n", "class Golden:\n    pass\n" * 3, "def f(x):\n    return x\n" * 4]


def value(layers: int, start: int, stop: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of the rows: `[layers, stop - start, width]`, whole numbers that every dtype represents exactly."""
    layer, position, dimension = torch.meshgrid(
        torch.arange(layers), torch.arange(start, stop), torch.arange(width), indexing="ij"
    )
    return ((layer * 31 + position * 7 + dimension * 3) % 251 - 125).to(dtype)


def _grown(path: Path, layout: Any, dtype: torch.dtype) -> None:
    with mmcache.create(
        path, sites=GROWN["sites"], n_layers=GROWN["n_layers"], layout=layout, dtype=dtype, shard_tokens=256,
        special_tokens=GROWN["special"], metadata={"made by": "make_golden.py"},
    ) as writer:  # fmt: skip
        for length in GROWN["lengths"]:
            start = writer.n_tokens
            rows = {
                site: value(GROWN["n_layers"], start, start + length, width, dtype)
                for site, width in GROWN["sites"].items()
            }
            writer.append(torch.arange(start, start + length) % 50, rows)


def _cache(path: Path) -> None:
    with mmcache.FullActivationCache.with_capacity(3, path, shard_tokens=256) as cache:
        for layer in value(3, 0, 700, 16, torch.float16):
            cache.push(layer)


def _planned(path: Path) -> None:
    model = load_model("demo", None)
    # Otherwise it is a folder on this machine.
    model.config._name_or_path = "demo"  # type: ignore[union-attr] # noqa: SLF001 -- how transformers keeps it
    mmcache.extract(
        model,
        load_tokenizer("demo"),
        TEXTS,
        path,
        sites=["mlp_in", "mlp_out"],
        layers=[1, 3],
        context_length=32,
        shard_tokens=64,
    )


STORES: Mapping[str, Callable[[Path], None]] = {
    "v2-token-bfloat16": lambda path: _grown(path, "token", torch.bfloat16),
    "v2-layer-float32": lambda path: _grown(path, "layer", torch.float32),
    "v2-token-float64": lambda path: _grown(path, "token", torch.float64),
    "v1-cache-float16": _cache,
    "v2-planned-bfloat16": _planned,
}


def main() -> None:
    """Make the stores that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in STORES.items():
        target = folder / f"{name}.zip"
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "store"
            make(path)
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
                for file in sorted(path.rglob("*")):
                    if file.is_file():
                        said = zipfile.ZipInfo(str(file.relative_to(path)), _DAY)
                        said.compress_type = zipfile.ZIP_DEFLATED
                        packed.writestr(said, file.read_bytes())


if __name__ == "__main__":
    main()
