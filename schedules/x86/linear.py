"""The packed weight matmul of x86: register tile, fused epilogue.

``out[i, n] = epilogue(sum_k x[i, k] * w[k, n] + bias[n])`` with weights packed as
``[N/nt, K/kv, nt, kv]`` int8. Loop order: column blocks (parallel), row tiles, K. One block's
weights stay in the first-level cache while all rows pass; activations stream from the second level.

Activations that are not yet what the dot sequence loads (int8 for a 16-bit one, say) are converted
once, in a first stage: it touches M*K elements where the matmul takes M*K*N/32 cycles.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..builder import Writer, const, load, vector_type
from ..gemm import GemmSpec, Tile, row_tiles
from ..requant import (
    Rescale,
    clamp,
    requantize,
    requantize_wide,
    scalar_lift,
    scalar_rescale,
    vector_rescale,
)
from .intrinsics import DOTS, Dot

__all__ = ["packed_linear"]


def _product(values: Any) -> int:
    total = 1
    for value in values:
        total *= int(value)
    return total


def convert_rows(
    w: Writer, source: Any, rows: int, depth: int, padded: int, dot: Dot, lanes: int
) -> Any:
    """Copy a [rows, depth] operand into [rows, padded] of the dot's operand form, zeros behind.

    Signed 8-bit codes become unsigned by adding 128 (folded into the bias when packing).
    """
    out = w.alloc("operand", (rows, padded), dot.operand)
    signed = str(source.dtype) == "int8" and dot.operand == "uint8"

    def form(value: Any, n: int) -> Any:
        if signed:
            flipped = tirx.bitwise_xor(value, const(-128, vector_type("int8", n)))
            return tirx.reinterpret(vector_type("uint8", n), flipped)
        if str(source.dtype) == dot.operand:
            return value
        return tirx.Cast(vector_type(dot.operand, n), value)

    with w.loop("row", rows, "parallel") as i:
        step = lanes * 2
        whole = depth // step
        if whole:
            with w.loop("col", whole) as j:
                w.store(out, form(load(source, i, j * step, lanes=step), step), i, j * step,
                        lanes=step)
        for k in range(whole * step, depth):
            w.store(out, form(load(source, i, k), 1), i, k)
        for k in range(depth, padded):
            w.store(out, const(0, dot.operand), i, k)
    return out


class _Kernel:
    """Builds one PrimFunc; the steps are its methods, in the order in which they run."""

    def __init__(self, params: list[Any], spec: GemmSpec, tile: Tile) -> None:
        self.w = Writer()
        self.spec = spec
        self.tile = tile
        self.dot = DOTS[spec.dot]
        self.lanes = self.dot.lanes
        self.params = params
        self.x, self.weights, self.bias, *rest = params[:-1]
        self.out = params[-1]
        self.mult = self.shift = self.residual = None
        if spec.epilogue.kind != "acc":
            self.mult, self.shift, *rest = rest
        if spec.epilogue.kind == "requant_add":
            (self.residual,) = rest
        self.depth = int(self.x.shape[-1])
        self.rows = _product(self.x.shape) // self.depth
        self.columns = int(self.out.shape[-1])
        self.blocks, self.steps, self.nt, _ = (int(s) for s in self.weights.shape)

    def build(self, attrs: dict[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w, dot = self.w, self.dot
        self.out2 = w.alias(self.out, (self.rows, self.columns), "out2")
        if self.residual is not None:
            self.residual = w.alias(self.residual, (self.rows, self.columns), "res2")
        self.packed = w.alias(
            self.weights, (self.blocks, self.steps, self.nt * dot.kv), "packed"
        )
        self.operand = w.alias(self.x, (self.rows, self.depth), "x2")
        padded = self.steps * dot.kv
        if str(self.x.dtype) != dot.operand or padded != self.depth:
            self.operand = convert_rows(
                w, self.operand, self.rows, self.depth, padded, dot, self.lanes
            )
        with w.loop("block", self.blocks, "parallel") as block:
            self.block = block
            self.expand_weights()
            self.load_columns()
            for start, count, height in row_tiles(self.rows, self.tile.rows):
                with w.loop("tile", count) as t:
                    self.row_tile(start + t * height, height)
        return w.prim_func(self.params, attrs)

    def expand_weights(self) -> None:
        """Sign-extend the block's weights into a local panel, if the tile says so."""
        w, dot = self.w, self.dot
        self.panel = None
        if not self.tile.expand or dot.weight == "int8":
            return
        width = self.nt * dot.kv
        panel = w.alloc("panel", (self.steps, width), "int16")
        with w.loop("k", self.steps) as k:
            value = load(self.packed, self.block, k, 0, lanes=width)
            w.store(panel, tirx.Cast(vector_type("int16", width), value), k, 0, lanes=width)
        self.panel = panel

    def load_columns(self) -> None:
        """Lay the block's bias, multipliers and shifts out for the epilogue."""
        w, lanes, vectors = self.w, self.lanes, self.tile.vectors
        half = lanes // 2
        narrow = self.spec.epilogue.kind != "acc" and self.spec.epilogue.narrow
        self.stash: dict[str, Any] = {}
        if not narrow:
            return
        for name in ("round_even", "round_odd"):
            self.stash[name] = w.alloc(name, (vectors * half,), "int64")
        for name in ("even", "odd", "shift"):
            self.stash[name] = w.alloc(name, (vectors * lanes,), "int32")
        zero_point = self.spec.epilogue.zero_point if self.spec.epilogue.fold_zero else 0
        for v in range(vectors):
            first = self.block * self.nt + v * lanes
            mult = w.bind("mult", load(self.mult, first, lanes=lanes))
            shift = w.bind("shift", load(self.shift, first, lanes=lanes))
            lift = const(self.spec.epilogue.lift, vector_type("int32", lanes))
            for name, value in vector_rescale(mult, shift + lift, lanes, zero_point).items():
                count = half if name.startswith("round") else lanes
                w.store(self.stash[name], value, v * count, lanes=count)

    def row_tile(self, start: Any, height: int) -> None:
        """Accumulate ``height`` rows from ``start`` over all of K, then finish and store them."""
        w, lanes, vectors = self.w, self.lanes, self.tile.vectors
        full = vector_type("int32", lanes)
        acc = w.alloc("acc", (height * vectors,), full)
        first = self.block * self.nt
        for v in range(vectors):
            bias = w.bind("bias", load(self.bias, first + v * lanes, lanes=lanes))
            for r in range(height):
                w.store(acc, bias, r * vectors + v)
        unroll = self.tile.unroll if self.steps % self.tile.unroll == 0 else 1
        with w.loop("ko", self.steps // unroll) as ko:
            for u in range(unroll):
                self.step(acc, start, height, ko * unroll + u)
        for r in range(height):
            values = [load(acc, r * vectors + v) for v in range(vectors)]
            self.finish(values, start + r)

    def step(self, acc: Any, start: Any, height: int, k: Any) -> None:
        """One step of K: load the weights, then for every row one broadcast and its dots."""
        w, dot, lanes, vectors = self.w, self.dot, self.lanes, self.tile.vectors
        width = lanes * dot.kv
        weights = []
        for v in range(vectors):
            if self.panel is not None:
                value = load(self.panel, k, v * width, lanes=width)
            else:
                value = load(self.packed, self.block, k, v * width, lanes=width)
                if dot.weight == "int16":
                    value = tirx.Cast(vector_type("int16", width), value)
            weights.append(w.bind("w", value))
        for r in range(height):
            group = w.bind("a", tirx.reinterpret(
                "int32", load(self.operand, start + r, k * dot.kv, lanes=dot.kv)))
            for v in range(vectors):
                index = r * vectors + v
                w.store(acc, dot.step(load(acc, index), group, weights[v]), index)

    def finish(self, values: list[Any], row: Any) -> None:
        """Epilogue of one row of the tile."""
        epilogue = self.spec.epilogue
        if epilogue.kind == "acc":
            self.save(values, row)
            return
        codes = []
        for v, value in enumerate(values):
            codes.append(self.requantized(self.w.bind("sum", value), v, row))
        self.save(codes, row)

    def requantized(self, value: Any, v: int, row: Any) -> Any:
        """Return the output codes of one vector, still int32 (or int64 in the wide form)."""
        w, lanes, epilogue = self.w, self.lanes, self.spec.epilogue
        first = self.block * self.nt + v * lanes
        half = lanes // 2
        if epilogue.narrow:
            parts = {}
            for name, buffer in self.stash.items():
                count = half if name.startswith("round") else lanes
                parts[name] = load(buffer, v * count, lanes=count)
            total = requantize(value, Rescale(**parts, lift=epilogue.lift), lanes, w)
            kind = vector_type("int32", lanes)
        else:
            total = requantize_wide(value, load(self.mult, first, lanes=lanes),
                                    load(self.shift, first, lanes=lanes), lanes)
            kind = vector_type("int64", lanes)
        if self.residual is not None:
            total = total + self.rescaled_residual(first, row, kind)
        if not (epilogue.narrow and epilogue.fold_zero):
            total = total + const(epilogue.zero_point, kind)
        total = clamp(total, epilogue.qmin, epilogue.qmax, kind)
        return w.bind("code", tirx.Cast(vector_type("int32", lanes), total))

    def rescaled_residual(self, first: Any, row: Any, kind: str) -> Any:
        """Return rq of the residual codes under the vector at column ``first``."""
        lanes, epilogue = self.lanes, self.spec.epilogue
        full = vector_type("int32", lanes)
        buffer = self.residual
        source = self.guarded_load(buffer, row, first)
        codes = tirx.Cast(full, source)
        bits = int(str(buffer.dtype).removeprefix("int"))
        lift = scalar_lift(epilogue.res_shift, bits)
        if lift is None:
            value = requantize_wide(codes, const(epilogue.res_mult, full),
                                    const(epilogue.res_shift, full), lanes)
        else:
            by = scalar_rescale(epilogue.res_mult, epilogue.res_shift, lanes, lift)
            value = requantize(codes, by, lanes, self.w)
        return tirx.Cast(kind, value) if kind.startswith("int64") else value

    def guarded_load(self, buffer: Any, row: Any, first: Any) -> Any:
        """Load a vector of the output's shape; columns behind N are read as the last ones."""
        lanes = self.lanes
        if self.columns % lanes == 0:
            return self.w.bind("res", load(buffer, row, first, lanes=lanes))
        local = self.w.alloc("res", (lanes,), str(buffer.dtype))
        with self.w.when(first + lanes <= self.columns):
            self.w.store(local, load(buffer, row, first, lanes=lanes), 0, lanes=lanes)
        with self.w.otherwise(), self.w.loop("lane", lanes) as lane:
            column = tirx.min(first + lane, tirx.const(self.columns - 1, "int32"))
            self.w.store(local, load(buffer, row, column), lane)
        return load(local, 0, lanes=lanes)

    def save(self, values: list[Any], row: Any) -> None:
        """Store the vectors of one row; the last column block may end inside one."""
        w, lanes = self.w, self.lanes
        out = str(self.out.dtype)
        first = self.block * self.nt
        if self.columns % self.nt == 0 and len(values) in (2, 4):
            width = lanes * len(values)
            joined = tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(width)])
            w.store(self.out2, cast(joined, out, width), row, first, lanes=width)
            return
        for v, value in enumerate(values):
            begin = first + v * lanes
            narrow = w.bind("narrow", cast(value, out, lanes))
            if self.columns % lanes == 0 and self.columns % self.nt == 0:
                w.store(self.out2, narrow, row, begin, lanes=lanes)
                continue
            with w.when(begin + lanes <= self.columns):
                w.store(self.out2, narrow, row, begin, lanes=lanes)
            with w.otherwise():
                local = w.alloc("tail", (lanes,), out)
                w.store(local, narrow, 0, lanes=lanes)
                with w.loop("lane", tirx.max(self.columns - begin, 0)) as lane:
                    w.store(self.out2, load(local, lane), row, begin + lane)


def cast(value: Any, dtype: str, lanes: int) -> Any:
    """Cast an int32 vector, leaving int32 alone."""
    return value if dtype == "int32" else tirx.Cast(vector_type(dtype, lanes), value)


def packed_linear(
    params: list[Any], spec: GemmSpec, tile: Tile, attrs: dict[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of a packed linear operator.

    Parameters
    ----------
    params
        The PrimFunc's buffers: x, weights, bias, [mult, shift], [residual], out; bias, mult and
        shift are padded to whole column blocks.
    spec, tile
        What to compute, and how it is cut. ``tile.vectors`` must be the packed layout's.
    attrs
        Attributes of the new PrimFunc.
    """
    return _Kernel(params, spec, tile).build(attrs)
