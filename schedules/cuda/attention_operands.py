"""Operands of the attention kernel: from the tensors in memory to fragments of ``mma.sync``.

Nothing is staged in shared memory. A product over K does not mind the order of K as long as both
operands have the same, nor does a result mind the order of its columns if it is stored by the same;
so each thread takes *neighbouring* codes, with vector loads, and calls them its fragment. With
``g = lane / 4`` and ``t = lane % 4``:

========================  =========================================================================
slots of K of Q K^T       of 64 channels a thread has 16t .. 16t+15 (two steps of 32), of the last
                          32, if they are odd ones, 8t .. 8t+7
slots of K of P V         keys 2t, 2t+1, 8+2t, 9+2t (and 16 more): what the thread's scores are
columns of P V            of 32, column g of tile i is channel 4g + i: a thread loads four
                          neighbouring channels of four keys and transposes bytes, and its results
                          are the channels 8t .. 8t+7 of two rows
========================  =========================================================================

16-bit codes are two planes of bytes, ``high * 256 + low`` with a signed high byte and an unsigned
low one, and a product is the sum of the planes' products, each shifted: :func:`levels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from schedules.builder import const, load

from .writer import CudaWriter, pointer

__all__ = ["HIGH", "LOW", "PLANES", "Matrix", "fragments", "levels", "load_codes", "load_depth",
           "transposed"]

PLANES: dict[str, tuple[tuple[str, int], ...]] = {
    "int8": (("s8", 0),), "uint8": (("u8", 0),), "int16": (("s8", 8), ("u8", 0)),
}
"""The planes of a dtype: their kind and their shift, the highest first."""

HIGH, LOW = 0x7531, 0x6420
"""Selectors of the high and of the low bytes of two pairs of 16-bit codes."""


def levels(a: str, b: str) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return, by falling shift, the pairs of planes whose products have that shift."""
    found: dict[int, list[tuple[int, int]]] = {}
    for i, (_, left) in enumerate(PLANES[a]):
        for j, (_, right) in enumerate(PLANES[b]):
            found.setdefault(left + right, []).append((i, j))
    return sorted(found.items(), reverse=True)


@dataclass(frozen=True)
class Matrix:
    """One batch entry's matrix inside a tensor.

    Parameters
    ----------
    buffer
        The tensor, flat.
    base
        Offset of element (0, 0).
    stride
        Elements from row to row; columns lie side by side. Both are multiples of ``columns``.
    rows, columns
        Extents.
    """

    buffer: Any
    base: Any
    stride: int
    rows: int
    columns: int

    @property
    def dtype(self) -> str:
        """The codes' dtype."""
        return str(self.buffer.dtype)

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return int(np.dtype(self.dtype).itemsize)

    @property
    def aligned(self) -> int:
        """Bytes that every row starts at a multiple of, at most 16."""
        return math.gcd(self.columns * self.size, 16)

    def row(self, index: Any) -> Any:
        """Return the offset of a row; rows past the last one are that one."""
        return self.base + tirx.min(index, const(self.rows - 1, "int32")) * self.stride


