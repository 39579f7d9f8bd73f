"""Random permutations of too many numbers to store: a permutation is a key, and each place is computed.

The same on every machine and with every version of numpy: only integer arithmetic, no random generator.

Sources: the generalised Feistel network with cycle walking of Black & Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002), sections 4 and 5; keys are mixed by the finaliser of splitmix64 (Steele, Lea & Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014). It is for shuffling, not a cipher.
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
# Numbers per step, so that the work arrays stay in the L2 cache.
_LONG = 1 << 14


def _constant(number: int) -> np.ndarray:
    """An array without dimensions, for which numpy needs half the time of a scalar."""
    return np.array(number, np.uint64)


_32, _MIX = _constant(32), _constant(_MIX_2)


def mixed(*words: int) -> int:
    """A 64-bit key mixed from integers, such as a seed, an epoch and a purpose; 64 bits of each count."""
    state = 0
    for word in words:
        state = (state + _GOLDEN + word) & _WORD
        state = (state ^ (state >> 30)) * _MIX_1 & _WORD
        state = (state ^ (state >> 27)) * _MIX_2 & _WORD
        state ^= state >> 31
    return state


def hashed(numbers: np.ndarray, key: int) -> np.ndarray:
    """Hashes of numbers, `[n]` of any integer dtype, with a key: `[n]` uint64, each equal to `mixed(key, number)`."""
    state = numbers.astype(np.uint64) + np.uint64((mixed(key) + _GOLDEN) & _WORD)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    out: np.ndarray = state ^ (state >> np.uint64(31))
    return out


class Permutation:
    """A permutation of the numbers from 0 to `n - 1`. Memory O(1); safe to use from several threads.

    A number is a pair (`left`, `right`), each of about the square root of `n` values. Each of six rounds adds a hash of
    one half to the other, modulo its size. There are fewer than sqrt(n) more pairs than `n`; the few results that are
    too large pass through the rounds again (cycle walking), so the time hardly depends on `n`.

    Args:
        n: from 1 to 2**63 - 1.
        key: 64 bits, well mixed: see `mixed`.

    Raises:
        ArgumentError: `n` is out of range.
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
        """The number at each of these places: `[k]` int64 from `[k]` int64 or uint64, 0 to n - 1."""
        return self._all(numbers, inverse=False)

    def inverse(self, numbers: np.ndarray) -> np.ndarray:
        """The place of each of these numbers: the inverse of `forward`."""
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
        """Pass numbers through the six rounds, in place."""
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
            # Of the sum and the sum minus the size (unsigned), the smaller did not wrap around; likewise backwards.
            if inverse:
                np.subtract(target, mix, target)
                np.add(target, size, mix)
            else:
                np.add(target, mix, target)
                np.subtract(target, size, mix)
            np.minimum(target, mix, out=target)
        np.multiply(left, self._right, part)
        np.add(part, right, part)
