"""Benchmark mmcache against the hardware's limits and its peers, in one run. Prints a table; writes JSON and a plot.

Usage: .venv/bin/python scripts/bench.py [--quick] [--only rows,writes] [--size 8G] [--folder DIR] [--json FILE]

Each row compares two sides that were measured alternately, in one process or in paired ones: the median of the repeats'
ratios, and their interquartile range. Above 1, mmcache is faster. Writes are timed to the end of the sync. Cold means
that the page cache was dropped, and that this was checked. Peers run as their users run them, and the row says how; the
extra `bench` installs them. For anything that could not be measured, the reason is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import crowded, device, extraction, feeding, growth, looking, reading, remote, writing
from benchmarks.floors import check, record
from benchmarks.machine import describe
from benchmarks.measure import Plan, Row, Series, Skip
from benchmarks.plot import draw
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Found = Row | Series | Skip
GROUPS: Mapping[str, tuple[Callable[[Plan], Iterator[Found]], ...]] = {
    "writes": (writing.writes, writing.staging),
    "rows": (reading.cold_rows, reading.warm_rows),
    "gathers": (reading.cold_gathers, reading.warm_gathers),
    "feed": (feeding.feeds,),
    "busy": (crowded.crowded,),
    "shards": (growth.many_shards,),
    "looking": (looking.looks,),
    "extract": (extraction.extraction, extraction.against_saelens),
    "bucket": (remote.from_a_bucket,),
    "memory": (writing.memory,),
    "peer-writes": (writing.peer_writes,),
    "peer-loaders": (feeding.loaders,),
    "growth": (growth.by_shards, growth.by_length, growth.by_layers),
    "gpu": (device.on_device,),
}
FLOORS = Path(__file__).with_name("bench-floors.json")


def size_of(text: str) -> int:
    """The bytes in a text such as `512M` or `8G`."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        return int(float(number) * (1 << units.get(unit, 0)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of bytes, such as 512M or 8G") from None


def groups_of(text: str) -> list[str]:
    """The names of groups in a comma-separated list."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(GROUPS)}")
    return names


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure"
    )
    parser.add_argument(
        "--size", type=size_of, help="bytes of the stores that are read; half is written  [8G, quick 512M]"
    )
    parser.add_argument("--peer-size", type=size_of, help="bytes that peers' loaders read  [all, quick 192M]")
    parser.add_argument("--repeats", type=int, help="[5, quick 3]")
    parser.add_argument("--tokens", type=int, help="tokens to extract  [12288, quick 2048]")
    parser.add_argument("--quick", action="store_true", help="less of everything, in under three minutes")
    parser.add_argument("--gpu", action="store_true", help="measure what needs a GPU too")
    parser.add_argument("--only", type=groups_of, help=f"groups, by comma: {', '.join(GROUPS)}")
    parser.add_argument("--saelens-python", help="a Python in whose environment sae-lens is installed")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--plot", type=Path, help="where to draw them, .png or .svg")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is below its recorded floor")
    parser.add_argument("--record", action="store_true", help="record the floors that --check compares with")
    parser.add_argument("--floors", type=Path, default=FLOORS, help=argparse.SUPPRESS)
    return parser.parse_args()


def table_of(rows: list[Row], machine: Mapping[str, str]) -> Table:
    """A table of the rows."""
    table = Table(title=", ".join(f"{name} {said}" for name, said in machine.items()), title_justify="left")
    for name in ("what", "beside", "unit", "ours", "beside's", "ratio", "spread", "goal"):
        table.add_column(name, overflow="fold")
    for row in rows:
        goals = [f"{row.goal:.2f}"] if row.goal is not None else []
        goals += [f"{row.limit:g} {row.unit}"] if row.limit is not None else []
        met = {None: "", True: " met", False: " MISSED"}[row.met]
        numbers = [f"{value:.3g}" for value in (row.ours, row.theirs, row.ratio, row.spread)]
        table.add_row(row.what, row.beside, row.unit, *numbers, " and ".join(goals) + met)
    return table


def save(path: Path | None, given: argparse.Namespace, machine: Mapping[str, str], found: list[Found]) -> None:
    """Write everything found so far."""
    if path is None:
        return
    kinds = {Row: "rows", Series: "series", Skip: "skipped"}
    said: dict[str, object] = {"machine": machine, "settings": {"size": given.size, "repeats": given.repeats}}
    for kind, name in kinds.items():
        said[name] = [{**asdict(one), "met": one.met} if isinstance(one, Row) else asdict(one)
                      for one in found if isinstance(one, kind)]  # fmt: skip
    path.write_text(json.dumps(said, indent=1) + "\n")


def main() -> None:
    """Measure, print a table, write JSON, draw; with --check, exit 1 if anything became slower."""
    given = arguments()
    given.size = given.size or (512 << 20 if given.quick else 8 << 30)
    given.repeats = given.repeats or (3 if given.quick else 5)
    tokens = given.tokens or (2048 if given.quick else 12288)
    peer_size = given.peer_size or (192 << 20 if given.quick else given.size)
    # A file or a pipe has no width: wide enough for a row to take one or two lines.
    console = Console() if sys.stdout.isatty() else Console(width=180)
    progress = Console(stderr=True)
    began = time.monotonic()
    machine, found = describe(given.folder), []
    folder = Path(tempfile.mkdtemp(prefix="mmcache-bench-", dir=given.folder))
    try:
        plan = Plan(folder, given.size, given.repeats, given.quick, tokens, peer_size, given.saelens_python)
        for group in given.only or [name for name in GROUPS if name != "gpu" or given.gpu]:
            for measure in GROUPS[group]:
                for one in measure(plan):
                    found.append(one)
                    save(given.json, given, machine, found)
                    said = f"{one.ratio:.3g} (spread {one.spread:.2g})" if isinstance(one, Row) else ""
                    said = f"skipped: {one.reason}" if isinstance(one, Skip) else said
                    line = f"{time.monotonic() - began:5.0f} s  {group}: {one.name} {said}"
                    progress.print(line, highlight=False, markup=False, soft_wrap=True)
    finally:
        shutil.rmtree(folder)
    rows = [one for one in found if isinstance(one, Row)]
    console.print(table_of(rows, machine), markup=False)
    for one in found:
        if isinstance(one, Skip):
            console.print(f"not measured: {one.name}: {one.reason}", markup=False, soft_wrap=True)
    if given.plot:
        draw(given.plot, rows, [one for one in found if isinstance(one, Series)])
    mode = "quick" if given.quick else "full"
    if given.record:
        record(given.floors, mode, rows)
    if given.check:
        slower = check(given.floors, mode, rows)
        for line in slower:
            console.print(line, markup=False)
        sys.exit(bool(slower))


if __name__ == "__main__":
    main()
