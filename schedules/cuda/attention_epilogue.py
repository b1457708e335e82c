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

    The fast form of ``Epilogue.narrow``: an operand that is lifted so far that the shift is at
    least 33 has a rounding constant whose low word is 0. So the result is the high word of a
    product of 32-bit numbers, plus the constant's high word, shifted by what is left.

    Parameters
    ----------
    w, epilogue
        Where, and what.
    scalars
        Flat buffer of multiplier, shift and perhaps zero point; None for ``acc``.
    bound
        Magnitude that no accumulator exceeds.
    """

    def __init__(self, w: CudaWriter, epilogue: Epilogue, scalars: Any, bound: int) -> None:
        self.w, self.epilogue = w, epilogue
        self.zero: Any = None
        self.lift = epilogue.lift + 1
        self.fast = epilogue.narrow and bound << self.lift < 2**31
        if scalars is None:
            return
        self.mult = w.bind("mult", load(scalars, 0))
        shift = w.bind("shift", load(scalars, 1))
        if int(scalars.shape[0]) > 2:
            self.zero = w.bind("zero", load(scalars, 2))
        # Masked: TVM takes a bare amount for anything, and then drops clamps of the result.
        if self.fast:
            self.rounding = w.bind("rounding",
                                   const(1, "int32") << ((shift + (self.lift - 33)) & 31))
            self.down = w.bind("down", (shift + (self.lift - 32)) & 31)
        else:
            wide = tirx.Cast("int64", (shift - 1) & 63)
            self.rounding = w.bind("rounding", const(1, "int64") << wide)
            self.down = w.bind("down", tirx.Cast("int64", shift & 63))

    def apply(self, acc: Value) -> Value:
        """Return the requantised accumulator."""
        if self.fast:
            code = self.w.value("vitq_rescale", acc.code << const(self.lift, "int32"), self.mult,
                                self.rounding, self.down)
            return Value(code, -(2**30), 2**30)
        product = tirx.Cast("int64", acc.code) * tirx.Cast("int64", self.mult) + self.rounding
        return Value(product >> self.down, -(2**61), 2**61, "int64")


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