def load_codes(w: CudaWriter, matrix: Matrix, row: Any, first: Any, most: int, count: int,
               into: Any, at: int, zero: bool = False) -> None:
    """Load ``count`` neighbouring codes as words.

    Parameters
    ----------
    matrix, row
        Where: the offset of the row (:meth:`Matrix.row`).
    first, most
        The first column, a multiple of ``count``, and the most that it may be.
    count
        How many codes, a multiple of 4.
    into, at
        Registers of int32, and the first of them.
    zero
        Whether columns past the end are zeros (else anything that may be loaded).
    """
    unit = min(matrix.aligned, 16, count * matrix.size)
    if unit < 4:
        _load_single(w, matrix, row, first, most, count, into, at)
        return
    codes = unit // matrix.size
    for part in range(count // codes):
        column, place = first + part * codes, at + part * unit // 4
        passes = most + (part + 1) * codes > matrix.columns
        last = const(matrix.columns - codes, "int32")
        source = row + (tirx.min(column, last) if passes else column)
        w.call(f"vitq_load{unit}", pointer(into, place), pointer(matrix.buffer, source))
        if passes and zero:
            for word in range(unit // 4):
                value = tirx.Select(column <= last, load(into, place + word), const(0, "int32"))
                w.store(into, value, place + word)


def load_depth(w: CudaWriter, matrix: Matrix, row: Any, t: Any, into: Any, at: int,
               zero: bool) -> None:
    """Load this thread's channels of a row of Q or K: see the module's docstring."""
    steps = -(-matrix.columns // 32)
    for pair in range(steps // 2):
        load_codes(w, matrix, row, t * 16 + 64 * pair, 64 * pair + 48, 16, into,
                   at + pair * 4 * matrix.size, zero)
    if steps % 2:
        first = 32 * (steps - 1)
        load_codes(w, matrix, row, t * 8 + first, first + 24, 8, into,
                   at + (steps - 1) * 2 * matrix.size, zero)


def _load_single(w: CudaWriter, matrix: Matrix, row: Any, first: Any, most: int, count: int,
                 into: Any, at: int) -> None:
    """Load codes one by one, zeros past the end; for rows that no word is aligned in."""
    bits, each = 8 * matrix.size, 4 // matrix.size
    kind = f"uint{bits}"
    for word in range(count // each):
        total: Any = const(0, "int32")
        for i in range(each):
            column = first + word * each + i
            last = const(matrix.columns - 1, "int32")
            inside = most + word * each + i < matrix.columns
            code = load(matrix.buffer, row + (column if inside else tirx.min(column, last)))
            code = tirx.Cast("int32", tirx.reinterpret(kind, code))
            if not inside:
                code = tirx.Select(column <= last, code, const(0, "int32"))
            total = tirx.bitwise_or(total, tirx.shift_left(code, const(i * bits, "int32")))
        w.store(into, total, at + word)


def fragments(w: CudaWriter, dtype: str, raw: Any, at: int, words: int, into: Any,
              places: Sequence[int]) -> None:
    """Split ``4 * words`` codes in planes: ``words`` words of four bytes each.

    Parameters
    ----------
    raw, at
        The codes as words in memory's order, from word ``at`` (of 16-bit ones, twice as many).
    into, places
        Registers, and where each plane's words go.
    """
    for place, selector in zip(places, (HIGH, LOW), strict=False):
        for i in range(words):
            if dtype == "int16":
                pair = [load(raw, at + 2 * i + j) for j in range(2)]
                value = w.value("vitq_bytes", *pair, selector)
            else:
                value = load(raw, at + i)
            w.store(into, value, place + i)


def transposed(w: CudaWriter, dtype: str, raw: Any, rows: Sequence[int], into: Any,
               places: Sequence[Sequence[int]]) -> None:
    """Transpose four rows of four codes.

    Parameters
    ----------
    raw, rows
        Registers, and where each row's first word is.
    into, places
        Registers, and where column i of each plane goes: ``places[plane][i]``.
    """
    blocks: list[tuple[int, list[int]]]
    if dtype == "int16":
        # The columns of bytes of a word are low, high, low, high.
        high, low = places
        blocks = [(half, [low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]])
                  for half in range(2)]
    else:
        blocks = [(0, list(places[0]))]
    for word, columns in blocks:
        r = [load(raw, row + word) for row in rows]
        near = [w.bind("near", w.value("vitq_bytes", r[i], r[i + 1], 0x5140)) for i in (0, 2)]
        far = [w.bind("far", w.value("vitq_bytes", r[i], r[i + 1], 0x7362)) for i in (0, 2)]
        for pair, (first, second) in zip((near, far), (columns[:2], columns[2:]), strict=True):
            w.store(into, w.value("vitq_bytes", *pair, 0x5410), first)
            w.store(into, w.value("vitq_bytes", *pair, 0x7632), second)
