"""Random orders of numbers too many to be written down: a permutation is a key, and each place is computed.

The same on every machine and with every version of numpy: integers only, and no random generator.

Sources: the generalised Feistel network with cycle walking of Black & Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002), sections 4 and 5; keys are mixed by the finaliser of splitmix64 (Steele, Lea & Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014). This is for shuffling, and no cipher.
"""

from __future__ import annotations

import math

import numpy as np

from mmcache.errors import ArgumentError
from mmcache.system.threads import pieces

__all__ = ["MOST", "Permutation", "hashed", "mixed"]

# Positions are int64.
MOST = 2**63 - 1
_ROUNDS = 6
_WORD = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# So that the work arrays stay in the second-level cache.
_LONG = 1 << 14


def _constant(number: int) -> np.ndarray:
    """As an array without dimensions, which numpy takes in half the time of a scalar."""
    return np.array(number, np.uint64)


_32, _MIX = _constant(32), _constant(_MIX_2)


def mixed(*words: int) -> int:
    """Mix whole numbers, such as a seed, an epoch and a purpose, into a key of 64 bits; of each, 64 bits count."""
    state = 0
    for word in words:
        state = (state + _GOLDEN + word) & _WORD
        state = (state ^ (state >> 30)) * _MIX_1 & _WORD
        state = (state ^ (state >> 27)) * _MIX_2 & _WORD
        state ^= state >> 31
    return state


def hashed(numbers: np.ndarray, key: int) -> np.ndarray:
    """Hash numbers, `[n]` of any integer dtype, with a key: `[n]` uint64, equal to `mixed(key, number)` of each."""
    state = numbers.astype(np.uint64) + np.uint64((mixed(key) + _GOLDEN) & _WORD)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    out: np.ndarray = state ^ (state >> np.uint64(31))
    return out


class Permutation:
    """A permutation of the numbers from 0 to `n - 1`. Memory O(1); safe to use from several threads.

    A number is a pair (`left`, `right`) of about the square root of `n` each. In each of six rounds a hash of one
    half is added to the other, modulo its size. The pairs outnumber `n` by less than its square root, and the few
    that are too large go through it again (they walk the cycle), so that the time hardly depends on `n`.

    Args:
        n: from 1 to 2**63 - 1.
        key: 64 bits, well mixed: see `mixed`.

    Raises:
        ArgumentError: there is no such `n`.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= MOST:
            raise ArgumentError(f"a permutation of {n} numbers: expected 1 to {MOST}")
        self.n, self._n = n, _constant(n)
        right = math.isqrt(n - 1) + 1
        left = -(-n // right)
        self._right = _constant(right)
        self._sizes = (_constant(left), _constant(right))
        self._keys = [(_constant(mixed(key, turn, 0) | 1), _constant(mixed(key, turn, 1))) for turn in range(_ROUNDS)]

    def forward(self, numbers: np.ndarray) -> np.ndarray:
        """Say which number stands at each of these places: `[k]` int64 from `[k]` int64 or uint64, 0 to n - 1."""
        return self._all(numbers, inverse=False)

    def inverse(self, numbers: np.ndarray) -> np.ndarray:
        """Say at which place each of these numbers stands: what `forward` undoes."""
        return self._all(numbers, inverse=True)

    def _all(self, numbers: np.ndarray, *, inverse: bool) -> np.ndarray:
        out = np.array(numbers, np.uint64)
        self._pass(out, inverse=inverse)
        while len(out) and out.max() >= self._n:
            outside = np.flatnonzero(out >= self._n)
            again = out[outside]
            self._pass(again, inverse=inverse)
            out[outside] = again
        return out.view(np.int64)

    def _pass(self, numbers: np.ndarray, *, inverse: bool) -> None:
        work = np.empty((4, min(_LONG, len(numbers))), np.uint64)
        for piece in pieces(len(numbers), _LONG):
            part = numbers[piece]
            self._once(part, work[:, : len(part)], inverse=inverse)

    def _once(self, part: np.ndarray, work: np.ndarray, *, inverse: bool) -> None:
        """Send numbers through the six rounds, in place."""
        left, right, mix, more = work
        np.floor_divide(part, self._right, left)
        np.multiply(left, self._right, mix)
        np.subtract(part, mix, right)
        for turn in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
            source, target = (right, left) if turn % 2 == 0 else (left, right)
            size = self._sizes[turn % 2]
            factor, summand = self._keys[turn]
            np.multiply(source, factor, mix)
            np.add(mix, summand, mix)
            np.right_shift(mix, _32, more)
            np.bitwise_xor(mix, more, mix)
            np.multiply(mix, _MIX, mix)
            # The upper 32 bits, as a fraction of 2**32, times the size: at most 2**32 - 1, so nothing overflows.
            np.right_shift(mix, _32, mix)
            np.multiply(mix, size, mix)
            np.right_shift(mix, _32, mix)
            # Of the sum and the sum less the size, the smaller is the one that did not wrap around; and likewise back.
            if inverse:
                np.subtract(target, mix, target)
                np.add(target, size, mix)
            else:
                np.add(target, mix, target)
                np.subtract(target, size, mix)
            np.minimum(target, mix, out=target)
        np.multiply(left, self._right, part)
        np.add(part, right, part)
