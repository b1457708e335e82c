"""Input codes made from a few stored ones and a number: the same on every machine.

Integers only, so that nothing depends on a library's random numbers or rounding; both the machine
that knows the expected logits and the one that checks them make the codes anew.
"""

from __future__ import annotations

import numpy as np

__all__ = ["derive", "noise"]

KINDS = 8


def noise(count: int, seed: int) -> np.ndarray:
    """Return ``count`` uniformly distributed uint64 numbers (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x100000001B3)
             + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # fmt: skip
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def derive(base: np.ndarray, count: int, qmin: int, qmax: int) -> np.ndarray:
    """Return ``count`` inputs: noise, extremes, and changed copies of the stored ones.

    Parameters
    ----------
    base
        Stored codes ``[V, ...]``, the codes of images.
    count
        Number of inputs.
    qmin, qmax
        Range of the codes.

    Returns
    -------
    numpy.ndarray
        ``[count, ...]`` of the type of ``base``.
    """
    shape, size = base.shape[1:], int(np.prod(base.shape[1:]))
    out = np.empty((count, *shape), base.dtype)
    for i in range(count):
        image = base[i % len(base)].astype(np.int64)
        other = base[(i + 1) % len(base)].astype(np.int64)
        drawn = noise(size, i).reshape(shape)
        span = np.uint64(qmax - qmin + 1)
        random = (drawn % span).astype(np.int64) + qmin
        kind = i % KINDS
        if kind == 0:
            made = random
        elif kind == 1:
            made = np.where(drawn & np.uint64(1 << 20), qmax, qmin)
        elif kind == 2:
            made = np.full(shape, (qmin, qmax, qmin + 37 * i % int(span))[min(i // KINDS, 2)])
        elif kind == 3:
            made = np.roll(image, 17 * i + 5, axis=-1)
        elif kind == 4:
            made = np.flip(image, axis=-1) + (random >> 4)
        elif kind == 5:
            made = (image + np.roll(other, i, axis=-1)) >> 1
        elif kind == 6:
            made = 3 * np.roll(image, 29 * i, axis=-1)
        else:
            made = np.roll(image, 13 * i + 3, axis=-2) + (random >> 2)
        out[i] = np.clip(made, qmin, qmax)
    return out
