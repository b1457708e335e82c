"""Dyadic requantisation: the one rounding rule of the project.

A real ratio of scales ``r = S_in / S_out`` becomes two integers ``(m, e)`` with ``r ~ m * 2**-e``,
and the requantised accumulator is::

    rq(a, m, e) = (a * m + 2**(e - 1)) >> e          (int64 product, arithmetic shift)

that is, multiplication by ``m * 2**-e`` rounded to the nearest integer, halves towards +infinity.
From ``r = f * 2**x``, ``0.5 <= f < 1`` (``frexp`` in float64), ``m = floor(f * 2**31 + 0.5)`` and
``e = 31 - x``; if that gives ``m = 2**31``, it is halved and ``x`` grows by one. The relative error
of ``m * 2**-e`` is at most ``2**-31``. Ratios so small that ``e`` would pass 62 keep ``e = 62`` and
a smaller ``m``; a ratio of exactly 0 gives ``m = 0``: every accumulator maps to 0.

The rule as a TE expression is ``schedules.matmul.requantize_te``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from relay_passes.errors import VitqError

__all__ = ["MAX_SHIFT", "dyadic", "requantize_bounds"]

MAX_SHIFT = 62
"""Largest shift: ``a * m + 2**(e - 1)`` then fits int64 for every int32 ``a`` and ``m``."""


def dyadic(ratio: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn real ratios into integer multipliers and shifts.

    Parameters
    ----------
    ratio : float or ndarray
        Ratios of scales (any shape), finite, ``|ratio| < 2**30``. A negative ratio (a negative gain
        folded into a scale) gives the negated multiplier of its magnitude.

    Returns
    -------
    mult, shift : ndarray
        int32, the shape of ``ratio`` (zero-dimensional for a scalar), ``1 <= shift <= 62``.

    Raises
    ------
    VitqError
        If a ratio is not finite or too large for a shift of at least 1.
    """
    value = np.asarray(ratio, dtype=np.float64)
    if not np.all(np.isfinite(value)):
        raise VitqError(
            "requantisation: a ratio of scales is not finite; calibrate again with data that has "
            "no NaN or Inf and no zero scale"
        )
    fraction, exponent = np.frexp(np.abs(value))
    mult = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    exponent = exponent.astype(np.int64)
    full = mult == 2**31
    mult = np.where(full, 2**30, mult)
    exponent = np.where(full, exponent + 1, exponent)
    shift = np.where(mult == 0, 1, 31 - exponent)
    if np.any(shift < 1):
        raise VitqError(
            f"requantisation: ratio of scales {np.abs(value).max():.3g} is 2**30 or more; "
            "the output scale is too small for its input, calibrate that site again"
        )
    tiny = shift > MAX_SHIFT
    if np.any(tiny):
        small = np.floor(np.ldexp(np.where(tiny, np.abs(value), 0.0), MAX_SHIFT) + 0.5)
        mult = np.where(tiny, small.astype(np.int64), mult)
        shift = np.where(tiny, MAX_SHIFT, shift)
    mult = np.where(value < 0, -mult, mult)
    return mult.astype(np.int32), shift.astype(np.int32)


def requantize_bounds(
    lo: Any, hi: Any, mult: Any, shift: Any
) -> tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Exact bounds of ``rq`` over the integers of [lo, hi].

    Parameters
    ----------
    lo, hi : int or ndarray
        Bounds of the input, within int32 (per channel where arrays).
    mult, shift : int or ndarray
        Dyadic parameters, broadcast against ``lo`` and ``hi``.

    Returns
    -------
    product : (int, int)
        Bounds over all channels of every intermediate of the int64 sum ``a * m + 2**(e - 1)``.
    result : (ndarray, ndarray)
        Per-channel bounds of the shifted value, int64.
    """
    lo, hi, mult, shift = (np.asarray(v, dtype=np.int64) for v in (lo, hi, mult, shift))
    half = np.left_shift(np.int64(1), shift - 1)
    ends = np.stack(np.broadcast_arrays(lo * mult, hi * mult))
    least, most = ends.min(axis=0), ends.max(axis=0)
    product = (int(least.min()), int((most + half).max()))
    return product, ((least + half) >> shift, (most + half) >> shift)
