"""Tables, lines and shades on a terminal: overviews of stores, plans of jobs and their results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mmcache.text import duration, ranges, size, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from mmcache.extraction.estimate import Survey
    from mmcache.ops.export import Exported
    from mmcache.ops.repair import Repaired
    from mmcache.ops.verify import Finding, Report

__all__ = [
    "NOTHING",
    "ColourScale",
    "cell",
    "coloured",
    "draw_exported",
    "draw_lines",
    "draw_overview",
    "draw_pairs",
    "draw_repaired",
    "draw_report",
    "draw_rows",
    "draw_survey",
    "draw_text",
    "shown",
    "strip",
]

_TITLE = "table.title"
# How many lines of findings are printed.
_MOST_LINES = 40
# The longest word that is never cut, in columns: half a number would be another number. Longer words are paths.
_WHOLE = 24


def shown(value: object, style: str = "") -> Text:
    """Any value as a text that is safe to print."""
    return Text(visible(str(value)), style)


def cell(value: object) -> str:
    """A value as shown in tables: floats have six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw_text(console: Console, text: str, style: str = "") -> None:
    """Print a line, folded if it is wider than the terminal."""
    console.print(shown(text, style), overflow="fold")


def draw_pairs(console: Console, title: str, pairs: Mapping[str, object]) -> None:
    """Print names and values below a title, one pair per line; as sentences if the terminal is narrow."""
    if title:
        draw_text(console, title, _TITLE)
    widths = _widths([list(pairs), list(map(str, pairs.values()))], console.width - 2)
    if widths is None:
        for name, value in pairs.items():
            _draw_sentence(console, name, str(value))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for style, width in zip(("bold", ""), widths, strict=True):
        table.add_column(style=style, overflow="fold", width=width)
    for name, value in pairs.items():
        table.add_row(shown(name), shown(value))
    console.print(table)


