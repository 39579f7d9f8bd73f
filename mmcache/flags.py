"""The flags of tokens: which bits the library knows, and which tokens count in statistics."""

from __future__ import annotations

import numpy as np

__all__ = ["BOS", "SPECIAL", "counted", "flagged"]

# The other six bits are the user's own.
BOS, SPECIAL = 1, 2


def flagged(tokens: np.ndarray, special_tokens: np.ndarray, *, begins: bool) -> np.ndarray:
    """Flag the special ones of `tokens` `[n]`; the first one is BOS too if it is special and `begins` a sequence.

    Returns `[n]` uint8 in the caller's own memory.
    """
    special = np.isin(tokens, special_tokens)
    flags = np.where(special, np.uint8(SPECIAL), np.uint8(0))
    if begins and special[0]:
        flags[0] |= BOS
    return flags


def counted(flags: np.ndarray) -> np.ndarray:
    """Tell which tokens count in statistics, `[n]` bool: all but BOS and special ones, whose norms swamp the rest."""
    kept: np.ndarray = (flags & (BOS | SPECIAL)) == 0
    return kept
