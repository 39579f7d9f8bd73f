"""The flags of tokens: the bits that the library sets, and which tokens count in statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BOS", "FIRST", "SPECIAL", "counted", "flagged", "known_flags", "named_flags"]

# All other bits are the user's; so is FIRST in stores of format version 1, which do not flag first tokens.
BOS, SPECIAL, FIRST = 1, 2, 4


def known_flags(*, first: bool) -> dict[str, int]:
    """Name and bit of each flag that the library sets; tokens with any of them are left out of the statistics.

    Args:
        first: whether the store flags the first token of each sequence.
    """
    return {"bos": BOS, "special": SPECIAL, **({"first": FIRST} if first else {})}


def named_flags(flags: int, bits: Mapping[str, int]) -> list[str]:
    """Names of a token's flags, for the bits named in `bits` (`Manifest.flag_bits`); the user's bits have no name."""
    return [name for name, bit in bits.items() if flags & bit]


def flagged(tokens: np.ndarray, special_tokens: np.ndarray, *, begins: bool, first: bool) -> np.ndarray:
    """Flags of `tokens` `[n]`.

    Args:
        tokens: ids of at least one token.
        special_tokens: ids that are flagged SPECIAL.
        begins: whether the first of `tokens` begins a sequence; if it is special, it is flagged BOS too.
        first: whether to flag that token FIRST as well.

    Returns:
        `[n]` uint8, owned by the caller.
    """
    special = np.isin(tokens, special_tokens)
    flags = np.where(special, np.uint8(SPECIAL), np.uint8(0))
    if begins:
        flags[0] |= (BOS if special[0] else 0) | (FIRST if first else 0)
    return flags


def counted(flags: np.ndarray, left_out: int) -> np.ndarray:
    """Which tokens count in statistics, `[n]` bool: those with none of the bits `left_out`."""
    kept: np.ndarray = (flags & np.uint8(left_out)) == 0
    return kept