def draw_rows(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table, one per row; as sentences if the terminal is too narrow.

    A column is printed even if all of its values are equal.
    """
    draw_text(console, title, _TITLE)
    names = [name.replace("_", " ") for name in rows[0]] if rows else []
    lines = [[cell(value) for value in row.values()] for row in rows]
    widths = _widths(list(zip(names, *lines, strict=True)), console.width - 2 * len(names) - 1)
    if widths is None:
        for line in lines:
            said = (f"{name} {value}" for name, value in zip(names[1:], line[1:], strict=True) if value)
            _draw_sentence(console, f"{names[0]} {line[0]}", ", ".join(said))
        console.print()
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in zip(names, widths, strict=True):
        table.add_column(shown(name), overflow="fold", width=width)
    for line in lines:
        table.add_row(*map(shown, line))
    console.print(table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """The width of each column, so that no word is cut; None if there is not enough room."""
    widths = [max((_needed(text) for text in column), default=0) for column in columns]
    more = [max((cell_len(visible(text)) for text in column), default=0) for column in columns]
    spare = room - sum(widths)
    # Columns that need the least extra width get it first.
    for at in sorted(range(len(widths)), key=lambda at: more[at] - widths[at]):
        given = max(0, min(more[at] - widths[at], spare))
        widths[at], spare = widths[at] + given, spare - given
    return widths if spare >= 0 else None


def _needed(text: str) -> int:
    return max((min(_WHOLE, cell_len(word)) for word in visible(text).split()), default=0)


def _draw_sentence(console: Console, name: str, value: str) -> None:
    console.print(Text.assemble((f"{visible(name)}: ", "bold"), visible(value)), overflow="fold")


def draw_lines(console: Console, lines: Sequence[str], most: int = _MOST_LINES) -> None:
    """Print lines that are searched, not read: not folded, so that paths stay whole; at most `most` of them."""
    for line in lines[:most]:
        console.print(shown(line), soft_wrap=True)
    if len(lines) > most:
        draw_text(console, f"and {len(lines) - most:,} more, which --json lists")


# Stands for a missing number.
NOTHING = "·"
_SHADES = " ░▒▓█"
# From dark to light (viridis, which colour-blind readers can tell apart too); and two hues away from grey.
_RISING = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_SIGNED = ((33, 102, 172), (146, 197, 222), (235, 235, 235), (244, 165, 130), (178, 24, 43))
# NaN and infinities.
_WRONG = Style(color="white", bgcolor="red", bold=True)


def coloured(console: Console) -> bool:
    """Whether a terminal shows colours: not in a pipe, nor if NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def strip(parts: Sequence[float], width: int) -> str:
    """A bar of at most `width` characters that shows which parts are present; only complete ones are drawn as full."""
    drawn = max(1, min(width, len(parts)))
    edges = [at * len(parts) // drawn for at in range(drawn + 1)] if parts else []
    means = [float(np.mean(parts[start:stop])) for start, stop in pairwise(edges)]
    return "".join("█" if part >= 1 else NOTHING if part <= 0 else "░▒▓"[min(2, int(part * 3))] for part in means)


@dataclass(frozen=True)
class ColourScale:
    """A scale of colours or shades.

    Attributes:
        low: the number with the first shade.
        high: the number with the last shade.
        log: the scale is logarithmic, for numbers above 0.
        signed: the middle shade is 0, and `low` is `-high`.
    """

    low: float
    high: float
    log: bool = False
    signed: bool = False

    @classmethod
    def of(cls, values: Any, *, log: bool = False, signed: bool = False) -> Self:
        """The scale of some numbers; those that are not finite (or, if logarithmic, not above 0) are left out."""
        flat = np.asarray(values, np.float64).ravel()
        flat = flat[np.isfinite(flat) & ((flat > 0) | (not log))]
        if not len(flat):
            return cls(1.0 if log else 0.0, 1.0, log, signed)
        if signed:
            most = float(np.abs(flat).max())
            return cls(-most, most, log, signed)
        return cls(float(flat.min()), float(flat.max()), log, signed)

    def part(self, value: float) -> float | None:
        """Where a number is on the scale, from 0 to 1; None if it is not finite."""
        if not math.isfinite(value):
            return None
        if self.high <= self.low:
            return 0.5
        if self.log:
            value = math.log(max(value, self.low)) - math.log(self.low)
            return min(1.0, value / (math.log(self.high) - math.log(self.low)))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def style(self, value: float) -> Style:
        """The background for a number, and a text colour that is readable on it."""
        part = self.part(value)
        if part is None:
            return _WRONG
        stops = _SIGNED if self.signed else _RISING
        at = part * (len(stops) - 1)
        first = min(int(at), len(stops) - 2)
        pairs = zip(stops[first], stops[first + 1], strict=True)
        red, green, blue = (round(low + (high - low) * (at - first)) for low, high in pairs)
        # Above this relative luminance, black has more contrast than white (WCAG 2).
        weighed = zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
        light = sum(weight * (part / 255) ** 2.2 for weight, part in weighed) > 0.18
        return Style(color=Color.from_rgb(*(0, 0, 0) if light else (255, 255, 255)),
                     bgcolor=Color.from_rgb(red, green, blue))  # fmt: skip

    def character(self, value: float) -> str:
        """The character for a number: the larger, the darker; on a signed scale, the further from 0, the darker."""
        part = self.part(value)
        if part is None:
            return "!"
        part = abs(2 * part - 1) if self.signed else part
        return _SHADES[min(len(_SHADES) - 1, int(part * len(_SHADES)))]

    def cell(self, value: float, width: int, *, colours: bool) -> Text:
        """A number as a cell of a map; a dot for NaN, which means no data."""
        if math.isnan(value):
            return Text(NOTHING * width, "dim")
        return Text(" " * width, self.style(value)) if colours else Text(self.character(value) * width)

    def legend(self, *, colours: bool, steps: int = 10) -> Text:
        """The scale, with numbers at its ends."""
        if self.log:
            values = np.geomspace(self.low, self.high, steps) if self.low > 0 else [self.low]
        else:
            values = np.linspace(self.low, self.high, steps)
        bar = Text.assemble(*(self.cell(float(value), 1, colours=colours) for value in values))
        kind = " (log)" if self.log else ""
        return Text.assemble(f"{self.low:.4g} ", bar, f" {self.high:.4g}{kind}")


# The longest command printed, in characters; `--json` has all of it.
_COMMAND = 200


def draw_overview(console: Console, view: dict[str, Any]) -> None:
    """Print `read.describe.overview`."""
    source = view["source"]
    pairs = {
        "store": f"{view['kind']}, layout {view['layout']}, {'complete' if view['complete'] else 'NOT COMPLETE'}",
        "tokens": f"{view['n_tokens']:,} in {view['n_sequences']:,} sequences",
        "layers": f"{view['n_layers']} ({ranges(view['layers'])})" if view["layers"] else "0",
        "dtype": str(view["dtype"]),
        "size": f"{size(view['bytes'])}, {view['shard_tokens']} tokens a shard",
    }
    pairs |= _origin(source)
    if view["metadata"]:
        pairs["metadata"] = str(view["metadata"])
    draw_pairs(console, view["path"], pairs)
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
    partial = {site: said["present"] for site, said in view["sites"].items() if said["missing"]}
    if partial:
        draw_text(console, "what is there, from the first token to the last: █ all, ░▒▓ a part, · nothing")
        for site, present in partial.items():
            draw_text(console, site, "bold")
            draw_text(console, f"  {strip(present, console.width - 2)}")


def _origin(source: dict[str, Any]) -> dict[str, str]:
    """Where a store's data came from; its metadata may have any types, since anybody may have written it."""
    record, identity, numerics, corpus = (_dict(source.get(name)) for name in _ORIGIN)
    pairs: dict[str, str] = {}
    if "tokenizer" in identity:
        pairs["tokenizer"] = _short(identity["tokenizer"])
    if "model" in identity:
        revision = record.get("revision") or f"weights {_short(identity.get('weights'))}"
        pairs |= {
            "model": f"{record.get('name') or identity.get('model')} ({identity.get('model')}, {revision}), "
            f"computed in {identity.get('compute_dtype')}",
            "corpus": f"{corpus.get('documents')} documents, {_short(corpus.get('sha256'))}{_framed(corpus)}",
            "contexts": f"up to {identity.get('context_length')} tokens, "
            f"{'packed' if identity.get('pack') else 'by document'}, BOS {identity.get('bos', 'auto')}",
            "numerics": ", ".join(f"{name} {value}" for name, value in numerics.items()),
            "made": f"{record.get('made')}, mmcache {record.get('mmcache')}",
        }
    if record.get("command"):
        command = str(record["command"])
        pairs["command"] = command if len(command) <= _COMMAND else f"{command[:_COMMAND]}…"
    return pairs


def _framed(corpus: dict[str, Any]) -> str:
    framed = corpus.get("framed")
    return f", {framed} of them bring special tokens of their own (not doubled)" if framed else ""


_ORIGIN = ("record", "identity", "numerics", "tokenised")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(digest: object) -> str:
    return str(digest or "")[:12]


def _modules(source: dict[str, Any], site: str) -> str:
    modules = _dict(source.get("modules")).get(site)
    if not isinstance(modules, list) or not modules:
        return ""
    return f"{modules[0]} …" if len(modules) > 1 else str(modules[0])


def draw_survey(console: Console, survey: Survey) -> None:
    """Print what a job will need."""
    pairs = {
        "tokens": f"{survey.tokens:,} in {survey.sequences:,} contexts, {survey.batch_size} a batch",
        "sites": ", ".join(f"{site} [{width}]" for site, width in survey.sites.items())
        + f" in {len(survey.layers)} layers ({ranges(survey.layers)})",
        "a token": f"{survey.bytes_a_token:,} bytes ({survey.dtype}, layout {survey.layout})",
        "total": f"{size(survey.total_bytes)} in {survey.shards} shards",
        "to do": f"{size(survey.bytes_to_do)} in {survey.shards_to_do} shards, {survey.tokens_to_do:,} tokens",
        "free": size(survey.free_bytes) + ("" if survey.bytes_to_do <= survey.free_bytes else "  NOT ENOUGH"),
    }
    if survey.staging is not None:
        # The staging folder needs less than the total, and a bucket does not report its free space.
        pairs["free"] = f"{size(survey.free_bytes)} in {survey.staging}, where shards wait to be sent"
    if survey.framed:
        pairs["special"] = f"{survey.framed:,} documents bring special tokens of their own (not doubled)"
    if survey.seconds is not None and survey.tokens_a_second is not None:
        pairs["time"] = f"about {duration(survey.seconds)}, at {survey.tokens_a_second:,.0f} tokens/s"
    draw_pairs(console, "plan", pairs)


def draw_exported(console: Console, done: Exported) -> None:
    """Print what an export wrote."""
    pairs = {
        "files": f"{done.files:,}, listed in index.json",
        "linked": f"{size(done.linked_bytes)}: the store's own files, not to be edited",
        "written": size(done.written_bytes),
    }
    draw_pairs(console, str(done.path), pairs)


def draw_report(console: Console, report: Report) -> None:
    """Print what `verify` found."""
    pairs = {
        "looked at": f"{report.shards:,} shards, {size(report.bytes)} of them read ({report.level})",
        "findings": f"{len(report.findings):,}" if report.findings else "none",
    }
    draw_pairs(console, report.path, pairs)
    _draw_findings(console, report.findings)


def _draw_findings(console: Console, findings: Sequence[Finding]) -> None:
    draw_lines(console, [f"{finding.kind}: {finding.file}: {finding.what}" for finding in findings])


def draw_repaired(console: Console, done: Repaired) -> None:
    """Print what `repair` did."""
    pairs = {
        "findings": f"{len(done.report.findings):,}" if done.report.findings else "none",
        "set aside": f"{len(done.aside):,} files, in .set-aside",
        "written anew": ", ".join(done.rewritten) or "nothing",
    }
    draw_pairs(console, done.report.path, pairs)
    lines = []
    for loss in done.lost:
        layers = f"layer {loss.layers[0]}" if len(loss.layers) == 1 else f"{len(loss.layers)} layers"
        first, last = loss.sequences or ("?", "?")
        said = f"{loss.site}, {layers}, tokens {loss.tokens[0]} to {loss.tokens[1] - 1} (sequences {first} to {last})"
        lines.append(f"missing now: {said}")
    draw_lines(console, lines)
    if done.lost and done.remade_by_extract:
        draw_text(console, "The same `mmcache extract` that made the store makes them again.")
    elif done.lost:
        draw_text(console, "They are lost without a copy; partial=True opens the rest.")
    if done.left:
        draw_text(console, "To be restored from a copy:")
        _draw_findings(console, done.left)
