"""Rows of activations in the form that a dot sequence loads.

Most sequences load rows as they lie in memory. Others want another dtype (a copy of the rows), two
rows side by side (``smmla``: ``[row pair, K/kv, 2, kv]``), or the high and the low bytes of 16-bit
codes apart; then the rows are multiplied in two passes. A copy touches M*K elements where the
matmul multiplies M*K*N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot

__all__ = ["Operand", "Pass", "linear_shape", "passes_of", "product", "row_pair"]


def product(values: Any) -> int:
    """Return the product of shape extents."""
    total = 1
    for value in values:
        total *= int(value)
    return total


def linear_shape(params: Any, gather: str = "") -> tuple[int, int, int]:
    """Return M, N and K of a weight matmul's PrimFunc, from its parameters; see ``GemmSpec``."""
    *rows, columns = params[-1].shape
    pieces = product(params[-2].shape[1:]) if gather in ("x", "both") else 1
    return product(rows), int(columns), int(params[0].shape[-1]) * pieces


@dataclass(frozen=True)
class Operand:
    """A matrix inside a flat buffer: element (row, column) is at ``base + row*stride + column``.

    With a ``table``, row i of the operand is row ``table[i]`` of the matrix; or, if rows are made
    of several ``pieces``, the rows ``table[i*pieces + p]`` of the matrix side by side.
    """

    buffer: Any
    base: Any
    stride: int
    rows: int
    depth: int
    table: Any = None
    pieces: int = 1

    @property
    def dtype(self) -> str:
        """Dtype of the elements."""
        return str(self.buffer.dtype)

    def place(self, w: Writer, row: Any) -> Any:
        """Return where a row of the operand is in the matrix."""
        return row if self.table is None else w.bind("place", load(self.table, row))

    def load(self, row: Any, column: Any, lanes: int = 1) -> Any:
        """Load neighbouring elements of one row of the matrix."""
        return load(self.buffer, self.base + row * self.stride + column, lanes=lanes)


@dataclass(frozen=True)
class Pass:
    """One walk over K: with which sequence, over which rows."""

    dot: Dot
    rows: Operand


def passes_of(
    w: Writer, source: Operand, dot: Dot, padded: int, offset: int, name: str,
    kind: str = "serial",
) -> list[Pass]:
    """Bring rows plus ``offset`` into the dot's form, zeros behind up to ``padded``.

    The column sums of the other operand, times ``offset``, must be taken off the result.

    Parameters
    ----------
    w
        Receives the copying loops, if any.
    source
        The rows.
    dot
        What will multiply them.
    padded
        K, padded to whole groups.
    offset
        ``dot.offset`` of the source's dtype, or what the packed weights were made for.
    name, kind
        Of the copies, and of the loop over rows that makes them.

    Returns
    -------
    list of Pass
        One; or two, of which the first one's sum counts 256 times.
    """
    if source.pieces > 1 and dot.rows == 2:
        source = _copy_rows(w, source, source.dtype, 16, source.depth, lambda value, _: value,
                            f"{name}_joined", kind)
    if dot.halves is not None:
        high, low = dot.halves
        return [Pass(high, _copy(w, source, high, padded, _high_byte, f"{name}_high", kind)),
                Pass(low, _copy(w, source, low, padded, _low_byte(low), f"{name}_low", kind))]
    in_place = source.dtype == dot.operand and source.table is None
    if in_place and not offset and dot.rows == 1:
        return [Pass(dot, source)]
    return [Pass(dot, _copy(w, source, dot, padded, _cast(source, dot, offset), name, kind))]


Form = Callable[[Any, int], Any]


def _cast(source: Operand, dot: Dot, offset: int) -> Form:
    def form(value: Any, n: int) -> Any:
        kind, byte = vector_type(dot.operand, n), vector_type("uint8", n)
        if offset and dot.operand != "int16":  # int8 and uint8 become each other modulo 256
            value = tirx.reinterpret(byte, value) + const(offset % 256, byte)
            return tirx.reinterpret(kind, value)
        value = value if source.dtype == dot.operand else tirx.Cast(kind, value)
        return value + const(offset, kind) if offset else value

    return form


