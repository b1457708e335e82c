"""What every matmul kernel shares: operands, the register tile, the fused epilogue.

A kernel class derives from :class:`GemmKernel` and says where the column operand's vectors come
from (:meth:`GemmKernel.column_vector`) and how one column block's parameters are found. Rows come
from an :class:`Operand`. The register tile is ``height x vectors`` accumulators; one step of K is
``vectors`` loads of columns, and for every row one broadcast and ``vectors`` dots. Where the dot
multiplies by a lane of a register, a step is as many groups of K as one load of a row brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot
from .gemm import Epilogue, Tile, row_tiles
from .requant import clamp, requantize_wide, scalar_lift

__all__ = ["GemmKernel", "Operand", "convert_rows", "product"]

BITS = {"int8": 8, "uint8": 9, "int16": 16, "int32": 32}


def product(values: Any) -> int:
    """Return the product of shape extents."""
    total = 1
    for value in values:
        total *= int(value)
    return total


@dataclass(frozen=True)
class Operand:
    """A matrix inside a flat buffer: element (row, column) is at ``base + row*stride + column``.

    With a ``table``, row i of the operand is row ``table[i]`` of the matrix.
    """

    buffer: Any
    base: Any
    stride: int
    rows: int
    depth: int
    table: Any = None

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


def convert_rows(
    w: Writer, source: Operand, dot: Dot, padded: int, offset: int, name: str,
    kind: str = "serial",
) -> Operand:
    """Copy an operand plus ``offset`` into the dot's operand form, zeros behind up to ``padded``.

    The column sums of the other operand, times ``offset``, must be taken off the result.
    """
    out = w.alloc(name, (source.rows * padded,), dot.operand)

    def form(value: Any, n: int) -> Any:
        kind, byte = vector_type(dot.operand, n), vector_type("uint8", n)
        if offset and dot.operand != "int16":  # int8 and uint8 become each other modulo 256
            value = tirx.reinterpret(byte, value) + const(offset % 256, byte)
            return tirx.reinterpret(kind, value)
        value = value if source.dtype == dot.operand else tirx.Cast(kind, value)
        return value + const(offset, kind) if offset else value

    step = dot.lanes * 2
    with w.loop("row", source.rows, kind) as i:
        row = source.place(w, i)
        begin = 0
        while step >= 8:
            whole = (source.depth - begin) // step
            if whole:
                with w.loop("col", whole) as j:
                    at = j * step + begin
                    w.store(out, form(source.load(row, at, step), step), i * padded + at,
                            lanes=step)
                begin += whole * step
            step //= 2
        for k in range(begin, source.depth):
            w.store(out, form(source.load(row, k), 1), i * padded + k)
        for k in range(source.depth, padded):
            w.store(out, const(0, dot.operand), i * padded + k)
    return Operand(out, 0, padded, source.rows, padded)


class GemmKernel:
    """The register tile and its epilogue; see the module's docstring.

    What the derived class sets before :meth:`all_rows` runs: ``columns`` (N), ``rows_of``
    (the row operand), ``out`` and ``residual`` (Operands of the results), ``first`` (the column
    block's first column).
    """

    columns: int
    rows_of: Operand
    out: Operand
    residual: Operand | None = None
    first: Any

    def __init__(self, writer: Writer, dot: Dot, tile: Tile, epilogue: Epilogue) -> None:
        self.w = writer
        self.dot = dot
        self.chain = 1
        self.tile = tile
        self.epilogue = epilogue
        self.lanes = dot.lanes
        self.nt = dot.lanes * tile.vectors

    @property
    def narrow(self) -> bool:
        """Whether accumulator and residual both fit the fast form of requantisation."""
        lifted = self.residual is None or scalar_lift(
            self.epilogue.res_shift, BITS[self.residual.dtype]) is not None
        return self.epilogue.narrow and lifted

    @property
    def folds_zero(self) -> bool:
        """Whether the zero point is in the rounding constants."""
        return self.narrow and self.epilogue.fold_zero and self.dot.arithmetic.FOLDS_ZERO

    def column_vector(self, k: Any, v: int) -> Any:
        """Return the vector of columns ``v`` at step ``k``, in the dot's register form."""
        raise NotImplementedError

    def start_value(self, v: int) -> Any:
        """Return what the accumulators of vector ``v`` start from."""
        raise NotImplementedError

    def rescale(self, v: int) -> Any:
        """Return the fast requantisation parameters of vector ``v``."""
        raise NotImplementedError

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Return int32 vectors of multipliers and shifts of vector ``v``, for the 64-bit form."""
        raise NotImplementedError

    def all_rows(self, total: int) -> None:
        """Run the register tile over rows 0 to ``total``."""
        for start, count, height in row_tiles(total, self.tile.rows):
            with self.w.loop("tile", count) as t:
                row = start + t * height
                if start + count * height > total:
                    row = tirx.min(row, tirx.const(total - height, "int32"))
                self._row_tile(self.w.bind("first_row", row), height)

    def _row_tile(self, start: Any, height: int) -> None:
        """Accumulate ``height`` rows from ``start`` over all of K, then finish and store them."""
        w, vectors = self.w, self.tile.vectors
        lanes = self.lanes
        acc = w.alloc("acc", (height * vectors * lanes,), "int32")
        for v in range(vectors):
            value = w.bind("start", self.start_value(v))
            with w.loop("r", height, "unrolled") as r:
                w.store(acc, value, (r * vectors + v) * lanes, lanes=lanes)
        self._multiply(acc, start, height)
        with w.loop("r", height, "unrolled") as r:
            values = [load(acc, (r * vectors + v) * lanes, lanes=lanes) for v in range(vectors)]
            self._finish(values, start + r)

    def _multiply(self, acc: Any, start: Any, height: int) -> None:
        """Add all of K to the accumulators of ``height`` rows from ``start``."""
        whole, tail = divmod(self.rows_of.depth, self.dot.kv)
        size = max(self.chain, self.dot.span)
        count, rest = divmod(whole, size)
        unroll = self.tile.unroll if count % self.tile.unroll == 0 else 1
        if count:
            with self.w.loop("ko", count // unroll) as ko:
                for u in range(unroll):
                    k = (ko * unroll + u) * size
                    if self.dot.span > 1:
                        self._wide_step(acc, start, height, k)
                    else:
                        self._step(acc, start, height, k, size)
        for k in range(whole - rest, whole, self.chain):
            self._step(acc, start, height, k, min(self.chain, whole - k))
        if tail:
            self._step(acc, start, height, whole, 1, tail)

    def _wide_step(self, acc: Any, start: Any, height: int, k: Any) -> None:
        """Add ``span`` groups of K from ``k``, loaded together for each row."""
        w, dot, lanes, chain = self.w, self.dot, self.lanes, self.chain
        size = dot.span * dot.kv
        codes = [w.bind("codes", self.rows_of.load(start + r, k * dot.kv, size))
                 for r in range(height)]
        for first in range(0, dot.span, chain):
            parts = range(first, first + chain)
            columns = [[w.bind("w", self.column_vector(k + u, v)) for u in parts]
                       for v in range(self.tile.vectors)]
            for r in range(height):
                groups = [w.bind("a", dot.lane(codes[r], u)) for u in parts]
                for v, weights in enumerate(columns):
                    at = (r * self.tile.vectors + v) * lanes
                    total = dot.step(load(acc, at, lanes=lanes), groups, weights)
                    w.store(acc, total, at, lanes=lanes)

    def _step(self, acc: Any, start: Any, height: int, k: Any, chain: int, valid: int = 0) -> None:
        """Add ``chain`` groups of K from ``k``; the last has ``valid`` codes, if not all."""
        w, vectors = self.w, self.tile.vectors
        columns = [[w.bind("w", self.column_vector(k + u, v)) for u in range(chain)]
                   for v in range(vectors)]
        with w.loop("r", height, "unrolled") as r:
            groups = [
                w.bind("a", self.dot.spread(self._group(start + r, k + u, valid or self.dot.kv)))
                for u in range(chain)
            ]
            for v in range(vectors):
                at = (r * vectors + v) * self.lanes
                total = self.dot.step(load(acc, at, lanes=self.lanes), groups, columns[v])
                w.store(acc, total, at, lanes=self.lanes)

    def _group(self, row: Any, k: Any, valid: int) -> Any:
        """Return one row's ``kv`` codes at step ``k`` as an integer; the last may be partial."""
        kv, word = self.dot.kv, self.dot.word
        if valid == kv:
            return tirx.reinterpret(word, self.rows_of.load(row, k * kv, kv))
        bits = int(word.removeprefix("int")) // kv
        total = const(0, word)
        for i in range(valid):
            code = tirx.Cast(word, self.rows_of.load(row, k * kv + i))
            code = tirx.bitwise_and(code, const((1 << bits) - 1, word))
            total = tirx.bitwise_or(total, tirx.shift_left(code, const(bits * i, word)))
        return total

    # Epilogue

    def _finish(self, values: list[Any], row: Any) -> None:
        if self.epilogue.kind != "acc":
            values = [self._codes(self.w.bind("sum", value), v, row)
                      for v, value in enumerate(values)]
        self._save(values, row)

    def _codes(self, value: Any, v: int, row: Any) -> Any:
        """Return the output codes of one vector, as int32."""
        lanes, epilogue = self.lanes, self.epilogue
        if self.narrow:
            kind = vector_type("int32", lanes)
            total = self.rescale(v).apply(value, lanes, self.w)
        else:
            kind = vector_type("int64", lanes)
            total = requantize_wide(value, *self.wide_scale(v), lanes)
        if self.residual is not None:
            rescaled = self._rescaled_residual(self.residual, v, row)
            total = total + (rescaled if self.narrow else tirx.Cast(kind, rescaled))
        if epilogue.zero_point and not self.folds_zero:
            total = total + const(epilogue.zero_point, kind)
        total = clamp(total, epilogue.qmin, epilogue.qmax, kind)
        return self.w.bind("code", tirx.Cast(vector_type("int32", lanes), total))

    def _rescaled_residual(self, residual: Operand, v: int, row: Any) -> Any:
        lanes, epilogue = self.lanes, self.epilogue
        full = vector_type("int32", lanes)
        codes = tirx.Cast(full, self._whole_vector(residual, v, row))
        lift = scalar_lift(epilogue.res_shift, BITS[residual.dtype])
        if lift is None:
            return requantize_wide(codes, const(epilogue.res_mult, full),
                                   const(epilogue.res_shift, full), lanes)
        by = self.dot.arithmetic.scalar_rescale(
            epilogue.res_mult, epilogue.res_shift, lanes, lift)
        return by.apply(codes, lanes, self.w)

    def _whole_vector(self, source: Operand, v: int, row: Any) -> Any:
        """Load vector ``v`` of a row; columns behind N repeat the last one."""
        w, lanes = self.w, self.lanes
        row = source.place(w, row)
        begin = self.first + v * lanes
        if self.columns % self.nt == 0:
            return w.bind("res", source.load(row, begin, lanes))
        local = w.alloc("res", (lanes,), source.dtype)
        with w.when(begin + lanes <= self.columns):
            w.store(local, source.load(row, begin, lanes), 0, lanes=lanes)
        with w.otherwise(), w.loop("lane", lanes) as lane:
            column = tirx.min(begin + lane, tirx.const(self.columns - 1, "int32"))
            w.store(local, source.load(row, column), lane)
        return load(local, 0, lanes=lanes)

    def _save(self, values: list[Any], row: Any) -> None:
        """Store the vectors of one row; the last column block may end inside one."""
        w, lanes, out = self.w, self.lanes, self.out
        at = out.base + row * out.stride
        if self.columns % self.nt == 0 and len(values) in (2, 4):
            width = lanes * len(values)
            joined = tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(width)])
            w.store(out.buffer, _cast(joined, out.dtype, width), at + self.first, lanes=width)
            return
        for v, value in enumerate(values):
            begin = self.first + v * lanes
            narrow = w.bind("narrow", _cast(value, out.dtype, lanes))
            if self.columns % self.nt == 0:
                w.store(out.buffer, narrow, at + begin, lanes=lanes)
                continue
            with w.when(begin + lanes <= self.columns):
                w.store(out.buffer, narrow, at + begin, lanes=lanes)
            with w.otherwise():
                local = w.alloc("tail", (lanes,), out.dtype)
                w.store(local, narrow, 0, lanes=lanes)
                with w.loop("lane", tirx.max(self.columns - begin, 0)) as lane:
                    w.store(out.buffer, load(local, lane), at + begin + lane)


def _cast(value: Any, dtype: str, lanes: int) -> Any:
    return value if dtype == "int32" else tirx.Cast(vector_type(dtype, lanes), value)
