"""Golden inputs, stored small: one byte a code, whatever the width of the codes.

A 16-bit input would double the size of its golden vectors and prove nothing more. So golden inputs
are taken on a grid: ``codes = stored << shift`` with ``stored`` an 8-bit integer and ``shift`` in
the metadata (``golden.shift``; 0 for 8-bit codes).
"""

from __future__ import annotations

import numpy as np

__all__ = ["expand", "on_grid", "shrink"]


def on_grid(codes: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """Round codes to the finest grid that 8 bits can hold, within ``[qmin, qmax]``.

    Parameters
    ----------
    codes
        int8, uint8 or int16 codes of any shape.
    qmin, qmax
        Range of the codes.
    """
    shift = _shift(codes)
    if shift == 0:
        return codes
    step = 1 << shift
    stored = np.floor(codes.astype(np.int64) / step + 0.5)
    low, high = -(-max(qmin, -128 * step) // step), min(qmax, 127 * step) // step
    return (np.clip(stored, low, high) * step).astype(codes.dtype)


def shrink(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """Return ``(stored, shift)`` of codes that are on the grid."""
    shift = _shift(codes)
    if shift == 0:
        return codes, 0
    stored = codes >> shift
    if not np.array_equal(stored.astype(np.int8).astype(codes.dtype) << shift, codes):
        return codes, 0
    return stored.astype(np.int8), shift


def expand(stored: np.ndarray, shift: int, dtype: str) -> np.ndarray:
    """Return the codes ``stored << shift``."""
    return (stored.astype(np.int64) << shift).astype(dtype)


def _shift(codes: np.ndarray) -> int:
    if codes.dtype.itemsize == 1 or codes.size == 0:
        return 0
    largest = int(np.abs(codes.astype(np.int64)).max())
    return max(0, largest.bit_length() - 7)
