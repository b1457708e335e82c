"""What attention does to single elements: the epilogues of its products, biases and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from schedules.builder import const, load
from schedules.gemm import Epilogue
from schedules.rows import Stage
from schedules.strides import entry_offset, permuted_strides

from .attention_expression import (
    NotTaken,
    Steps,
    Translator,
    Value,
    clamp_value,
    element,
    limits,
    register_of,
    rescaled,
)
from .writer import CudaWriter

__all__ = ["Elements", "Scale", "finished"]


class Scale:
    """One multiplier, shift and zero point for all elements of a product, bound once.

    The fast form of ``Epilogue.narrow``: the shift is at least 32 once the operand is lifted, so
    the result is the high word of a 64-bit multiply-add, shifted by what is left.
    """

    def __init__(self, w: CudaWriter, epilogue: Epilogue, scalars: Any) -> None:
        self.w, self.epilogue = w, epilogue
        self.zero: Any = None
        if scalars is None:
            return
        self.mult = w.bind("mult", load(scalars, 0))
        shift = w.bind("shift", load(scalars, 1))
        if int(scalars.shape[0]) > 2:
            self.zero = w.bind("zero", load(scalars, 2))
        one = const(1, "int64")
        lift = epilogue.lift if epilogue.narrow else 0
        shift = shift + lift
        rounding = one << (tirx.Cast("int64", (shift - 1) & 63))
        if epilogue.narrow and epilogue.fold_zero and self.zero is not None:
            # 2^(e-1) + zero * 2^e
            rounding = rounding * (tirx.Cast("int64", self.zero) * const(2, "int64") + one)
            self.zero = None
        self.rounding = w.bind("rounding", rounding)
        # Masked: TVM takes a bare amount for anything, and then drops clamps of the result.
        self.down = w.bind("down", (shift - 32) & 31 if epilogue.narrow
                           else tirx.Cast("int64", shift & 63))

    def apply(self, acc: Value) -> Value:
        """Return the requantised accumulator, with the zero point if it is folded in."""
        value, bits = acc.code, const(32, "int64")
        if not self.epilogue.narrow:
            product = tirx.Cast("int64", value) * tirx.Cast("int64", self.mult) + self.rounding
            return Value(product >> self.down, -(2**61), 2**61, "int64")
        if self.epilogue.lift:
            value = value << const(self.epilogue.lift, "int32")
        product = tirx.Cast("int64", value) * tirx.Cast("int64", self.mult) + self.rounding
        return Value(tirx.Cast("int32", product >> bits) >> self.down, -(2**30), 2**30)


def _sum(a: Value, b: Value) -> Value:
    lo, hi = a.lo + b.lo, a.hi + b.hi
    # Far from 2^63, whatever intervals say: the range proof has it.
    lo, hi = max(lo, -(2**62)), min(hi, 2**62)
    kind = "int32" if register_of(lo, hi) == "int32" else "int64"
    return Value(a.to(kind) + b.to(kind), lo, hi, kind)


def finished(w: CudaWriter, epilogue: Epilogue, acc: Value, scale: Scale,
             residual: Value | None = None) -> Value:
    """Return what an epilogue makes of an accumulator (and of an element of the residual)."""
    if epilogue.kind == "acc":
        return acc
    value = scale.apply(acc)
    if residual is not None:
        added = rescaled(residual, epilogue.res_mult, epilogue.res_shift)
        assert added is not None
        value = _sum(value, added)
    if scale.zero is not None:
        value = _sum(value, Value(scale.zero, *limits("int32")))
    done = clamp_value(value, epilogue.qmin, epilogue.qmax)
    return Steps(w).keep(done)


class Elements:
    """A tensor whose elements go with those of the scores: a position bias, a mask.

    Parameters
    ----------
    w, buffer
        Where, and the tensor, flat.
    entry, rows
        The batch entry, and the two rows of this thread.
    """

    def __init__(self, w: CudaWriter, buffer: Any, entry: Any, rows: Sequence[Any]) -> None:
        self.w, self.buffer, self.entry, self.rows = w, buffer, entry, rows

    def broadcast(self, tensor: Any, shape: Sequence[int]) -> None:
        """Lay ``tensor``'s elements over scores of ``shape``; leading extents of 1 are shared."""
        own = [int(extent) for extent in tensor.shape]
        strides = [0 if extent == 1 else stride
                   for extent, stride in zip(own, permuted_strides(own, ()), strict=True)]
        self._lay(shape, strides)

    def _lay(self, shape: Sequence[int], strides: Sequence[int], first: int = 0) -> None:
        *batch, _, _ = shape
        *outer, down, self.step = strides
        base = self.w.bind("base", entry_offset(self.entry, batch, outer) + first)
        self.at = self.w.registers("at", 2)
        for r, row in enumerate(self.rows):
            self.w.store(self.at, base + row * down, r)

    def value(self, r: Any, column: Any) -> Value:
        """Return the element of row ``r`` at a column."""
        place = load(self.at, r)
        if self.step:
            place = place + column * self.step
        return Steps(self.w).keep(element(load(self.buffer, place), str(self.buffer.dtype)))

    @staticmethod
    def of_stage(w: CudaWriter, flat: Mapping[Any, Any], entry: Any, rows: Sequence[Any],
                 stage: Stage, operand: Any) -> dict[Any, Elements]:
        """Return the elements that an elementwise stage reads beside ``operand``, by their load."""
        found: dict[Any, Elements] = {}
        shape = [int(extent) for extent in stage.buffer.shape]

        def visit(node: Any) -> None:
            if type(node).__name__ != "TensorLoad":
                return
            if node.source.same_as(operand):
                if not all(_is(i, v) or extent == 1
                           for i, v, extent in zip(node.indices, stage.rows, shape, strict=True)):
                    raise NotTaken("scores that are permuted on the way to the softmax")
                return
            own = [int(extent) for extent in node.source.shape]
            strides, first = [0] * len(shape), 0
            for index, stride in zip(node.indices, permuted_strides(own, ()), strict=True):
                axes = [axis for axis, v in enumerate(stage.rows) if _is(index, v)]
                if axes:
                    strides[axes[0]] += stride
                elif isinstance(index, tirx.IntImm):
                    first += int(index) * stride
                else:
                    raise NotTaken(f"an index {index} of a mask")
            made = Elements(w, flat[node.source], entry, rows)
            made._lay(shape, strides, first)
            found[node] = made

        tvm_ffi.structural_walk(stage.value, (object, visit))
        return found

    @staticmethod
    def translate(w: CudaWriter, stage: Stage, operand: Any, value: Value,
                  masks: Mapping[Any, Elements], r: Any, column: Any) -> Value:
        """Return what an elementwise stage makes of ``value`` at row ``r`` and a column."""
        def read(node: Any) -> Value:
            return value if node.source.same_as(operand) else masks[node].value(r, column)

        done = Translator(w, read).value(stage.value)
        low, high = limits(str(stage.buffer.dtype))
        return Value(done.code, max(done.lo, low), min(done.hi, high), done.dtype)


def _is(index: Any, var: Any) -> bool:
    return bool(index.same_as(var))
