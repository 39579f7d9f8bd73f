"""Predict the cost of a store of activations before it is made: bytes, hours, the cost of each part, the bottleneck.

Usage: .venv/bin/python scripts/plan.py MODEL --tokens 100M [--gpus 8] [--sites mlp_in,mlp_out] [--json]

MODEL is gpt2, gemma-2-2b, llama-3-8b (and others), demo, a config.json or its folder, or LAYERS,WIDTH,PARAMETERS.
The library itself computes sizes, exact to the byte. Times come from figures whose source `--figures` shows; an option
or `--measure` replaces them. `--check` makes a small store of the demo model, and compares it with its plan.
Numbers may end in K, M, G, T or P (powers of 1000). Exit codes: 0 fine, 1 not as planned, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planning.drawing import draw
from planning.figures import GPUS, MEASURED_HERE, Figures, given
from planning.machine import Machine
from planning.models import PRESETS, find_model
from planning.reading import reading
from planning.size import measure, planned
from planning.writing import Job, outcome
from rich.console import Console

from mmcache.errors import ArgumentError, MmcacheError
from mmcache.format.dtypes import ACTIVATION_DTYPES
from mmcache.format.names import site_name_problem

if TYPE_CHECKING:
    from planning.models import Model

    from mmcache.format.manifest import Manifest

_MOST = 10**18


def number(text: str) -> float:
    """The number in a text such as `100M` or `1.1G`."""
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    factor = units.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number, such as 8, 100M or 1.1G")
    return value


def count(text: str) -> int:
    """The whole number in a text such as `8` or `100M`."""
    value = number(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, such as 8 or 100M")
    return int(value)


def arguments() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help=f"{', '.join(sorted(PRESETS))}, demo, a config.json, its folder, or L,D,PARAMETERS",
    )
    add("--tokens", type=count, help="how many")
    add("--sites", default="mlp_in,mlp_out", help="by comma; SITE=WIDTH where it is not as wide as the model")
    add("--layers", help="such as 0-11 or 0,5  [all]")
    add("--dtype", choices=sorted(ACTIVATION_DTYPES), default="bfloat16")
    add("--layout", choices=["token", "layer"], default="token")
    add("--shard-tokens", type=count)
    add("--context-length", type=count, default=1024)
    add("--sequences", type=count, help="contexts, where they are not full")
    add("--token-ids", action="store_true", help="the corpus is token ids, not text")
    add("--gpus", type=count, default=1)
    add("--workers", type=count, help="processes  [one a GPU]")
    add("--machines", type=count, help="[one for 8 workers]")
    add("--gpu", choices=[*sorted(GPUS), "cpu"], default="h100")
    add("--flops", type=number, help="what one GPU could do at its peak, operations/s, instead of --gpu")
    add("--mfu", type=number, default=0.4, help="the share of it that forward passes reach")
    add("--forward", type=number, help="tokens/s of the forward passes of all workers, where that was measured")
    add("--cores", type=count, default=os.cpu_count() or 1, help="of a machine without GPUs")
    add("--disk-write", type=number, help="bytes/s of one disk")
    add("--disk-read", type=number, help="bytes/s of one disk, at random")
    add("--disks", type=count, default=1, help="in all")
    add("--network", type=number, help="bits/s of one machine, where the store is on a shared file system")
    add("--names", type=number, help="names/s that a shared file system lists, for all workers together")
    add("--epochs", type=number, default=1)
    add("--train-tokens-per-second", type=number)
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to measure and check")
    add("--measure", action="store_true", help="measure this machine first, in about a minute")
    add("--check", action="store_true", help="make a small store of the demo model, and compare")
    add("--tolerance", type=number, default=0.25, help="by which share times may differ then")
    add("--figures", action="store_true", help="show the figures and their sources")
    add("--json", action="store_true")
    return parser


def widths_of(text: str, model: Model) -> dict[str, int]:
    """The sites and their widths."""
    widths = {}
    for one in text.split(","):
        name, _, width = one.strip().partition("=")
        problem = site_name_problem(name)
        if problem or name in widths or (width and not (width.isdecimal() and 0 < int(width) < 1 << 24)):
            raise ArgumentError(
                f"--sites: {one.strip()!r}: {problem or 'it is there twice, or its width is no number'}"
            )
        widths[name] = int(width) if width else model.width
    return widths


def layers_of(text: str | None, most: int) -> tuple[int, ...]:
    """The layers asked for."""
    if text is None:
        return tuple(range(most))
    found: set[int] = set()
    for one in text.split(","):
        first, dash, last = one.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"--layers: {one.strip()!r}: expected a layer, or two with a dash between")
        low, high = int(first), int(last or first)
        if not low <= high < most:
            raise ArgumentError(f"--layers: {one.strip()!r}: the model has layers 0 to {most - 1}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def machine_of(said: argparse.Namespace) -> Machine:
    """The machine that the options describe."""
    gpus = 0 if said.gpu == "cpu" and said.flops is None else said.gpus
    workers = said.workers or max(1, gpus)
    if said.mfu > 1:
        raise ArgumentError(f"--mfu is {said.mfu:g}: expected a share, up to 1")
    if not gpus and not said.forward and not said.check:
        raise ArgumentError("without a GPU say what the forward passes reach, in tokens/s: --forward")
    machines = said.machines or -(-workers // 8)
    if machines > workers:
        raise ArgumentError(f"--machines is {machines}, more than the {workers} workers there are")
    return Machine(
        gpus=gpus,
        workers=workers,
        machines=machines,
        disks=said.disks,
        cores=said.cores,
        peak=said.flops or GPUS.get(said.gpu, 0.0),
        mfu=said.mfu,
        forward=said.forward,
        network=said.network,
        names=said.names,
    )


def figures_of(said: argparse.Namespace, manifest: Manifest, progress: Console) -> Figures:
    """The constants: from the table, replaced by measurements, then by the options."""
    figures = dict(MEASURED_HERE)
    if said.measure:
        # torch takes seconds to import, and the arithmetic needs none.
        from planning.measuring import measured  # noqa: PLC0415

        figures |= measured(said.folder, manifest, lambda line: progress.print(line, markup=False, highlight=False))
    given(figures, "disk write", said.disk_write)
    given(figures, "disk read", said.disk_read)
    return figures


def plan_of(said: argparse.Namespace, progress: Console) -> dict[str, Any]:
    """The plan, as `--json` prints it."""
    model = find_model(said.model)
    layers, widths = layers_of(said.layers, model.layers), widths_of(said.sites, model)
    if said.tokens is None:
        raise ArgumentError("--tokens is missing: how many tokens the store is to hold")
    sequences = said.sequences or -(-said.tokens // said.context_length)
    if not -(-said.tokens // said.context_length) <= sequences <= said.tokens:
        raise ArgumentError(f"--sequences is {sequences}: {said.tokens} tokens are not so many contexts")
    manifest = planned(
        widths, layers, said.tokens, sequences, dtype=said.dtype, layout=said.layout, shard_tokens=said.shard_tokens
    )
    machine, figures = machine_of(said), figures_of(said, manifest, progress)
    job = Job(model, measure(manifest), machine, layers[-1] + 1, said.context_length, as_text=not said.token_ids)
    found = outcome(job, figures)
    return {
        "model": asdict(model),
        "store": {**job.size.to_json(), "layers": list(layers), "dtype": said.dtype, "layout": said.layout},
        "machine": asdict(machine),
        "writing": {
            "seconds": found.seconds,
            "together_seconds": found.together,
            "gpu_hours": machine.gpus * found.seconds / 3600,
            "bottleneck": found.bottleneck.name,
            "times": found.times,
            "runner_up": found.runner_up.name,
            "remedy": found.bottleneck.remedy,
            "parts": [asdict(part) for part in found.parts],
        },
        "reading": reading(job, figures, epochs=said.epochs, wanted=said.train_tokens_per_second),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
    }


def run_check(said: argparse.Namespace, console: Console) -> int:
    """Make a small store, and compare it with its plan."""
    from planning.checking import check, differences  # noqa: PLC0415 -- as above

    checked = check(said.folder, machine_of(said), dict(MEASURED_HERE), tokens=said.tokens or 1 << 17)
    wrong = differences(checked, said.tolerance)
    if said.json:
        print(json.dumps({"checked": checked, "tolerance": said.tolerance, "wrong": wrong}, indent=1))
        return bool(wrong)
    for name, one in checked.items():
        line = f"{name}: {one['planned']:,.6g} planned, {one['found']:,.6g} found"
        console.print(line, markup=False, highlight=False)
    console.print("as planned" if not wrong else f"NOT AS PLANNED: {'; '.join(wrong)}", markup=False, highlight=False)
    return bool(wrong)


def main() -> int:
    """Print a plan, or run the check."""
    parser = arguments()
    said = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    try:
        if said.check:
            if said.model != "demo":
                raise ArgumentError(f"--check makes a store of the model demo, not of {said.model}")
            return run_check(said, console)
        plan = plan_of(said, Console(stderr=True))
    except (MmcacheError, OSError) as error:
        parser.error(str(error))
    if said.json:
        print(json.dumps(plan, indent=1))
    else:
        draw(console, plan, sources=said.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
