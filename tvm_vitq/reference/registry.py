"""The table of reference operators: one int64 NumPy function for each ``vitq.*`` operator.

A reference function takes the argument arrays (in their stored dtypes, constants included, read
only) and the operator's attributes, and returns an int64 array (float32 for the output boundary).
It shares no code with the TE definitions. :func:`expect` is how it states a proved range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["REFERENCE", "RangeError", "ReferenceFn", "expect", "reference"]

ReferenceFn = Callable[[Sequence[np.ndarray], Mapping[str, Any]], np.ndarray]

REFERENCE: dict[str, ReferenceFn] = {}
"""Operator name (``vitq.linear``) to its reference function."""


class RangeError(ArithmeticError):
    """An intermediate left the dtype that the range proof gave it: a fault of the compiler."""


def reference(*names: str) -> Callable[[ReferenceFn], ReferenceFn]:
    """Enter a function as the reference of the operators ``names`` (with their ``vitq.``)."""

    def enter(function: ReferenceFn) -> ReferenceFn:
        for name in names:
            REFERENCE[name] = function
        return function

    return enter


def expect(value: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Return ``value`` after checking that every element fits the integer ``dtype``.

    Raises
    ------
    RangeError
        Naming the intermediate ``what``, its range and the dtype.
    """
    if value.size:
        info, lo, hi = np.iinfo(dtype), int(value.min()), int(value.max())
        if lo < info.min or hi > info.max:
            raise RangeError(f"{what} spans [{lo}, {hi}] and does not fit {dtype}")
    return value
