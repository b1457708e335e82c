"""What every matmul kernel shares: operands, the register tile, the fused epilogue.

A kernel class derives from :class:`GemmKernel` and says where the column operand's vectors come
from (:meth:`GemmKernel.column_vector`) and how one column block's parameters are found. Rows come
from an :class:`Operand`. The register tile is ``height x vectors`` accumulators; one step of K is
``vectors`` loads of columns, and for every row one broadcast and ``vectors`` dots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .gemm import Epilogue, Tile, row_tiles
from .requant import Rescale, clamp, requantize, requantize_wide, scalar_lift, scalar_rescale
from .x86.intrinsics import Dot

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
    """A matrix inside a flat buffer: element (row, column) is at ``base + row*stride + column``."""

    buffer: Any
    base: Any
    stride: int
    rows: int
    depth: int

    @property
    def dtype(self) -> str:
        """Dtype of the elements."""
        return str(self.buffer.dtype)

    def load(self, row: Any, column: Any, lanes: int = 1) -> Any:
        """Load neighbouring elements of one row."""
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
        kind = vector_type(dot.operand, n)
        if source.dtype == "int8" and dot.operand == "uint8":
            value = tirx.reinterpret(kind, value)  # modulo 256, as the addition is
        elif source.dtype != dot.operand:
            value = tirx.Cast(kind, value)
        return value + const(offset, kind) if offset else value

    step = dot.lanes * 2
    with w.loop("row", source.rows, kind) as i:
        begin = 0
        while step >= 8:
            whole = (source.depth - begin) // step
            if whole:
                with w.loop("col", whole) as j:
                    at = j * step + begin
                    w.store(out, form(source.load(i, at, step), step), i * padded + at, lanes=step)
                begin += whole * step
            step //= 2
        for k in range(begin, source.depth):
            w.store(out, form(source.load(i, k), 1), i * padded + k)
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

    def column_vector(self, k: Any, v: int) -> Any:
        """Return the vector of columns ``v`` at step ``k``, in the dot's register form."""
        raise NotImplementedError

    def start_value(self, v: int) -> Any:
        """Return what the accumulators of vector ``v`` start from."""
        raise NotImplementedError

    def rescale(self, v: int) -> Rescale:
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
        whole, tail = divmod(self.rows_of.depth, self.dot.kv)
        count, rest = divmod(whole, self.chain)
        unroll = self.tile.unroll if count % self.tile.unroll == 0 else 1
        if count:
            with w.loop("ko", count // unroll) as ko:
                for u in range(unroll):
                    self._step(acc, start, height, (ko * unroll + u) * self.chain, self.chain)
        if rest:
            self._step(acc, start, height, whole - rest, rest)
        if tail:
            self._step(acc, start, height, whole, 1, tail)
        with w.loop("r", height, "unrolled") as r:
            values = [load(acc, (r * vectors + v) * lanes, lanes=lanes) for v in range(vectors)]
            self._finish(values, start + r)

    def _step(self, acc: Any, start: Any, height: int, k: Any, chain: int, valid: int = 0) -> None:
        """Add ``chain`` groups of K from ``k``; the last has ``valid`` codes, if not all."""
        w, vectors = self.w, self.tile.vectors
        columns = [[w.bind("w", self.column_vector(k + u, v)) for u in range(chain)]
                   for v in range(vectors)]
        with w.loop("r", height, "unrolled") as r:
            groups = [w.bind("a", self._group(start + r, k + u, valid or self.dot.kv))
                      for u in range(chain)]
            for v in range(vectors):
                at = (r * vectors + v) * self.lanes
                total = self.dot.step(load(acc, at, lanes=self.lanes), groups, columns[v])
                w.store(acc, total, at, lanes=self.lanes)

    def _group(self, row: Any, k: Any, valid: int) -> Any:
        """Return one row's ``kv`` codes at step ``k`` as one int32; the last may be incomplete."""
        kv = self.dot.kv
        if valid == kv:
            return tirx.reinterpret("int32", self.rows_of.load(row, k * kv, kv))
        bits = 32 // kv
        total = const(0, "int32")
        for i in range(valid):
            code = tirx.Cast("int32", self.rows_of.load(row, k * kv + i))
            code = tirx.bitwise_and(code, const((1 << bits) - 1, "int32"))
            total = tirx.bitwise_or(total, tirx.shift_left(code, const(bits * i, "int32")))
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
            total = requantize(value, self.rescale(v), lanes, self.w)
        else:
            kind = vector_type("int64", lanes)
            total = requantize_wide(value, *self.wide_scale(v), lanes)
        if self.residual is not None:
            rescaled = self._rescaled_residual(self.residual, v, row)
            total = total + (rescaled if self.narrow else tirx.Cast(kind, rescaled))
        if not (self.narrow and epilogue.fold_zero):
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
        by = scalar_rescale(epilogue.res_mult, epilogue.res_shift, lanes, lift)
        return requantize(codes, by, lanes, self.w)

    def _whole_vector(self, source: Operand, v: int, row: Any) -> Any:
        """Load vector ``v`` of a row; columns behind N repeat the last one."""
        w, lanes = self.w, self.lanes
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