def _high_byte(value: Any, n: int) -> Any:
    return tirx.Cast(vector_type("int8", n),
                     tirx.shift_right(value, const(8, vector_type("int16", n))))


def _low_byte(dot: Dot) -> Form:
    def form(value: Any, n: int) -> Any:
        byte = vector_type("uint8", n)
        low = tirx.Cast(byte, value)
        if dot.operand == "uint8":
            return low
        return tirx.reinterpret(vector_type("int8", n), low + const(128, byte))

    return form


def _copy(
    w: Writer, source: Operand, dot: Dot, padded: int, form: Form, name: str, kind: str
) -> Operand:
    """Copy rows through ``form``."""
    if dot.rows == 2:
        return _copy_pairs(w, source, dot, padded, form, name, kind)
    step = max(dot.lanes * 2, 16)
    return _copy_rows(w, source, dot.operand, step, padded, form, name, kind)


def _copy_rows(
    w: Writer, source: Operand, dtype: str, step: int, padded: int, form: Form, name: str, kind: str
) -> Operand:
    """Copy rows one by one, ``step`` codes at a time, the pieces of a row side by side."""
    out, pieces = w.alloc(name, (source.rows * padded,), dtype), source.pieces
    width = source.depth // pieces
    with w.loop("row", source.rows, kind) as i, w.loop("piece", pieces) as piece:
        row = source.place(w, i * pieces + piece)
        first, begin = i * padded + piece * width, 0
        while step >= (8 if pieces == 1 else 4):
            whole = (width - begin) // step
            if whole:
                with w.loop("col", whole) as j:
                    at = j * step + begin
                    w.store(out, form(source.load(row, at, step), step), first + at, lanes=step)
                begin += whole * step
            step //= 2
        for k in range(begin, width):
            w.store(out, form(source.load(row, k), 1), first + k)
        for k in range(source.depth, padded):
            w.store(out, const(0, dtype), i * padded + k)
    return Operand(out, 0, padded, source.rows, padded)


def row_pair(pair: Any, rows: int) -> tuple[Any, Any]:
    """Return the two rows of a pair; the last pair of an odd number repeats the row before."""
    last = tirx.const(rows - 1, "int32")
    if rows < 2:
        return last, last
    if rows % 2 == 0:
        return pair * 2, pair * 2 + 1
    first = tirx.min(pair * 2, last - 1)
    return first, first + 1


def _copy_pairs(
    w: Writer, source: Operand, dot: Dot, padded: int, form: Form, name: str, kind: str
) -> Operand:
    """Copy rows of one piece two by two; a "row" of the result is a pair."""
    assert source.pieces == 1
    kv, count = dot.kv, -(-source.rows // 2)
    out = w.alloc(name, (count * 2 * padded,), dot.operand)
    whole = source.depth // kv
    with w.loop("pair", count, kind) as pair:
        rows = [source.place(w, w.bind("row", row)) for row in row_pair(pair, source.rows)]
        with w.loop("group", whole) as group:
            both = [form(source.load(row, group * kv, kv), kv) for row in rows]
            order = [tirx.const(i, "int32") for i in range(2 * kv)]
            at = pair * (2 * padded) + group * (2 * kv)
            w.store(out, tirx.Shuffle(both, order), at, lanes=2 * kv)
        for k in range(whole * kv, padded):
            for half, row in enumerate(rows):
                inside = k < source.depth
                code = form(source.load(row, k), 1) if inside else const(0, dot.operand)
                at = pair * (2 * padded) + (k // kv * 2 + half) * kv + k % kv
                w.store(out, code, at)
    return Operand(out, 0, 2 * padded, count, padded)
