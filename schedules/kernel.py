"""What every matmul kernel shares: operands, the register tile, the fused epilogue.

A kernel class derives from :class:`GemmKernel` and says where the column operand's vectors come
from (:meth:`GemmKernel.column_vector`) and how one column block's parameters are found. Rows come
from an :class:`Operand`. The register tile is ``height x vectors`` accumulators; one step of K is
``vectors`` loads of columns, and for every row one broadcast and ``vectors`` dots. Where the dot
multiplies by a lane of a register, a step is as many groups of K as one load of a row brings.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot
from .gemm import Epilogue, Tile, row_tiles
from .operands import Operand, Pass
from .requant import clamp, requantize_wide, scalar_lift

__all__ = ["BITS", "GemmKernel"]

BITS = {"int8": 8, "uint8": 9, "int16": 16, "int32": 32}


class GemmKernel:
    """The register tile and its epilogue; see the module's docstring.

    What the derived class sets before :meth:`all_rows` runs: ``columns`` (N), ``passes``
    (the rows, as the dot loads them), ``out`` and ``residual`` (Operands of the results), ``first``
    (the column block's first column).
    """

    columns: int
    passes: list[Pass]
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
    def whole(self) -> bool:
        """Whether no column block passes the last column."""
        return self.columns % self.nt == 0

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

    def first_value(self, v: int) -> Any:
        """Return what the first pass starts from: 0 for high bytes, whose sum is yet to be shifted.

        :meth:`start_value` is then added to the shifted sum.
        """
        if len(self.passes) > 1:
            return const(0, vector_type("int32", self.lanes))
        return self.start_value(v)

    def rescale(self, v: int) -> Any:
        """Return the fast requantisation parameters of vector ``v``."""
        raise NotImplementedError

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Return int32 vectors of multipliers and shifts of vector ``v``, for the 64-bit form."""
        raise NotImplementedError

    def zero_vector(self, kind: str) -> Any:
        """Return the zero point in every lane of a vector dtype, None if it is 0."""
        return const(self.epilogue.zero_point, kind) if self.epilogue.zero_point else None

    def all_rows(self, total: int, first: Any = None) -> None:
        """Run the register tile over ``total`` rows, from row 0 or ``first``."""
        if self.dot.rows == 2:
            from .arm.pairs import all_pairs

            all_pairs(self, total)
            return
        for start, count, height in row_tiles(total, self.tile.rows):
            with self.w.loop("tile", count) as t:
                row = start + t * height
                if start + count * height > total:
                    row = tirx.min(row, tirx.const(total - height, "int32"))
                if first is not None:
                    row = first + row
                self._row_tile(self.w.bind("first_row", row), height)

    def _row_tile(self, start: Any, height: int) -> None:
        """Accumulate ``height`` rows from ``start`` over all of K, then finish and store them."""
        w, vectors = self.w, self.tile.vectors
        lanes = self.lanes
        acc = w.alloc("acc", (height * vectors * lanes,), "int32")
        for v in range(vectors):
            value = w.bind("start", self.first_value(v))
            with w.loop("r", height, "unrolled") as r:
                w.store(acc, value, (r * vectors + v) * lanes, lanes=lanes)
        for index, step in enumerate(self.passes):
            if index:
                by = const(8, vector_type("int32", lanes))
                for v in range(vectors):
                    value = w.bind("start", self.start_value(v))
                    with w.loop("r", height, "unrolled") as r:
                        at = (r * vectors + v) * lanes
                        total = tirx.shift_left(load(acc, at, lanes=lanes), by) + value
                        w.store(acc, total, at, lanes=lanes)
            self._multiply(step, acc, start, height)
        with w.loop("r", height, "unrolled") as r:
            values = [load(acc, (r * vectors + v) * lanes, lanes=lanes) for v in range(vectors)]
            self.finish(values, start + r)

    def _multiply(self, step: Pass, acc: Any, start: Any, height: int) -> None:
        """Add all of K to the accumulators of ``height`` rows from ``start``."""
        dot, chain = step.dot, self.chain
        whole, tail = divmod(step.rows.depth, dot.kv)
        size = max(chain, dot.span)
        count, rest = divmod(whole, size)
        unroll = self.tile.unroll if count % self.tile.unroll == 0 else 1
        if count:
            with self.w.loop("ko", count // unroll) as ko:
                for u in range(unroll):
                    k = (ko * unroll + u) * size
                    if dot.span > 1:
                        self._wide_step(step, acc, start, height, k)
                    else:
                        self._step(step, acc, start, height, k, size)
        for k in range(whole - rest, whole, chain):
            self._step(step, acc, start, height, k, min(chain, whole - k))
        if tail:
            self._step(step, acc, start, height, whole, 1, tail)

    def _wide_step(self, step: Pass, acc: Any, start: Any, height: int, k: Any) -> None:
        """Add ``span`` groups of K from ``k``, loaded together for each row."""
        w, dot, lanes, chain = self.w, step.dot, self.lanes, self.chain
        size = dot.span * dot.kv
        codes = [w.bind("codes", step.rows.load(start + r, k * dot.kv, size))
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

    def _step(
        self, step: Pass, acc: Any, start: Any, height: int, k: Any, chain: int, valid: int = 0
    ) -> None:
        """Add ``chain`` groups of K from ``k``; the last has ``valid`` codes, if not all."""
        w, vectors, dot = self.w, self.tile.vectors, step.dot
        columns = [[w.bind("w", self.column_vector(k + u, v)) for u in range(chain)]
                   for v in range(vectors)]
        with w.loop("r", height, "unrolled") as r:
            groups = [w.bind("a", dot.spread(_group(step, start + r, k + u, valid or dot.kv)))
                      for u in range(chain)]
            for v in range(vectors):
                at = (r * vectors + v) * self.lanes
                total = dot.step(load(acc, at, lanes=self.lanes), groups, columns[v])
                w.store(acc, total, at, lanes=self.lanes)

    # Epilogue

    def finish(self, values: list[Any], row: Any) -> None:
        """Requantise and store one row's accumulators, vectors of neighbouring columns."""
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
        zero = None if self.folds_zero else self.zero_vector(kind)
        if zero is not None:
            total = total + zero
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
        if self.whole:
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
        if self.whole and len(values) in (2, 4):
            width = lanes * len(values)
            joined = tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(width)])
            w.store(out.buffer, _cast(joined, out.dtype, width), at + self.first, lanes=width)
            return
        for v, value in enumerate(values):
            begin = self.first + v * lanes
            narrow = w.bind("narrow", _cast(value, out.dtype, lanes))
            if self.whole:
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


def _group(step: Pass, row: Any, k: Any, valid: int) -> Any:
    """Return one row's ``kv`` codes at step ``k`` as an integer; the last may be partial."""
    kv, word = step.dot.kv, step.dot.word
    if valid == kv:
        return tirx.reinterpret(word, step.rows.load(row, k * kv, kv))
    bits = int(word.removeprefix("int")) // kv
    total = const(0, word)
    for i in range(valid):
        code = tirx.Cast(word, step.rows.load(row, k * kv + i))
        code = tirx.bitwise_and(code, const((1 << bits) - 1, word))
        total = tirx.bitwise_or(total, tirx.shift_left(code, const(bits * i, word)))
    return total
