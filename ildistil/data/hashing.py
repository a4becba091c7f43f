"""Random numbers by their place: hashes of counters, so that any of them can be had without those before it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

# The odd number closest to 2^64 over the golden ratio: multiples of it are far apart.
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def keys(numbers: Sequence[int], count: int = 1) -> U64:
    """Return 64-bit keys made of whole numbers that aren't negative, such as seed and epoch."""
    return np.random.SeedSequence(list(numbers)).generate_state(count, np.uint64).astype(np.uint64)


def draw(key: U64, place: U64) -> U64:
    """Return 64 random bits for each place of the stream that a key names; the shapes of both are broadcast.

    It is SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014), whose
    ``n``-th number is a hash of ``key + n * stride``.

    >>> key, places = keys([1, 2]), np.arange(10, dtype=np.uint64)
    >>> bool((draw(key, places)[3:] == draw(key, places[3:])).all())
    True
    """
    return mixed(key + (place + np.uint64(1)) * _STRIDE)


def mixed(bits: U64) -> U64:
    """Return a bijective hash of 64 bits, of which each depends on all."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FACTORS[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _FACTORS[1]
    return bits ^ (bits >> np.uint64(31))


def uniform(bits: U64) -> NDArray[np.float64]:
    """Return numbers in [0, 1) made of random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
