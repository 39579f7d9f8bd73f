"""Numbers as shades: a background colour where the terminal has colours, else a character."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

__all__ = ["NOTHING", "Heat", "coloured", "strip"]

# Where there is no number.
NOTHING = "·"
_SHADES = " ░▒▓█"
# From dark to light, told apart by those who see fewer colours too (viridis); and two hues away from grey.
_RISING = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_SIGNED = ((33, 102, 172), (146, 197, 222), (235, 235, 235), (244, 165, 130), (178, 24, 43))
# What is neither: NaN and infinities.
_WRONG = Style(color="white", bgcolor="red", bold=True)


def coloured(console: Console) -> bool:
    """Tell whether a terminal shows colours: a pipe does not, nor where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def strip(parts: Sequence[float], width: int) -> str:
    """Draw how much of each stretch is there in `width` characters at most; only what is whole is drawn as whole."""
    drawn = max(1, min(width, len(parts)))
    edges = [at * len(parts) // drawn for at in range(drawn + 1)] if parts else []
    means = [float(np.mean(parts[start:stop])) for start, stop in pairwise(edges)]
    return "".join("█" if part >= 1 else NOTHING if part <= 0 else "░▒▓"[min(2, int(part * 3))] for part in means)


@dataclass(frozen=True)
class Heat:
    """A scale of shades.

    Attributes:
        low: what has the first shade,
        high: and what has the last.
        log: shades are by the logarithm, of numbers above 0.
        signed: the middle shade is 0, and `low` is `-high`.
    """

    low: float
    high: float
    log: bool = False
    signed: bool = False

    @classmethod
    def of(cls, values: Any, *, log: bool = False, signed: bool = False) -> Self:
        """Make the scale of some numbers, those left out that are not finite (or, of logarithms, not above 0)."""
        flat = np.asarray(values, np.float64).ravel()
        flat = flat[np.isfinite(flat) & ((flat > 0) | (not log))]
        if not len(flat):
            return cls(1.0 if log else 0.0, 1.0, log, signed)
        if signed:
            most = float(np.abs(flat).max())
            return cls(-most, most, log, signed)
        return cls(float(flat.min()), float(flat.max()), log, signed)

    def part(self, value: float) -> float | None:
        """Say how far up the scale a number is, from 0 to 1; None for what is not finite."""
        if not math.isfinite(value):
            return None
        if self.high <= self.low:
            return 0.5
        if self.log:
            value = math.log(max(value, self.low)) - math.log(self.low)
            return min(1.0, value / (math.log(self.high) - math.log(self.low)))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def style(self, value: float) -> Style:
        """Give the colours of a number: the background says how large it is, the letters can be read on it."""
        part = self.part(value)
        if part is None:
            return _WRONG
        stops = _SIGNED if self.signed else _RISING
        at = part * (len(stops) - 1)
        first = min(int(at), len(stops) - 2)
        pairs = zip(stops[first], stops[first + 1], strict=True)
        red, green, blue = (round(low + (high - low) * (at - first)) for low, high in pairs)
        # Above this relative luminance black stands out more than white does (WCAG 2).
        weighed = zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
        light = sum(weight * (part / 255) ** 2.2 for weight, part in weighed) > 0.18
        return Style(color=Color.from_rgb(*(0, 0, 0) if light else (255, 255, 255)),
                     bgcolor=Color.from_rgb(red, green, blue))  # fmt: skip

    def character(self, value: float) -> str:
        """Give the character of a number: the darker, the larger; of a signed scale, the further from 0."""
        part = self.part(value)
        if part is None:
            return "!"
        part = abs(2 * part - 1) if self.signed else part
        return _SHADES[min(len(_SHADES) - 1, int(part * len(_SHADES)))]

    def cell(self, value: float, width: int, *, colours: bool) -> Text:
        """Draw a number as a cell of a map; NaN, which stands for nothing there, as a dot."""
        if math.isnan(value):
            return Text(NOTHING * width, "dim")
        return Text(" " * width, self.style(value)) if colours else Text(self.character(value) * width)

    def legend(self, *, colours: bool, steps: int = 10) -> Text:
        """Draw the scale with its ends as numbers."""
        if self.log:
            values = np.geomspace(self.low, self.high, steps) if self.low > 0 else [self.low]
        else:
            values = np.linspace(self.low, self.high, steps)
        bar = Text.assemble(*(self.cell(float(value), 1, colours=colours) for value in values))
        kind = " (log)" if self.log else ""
        return Text.assemble(f"{self.low:.4g} ", bar, f" {self.high:.4g}{kind}")
