"""Views and progress on a terminal: tables on stdout, progress on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mmcache.export import Exported
    from mmcache.extract import Progress as Done
    from mmcache.findings import Finding, Report
    from mmcache.repair import Repaired
    from mmcache.survey import Survey

__all__ = [
    "BytesBar",
    "ProgressBar",
    "draw_exported",
    "draw_overview",
    "draw_repaired",
    "draw_report",
    "draw_rows",
    "draw_show",
    "draw_statistics",
    "draw_survey",
    "size",
]


# A command over a thousand files fills no screen; `--json` has it whole.
_COMMAND = 200
# Nor do ten thousand bad shards.
_MOST_LINES = 40


def size(count: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _pairs(title: str, pairs: dict[str, str]) -> Table:
    table = Table(title=Text(title, "table.title"), show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Draw records as a table, one a row; where all values of a column are alike it is still drawn."""
    table = Table(
        title=Text(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in rows[0] if rows else []:
        table.add_column(name.replace("_", " "), overflow="fold", min_width=4)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table, highlight=False, markup=False)


def draw_overview(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.overview`."""
    source = view["source"]
    record, identity = source.get("record", {}), source.get("identity", {})
    layers = f"{view['n_layers']} ({_ranges(view['layers'])})" if view["layers"] else "0"
    pairs = {
        "store": f"{view['kind']}, layout {view['layout']}, {'complete' if view['complete'] else 'NOT COMPLETE'}",
        "tokens": f"{view['n_tokens']:,} in {view['n_sequences']:,} sequences",
        "layers": layers,
        "dtype": str(view["dtype"]),
        "size": f"{size(view['bytes'])}, {view['shard_tokens']} tokens a shard",
    }
    if identity:
        revision = record.get("revision") or f"weights {identity['weights'][:12]}"
        corpus = source.get("tokenised", {})
        pairs |= {
            "model": f"{record.get('name') or identity['model']} ({identity['model']}, {revision}), computed in "
            f"{identity['compute_dtype']}",
            "tokenizer": identity["tokenizer"][:12],
            "corpus": f"{corpus.get('documents')} documents, {corpus.get('sha256', '')[:12]}",
            "contexts": f"up to {identity['context_length']} tokens, {'packed' if identity['pack'] else 'by document'}",
            "numerics": ", ".join(f"{name} {value}" for name, value in source["numerics"].items()),
            "made": f"{record.get('made')}, mmcache {record.get('mmcache')}",
        }
    if record.get("command"):
        command = record["command"]
        pairs["command"] = command if len(command) <= _COMMAND else f"{command[:_COMMAND]}…"
    if view["metadata"]:
        pairs["metadata"] = str(view["metadata"])
    console.print(_pairs(view["path"], pairs), highlight=False, markup=False)
    rows = [
        {
            "site": site,
            "shape": f"[{view['n_layers']}, {view['n_tokens']}, {said['d_model']}]",
            "shards": f"{said['shards'] - said['missing']} of {said['shards']}",
            "size": size(said["bytes"]),
            "modules": _modules(source, site),
        }
        for site, said in view["sites"].items()
    ]
    draw_rows(console, "sites", rows)


def _modules(source: dict[str, Any], site: str) -> str:
    modules = source.get("modules", {}).get(site, [])
    return f"{modules[0]} …" if len(modules) > 1 else "".join(modules)


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def draw_show(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.layer_view` or `view.row_view`, all but the values themselves."""
    pairs = {
        name.replace("_", " "): _cell(value)
        for name, value in view.items()
        if name not in ("site", "layer", "values", "largest")
    }
    if "largest" in view:
        pairs["largest"] = ", ".join(f"[{entry['dimension']}] {_cell(entry['value'])}" for entry in view["largest"])
    console.print(_pairs(f"{view['site']}, layer {view['layer']}", pairs), highlight=False, markup=False)


def draw_statistics(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.statistics_view`: norms and health, a layer a row."""
    rows = [
        {
            "layer": row["layer"],
            "rows": row["rows"],
            "mean_norm": f"{row['mean_norm']:.4g}",
            "from_to": f"{row['min_norm']:.3g} - {row['max_norm']:.3g}",
            "scale": f"{row['scalar_scale']:.4g}",
            "std": f"{row['std']:.3g}",
            "top_std": f"{row['largest_std']['value']:.3g} [{row['largest_std']['dimension']}]",
            "dead": row["dead_dimensions"],
            "zero": row["zero_rows"],
            "NaN/Inf": row["non_finite"] if row["first_non_finite"] < 0 else _located(row),
        }
        for row in view["layers"]
    ]
    draw_rows(console, f"{view['site']} [{view['d_model']}]", rows)


def _located(row: dict[str, Any]) -> str:
    return f"{row['non_finite']}, first at {row['first_non_finite']}"


def draw_survey(console: Console, survey: Survey) -> None:
    """Draw what a job will take."""
    pairs = {
        "tokens": f"{survey.tokens:,} in {survey.sequences:,} contexts, {survey.batch_size} a batch",
        "sites": ", ".join(f"{site} [{width}]" for site, width in survey.sites.items())
        + f" in {len(survey.layers)} layers ({_ranges(list(survey.layers))})",
        "a token": f"{survey.bytes_a_token:,} bytes ({survey.dtype}, layout {survey.layout})",
        "total": f"{size(survey.total_bytes)} in {survey.shards} shards",
        "to do": f"{size(survey.bytes_to_do)} in {survey.shards_to_do} shards, {survey.tokens_to_do:,} tokens",
        "free": size(survey.free_bytes) + ("" if survey.bytes_to_do <= survey.free_bytes else "  NOT ENOUGH"),
    }
    if survey.seconds is not None and survey.tokens_a_second is not None:
        pairs["time"] = f"about {_time(survey.seconds)}, at {survey.tokens_a_second:,.0f} tokens/s"
    console.print(_pairs("plan", pairs), highlight=False, markup=False)


def draw_exported(console: Console, done: Exported) -> None:
    """Draw what an export made."""
    pairs = {
        "files": f"{done.files:,}, listed in index.json",
        "linked": f"{size(done.linked_bytes)}: the store's own files, not to be edited",
        "written": size(done.written_bytes),
    }
    console.print(_pairs(str(done.path), pairs), highlight=False, markup=False)


def draw_report(console: Console, report: Report) -> None:
    """Draw what `verify` found."""
    pairs = {
        "looked at": f"{report.shards:,} shards, {size(report.bytes)} of them read ({report.level})",
        "findings": f"{len(report.findings):,}" if report.findings else "none",
    }
    console.print(_pairs(report.path, pairs), highlight=False, markup=False)
    _draw_findings(console, report.findings)


def _draw_findings(console: Console, findings: Sequence[Finding]) -> None:
    _draw_lines(console, [f"{finding.kind}: {finding.file}: {finding.what}" for finding in findings])


def _draw_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines[:_MOST_LINES]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(lines) > _MOST_LINES:
        console.print(f"and {len(lines) - _MOST_LINES:,} more, which --json lists", highlight=False)


def draw_repaired(console: Console, done: Repaired) -> None:
    """Draw what `repair` did."""
    pairs = {
        "findings": f"{len(done.report.findings):,}" if done.report.findings else "none",
        "set aside": f"{len(done.aside):,} files, in .set-aside",
        "written anew": ", ".join(done.rewritten) or "nothing",
    }
    console.print(_pairs(done.report.path, pairs), highlight=False, markup=False)
    lines = []
    for loss in done.lost:
        layers = f"layer {loss.layers[0]}" if len(loss.layers) == 1 else f"{len(loss.layers)} layers"
        first, last = loss.sequences or ("?", "?")
        said = f"{loss.site}, {layers}, tokens {loss.tokens[0]} to {loss.tokens[1] - 1} (sequences {first} to {last})"
        lines.append(f"missing now: {said}")
    _draw_lines(console, lines)
    if done.lost and done.remade_by_extract:
        console.print("The same `mmcache extract` that made the store makes them again.", highlight=False)
    elif done.lost:
        console.print("They are lost without a copy; partial=True opens the rest.", highlight=False)
    if done.left:
        console.print("To be restored from a copy:", highlight=False)
        _draw_findings(console, done.left)


class BytesBar:
    """The progress of a job of so many bytes on stderr: a bar on a terminal, a line every tenth everywhere else."""

    def __init__(self, console: Console) -> None:
        self._console, self._told = console, 0
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Draw how many bytes of how many are done."""
        self._bar.update(self._task, completed=done, total=total)
        tenth = done * 10 // total
        if tenth > self._told and not self._console.is_terminal:
            self._told = tenth
            self._console.print(f"{size(done)} of {size(total)}")


class ProgressBar:
    """The progress of an extraction on stderr: a bar on a terminal, and the estimate in a line everywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tokenising", total=None, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: Done) -> None:
        """Draw where the job is; after its first batches, say how long it will take."""
        if done.phase == "tokenise":
            self._bar.update(self._task, description="tokenising", rate=f"{done.tokens:,} tokens")
            return
        rate = done.run_tokens / max(done.seconds, 1e-9)
        text = (
            f"{rate:,.0f} tokens/s · {done.bytes / 1e9:.2f} GB · {done.bytes / max(done.seconds, 1e-9) / 1e9:.2f} GB/s"
        )
        self._bar.update(self._task, description="extracting", completed=done.tokens, total=done.total, rate=text)
        self._told += 1
        if self._told == 3 or done.tokens == done.total:
            left = (done.total - done.tokens) / max(rate, 1e-9)
            self._console.print(f"{done.tokens:,} of {done.total:,} tokens, {text}, about {_time(left)} left")
