"""Text from a store on a terminal: what would steer the terminal, or hide, is shown instead of obeyed."""

from __future__ import annotations

import re
from unicodedata import category

__all__ = ["plain_json", "visible", "visible_lines"]

# Unicode's pictures of the first control characters, and of the one at the end of ASCII.
_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "␡", "\n": "⏎", "\t": "⇥"}
# JSON leaves these as they are: controls, formats (bidi, tags), halves of letters, ends of lines.
_NOT_PLAIN = re.compile(r"[^\n -~]")
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""Show every character that is not printable: ␛ for escape, ⏎ for the end of a line, `\u202e` for others."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _picture(letter) for letter in text)


def _picture(letter: str) -> str:
    return _PICTURES.get(letter) or letter.encode("unicode_escape").decode()


def visible_lines(text: str) -> str:
    """Show a text of several lines as `visible`, and keep its lines."""
    return "\n".join(visible(line) for line in text.split("\n"))


def plain_json(text: str) -> str:
    """Write what a terminal might obey in a JSON text as JSON's own escapes: the values stay the same."""
    return _NOT_PLAIN.sub(lambda found: _escaped(found[0]) if category(found[0]) in _UNSAFE else found[0], text)


def _escaped(letter: str) -> str:
    """Give JSON's escapes of a letter: two of one that UTF-16 writes as two."""
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
