"""Tables and lines on a terminal. Every text is taken as it is: no markup, no emoji, no escape sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mmcache.text import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

__all__ = ["cell", "draw_lines", "draw_pairs", "draw_rows", "draw_text", "shown"]

_TITLE = "table.title"
# A screen holds no ten thousand bad shards.
_MOST_LINES = 40
# Columns of the longest word that is not cut, since half a number is another number; longer ones are paths.
_WHOLE = 24


def shown(value: object, style: str = "") -> Text:
    """Make a text that can be drawn of anything, whoever wrote it."""
    return Text(visible(str(value)), style)


def cell(value: object) -> str:
    """Write a value as tables have it: numbers short."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw_text(console: Console, text: str, style: str = "") -> None:
    """Draw a line, folded where it is wider than the terminal."""
    console.print(shown(text, style), overflow="fold")


def draw_pairs(console: Console, title: str, pairs: Mapping[str, object]) -> None:
    """Draw names and values, one pair a line, below a title; as sentences where the terminal is narrow."""
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
    """Draw records as a table, one a row; as sentences where the terminal is too narrow for the table.

    Where all values of a column are alike it is still drawn.
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
    """Give each column of texts its width, so that no word is cut; None where that is more than there is room for."""
    widths = [max((_needed(text) for text in column), default=0) for column in columns]
    more = [max((cell_len(visible(text)) for text in column), default=0) for column in columns]
    spare = room - sum(widths)
    # Those that want least get it first.
    for at in sorted(range(len(widths)), key=lambda at: more[at] - widths[at]):
        given = max(0, min(more[at] - widths[at], spare))
        widths[at], spare = widths[at] + given, spare - given
    return widths if spare >= 0 else None


def _needed(text: str) -> int:
    return max((min(_WHOLE, cell_len(word)) for word in visible(text).split()), default=0)


def _draw_sentence(console: Console, name: str, value: str) -> None:
    console.print(Text.assemble((f"{visible(name)}: ", "bold"), visible(value)), overflow="fold")


def draw_lines(console: Console, lines: Sequence[str], most: int = _MOST_LINES) -> None:
    """Draw lines that are searched rather than read: not folded, so that a path stays whole; some of them, if many."""
    for line in lines[:most]:
        console.print(shown(line), soft_wrap=True)
    if len(lines) > most:
        draw_text(console, f"and {len(lines) - most:,} more, which --json lists")
