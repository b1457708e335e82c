"""Where the elements of a permuted tensor lie: strides, and offsets of its batch entries.

A kernel whose operand is ``permute(x, axes)`` reads ``x`` itself with permuted strides, so that no
transposed copy exists; the same holds for what it stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

__all__ = ["entry_offset", "permuted_strides"]


def permuted_strides(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """Return the strides, in elements, of ``permute(x, axes)`` inside a dense ``x`` of ``shape``.

    Empty ``axes`` leave the order as it is.
    """
    strides: list[int] = []
    total = 1
    for extent in reversed(shape):
        strides.insert(0, total)
        total *= int(extent)
    return [strides[axis] for axis in axes] if axes else strides


def entry_offset(entry: Any, extents: Sequence[int], strides: Sequence[int]) -> Any:
    """Return the offset of a flat number over axes of ``extents`` that lie ``strides`` apart.

    Axes that lie one inside the other are taken as one, so a dense tensor costs one product.
    """
    merged: list[tuple[int, int]] = []
    for extent, stride in zip(extents, strides, strict=True):
        if extent == 1:
            continue
        if merged and merged[-1][1] == extent * stride:
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    offset: Any = tirx.const(0, "int32")
    inner = 1
    for i, (extent, stride) in reversed(list(enumerate(merged))):
        digit = tirx.floordiv(entry, inner) if inner > 1 else entry
        if i:
            digit = tirx.floormod(digit, extent)
        offset = offset + digit * stride
        inner *= extent
    return offset
