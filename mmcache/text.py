"""Text for people: numbers with units, JSON-safe values, and texts of a store that are safe on a terminal."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any
from unicodedata import category

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["duration", "json_ready", "plain_json", "ranges", "size", "visible", "visible_lines"]


def size(count: float) -> str:
    """A number of bytes with its unit, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds; as days from 48 hours on."""
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, with consecutive ones as ranges: `0-5,8`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def json_ready(data: Any) -> Any:
    """Data with arrays as lists; NaN and infinities as zarr writes them: "NaN", "Infinity", "-Infinity"."""
    if isinstance(data, dict):
        return {name: json_ready(value) for name, value in data.items()}
    if isinstance(data, np.ndarray):
        if data.dtype.kind != "f" or np.isfinite(data).all():
            return data.tolist()
        data = data.tolist()
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


# Unicode's symbols for the ASCII control characters.
_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "␡", "\n": "⏎", "\t": "⇥"}
# JSON leaves these unescaped: controls, formats (bidi, tags), surrogates, line separators.
_NOT_PLAIN = re.compile(r"[^\n -~]")
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""The text with symbols for unprintable characters: ␛ for escape, ⏎ for a line end, `\u202e` for others."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _picture(letter) for letter in text)


def _picture(letter: str) -> str:
    return _PICTURES.get(letter) or letter.encode("unicode_escape").decode()


def visible_lines(text: str) -> str:
    """As `visible`, but keeps the lines of a text."""
    return "\n".join(visible(line) for line in text.split("\n"))


def plain_json(text: str) -> str:
    """JSON text with control and format characters escaped, which a terminal might obey; the values stay the same."""
    return _NOT_PLAIN.sub(lambda found: _escaped(found[0]) if category(found[0]) in _UNSAFE else found[0], text)


def _escaped(letter: str) -> str:
    """JSON's escapes of a character: two if UTF-16 needs two units."""
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
