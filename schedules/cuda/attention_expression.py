"""Expressions of TE definitions in 32-bit registers, each value with its interval.

Definitions name the dtype of every step (uint16, int64, ...), which on a GPU would cost a
truncation each. Here every value is an int32 register where its interval fits one, else a uint32 or
an int64 one. Intervals come from interval arithmetic; one that grows past the step's own dtype is
cut to it: the operator's definition promises, and its range proof shows, that nothing overflows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx

from schedules.builder import const, load

from .writer import CudaWriter

__all__ = ["NotTaken", "Steps", "Translator", "Value", "clamp_value", "element", "rescaled"]

BINARY = {
    "Add": tirx.Add, "Sub": tirx.Sub, "Mul": tirx.Mul, "Min": tirx.Min, "Max": tirx.Max,
    "FloorDiv": tirx.FloorDiv, "FloorMod": tirx.FloorMod, "LShift": tirx.shift_left,
    "RShift": tirx.shift_right, "BitwiseAnd": tirx.bitwise_and,
}

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Min": min, "Max": max,
    "LShift": operator.lshift, "RShift": operator.rshift,
}
_CLZ = tirx.clz(const(1, "int32")).op


class NotTaken(Exception):
    """The kernel has no form for this; its message says for what."""


@dataclass(frozen=True)
class Value:
    """A register's expression, its dtype (int32, uint32 or int64) and its interval."""

    code: Any
    lo: int
    hi: int
    dtype: str = "int32"

    def to(self, dtype: str) -> Any:
        """Return the code in another register dtype that holds the interval."""
        if isinstance(self.code, tirx.IntImm):
            return const(int(self.code), dtype)
        return self.code if dtype == self.dtype else tirx.Cast(dtype, self.code)


def limits(dtype: str) -> tuple[int, int]:
    """Return the interval of an integer dtype."""
    if not dtype.startswith(("int", "uint")):
        raise NotTaken(f"values of dtype {dtype}")
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def register_of(lo: int, hi: int) -> str:
    """Return the register dtype for an interval."""
    for dtype in ("int32", "uint32"):
        low, high = limits(dtype)
        if low <= lo and hi <= high:
            return dtype
    return "int64"


def element(code: Any, dtype: str) -> Value:
    """Return the value of a code of ``dtype``, widened to a register."""
    kind = register_of(*limits(dtype))
    return Value(code if dtype == kind else tirx.Cast(kind, code), *limits(dtype), kind)


def _interval(op: str, a: Value, b: Value) -> tuple[int, int] | None:
    if op in ("FloorDiv", "FloorMod"):
        if a.lo < 0 or b.lo <= 0:
            return None
        return (a.lo // b.hi, a.hi // b.lo) if op == "FloorDiv" else (0, b.hi - 1)
    if op == "BitwiseAnd":
        bounds = [v.hi for v in (a, b) if v.lo >= 0]
        return (0, min(bounds)) if bounds else None
    if op in ("LShift", "RShift") and not (b.lo >= 0 and b.hi < 64):
        return None
    ends = [_OPERATIONS[op](x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return min(ends), max(ends)


class Steps:
    """Keeps values in arrays of registers: TVM's passes would write a bound one out at every use.

    Nor do they see intervals of what is kept, from which they drop clamps that are needed.
    """

    _COUNT = 8

    def __init__(self, writer: CudaWriter) -> None:
        self.w = writer
        self.arrays: dict[str, tuple[Any, int]] = {}

    def keep(self, value: Value) -> Value:
        """Return the value, kept in a register."""
        code = value.code
        if isinstance(code, tirx.IntImm) or (
                type(code).__name__ == "TensorLoad" and code.source.scope() == "local"):
            return value
        array, used = self.arrays.get(value.dtype, (None, self._COUNT))
        if used == self._COUNT:
            array, used = self.w.registers("v", self._COUNT, value.dtype), 0
        self.w.store(array, code, used)
        self.arrays[value.dtype] = array, used + 1
        return Value(load(array, used), value.lo, value.hi, value.dtype)


class Translator:
    """Rebuilds expressions.

    Parameters
    ----------
    writer
        Where steps are kept.
    read
        Gives the value of a TensorLoad.
    known
        Intervals of expressions that interval arithmetic does not see: node -> (lo, hi).
    """

    def __init__(self, writer: CudaWriter, read: Callable[[Any], Value],
                 known: Mapping[Any, tuple[int, int]] | None = None) -> None:
        self.steps = Steps(writer)
        self.read = read
        self.known = known or {}
        self.done: dict[Any, Value] = {}
        self.equal: dict[int, list[tuple[Any, Value]]] = {}

    def value(self, expr: Any) -> Value:
        """Return the value of an expression, once for all that are equal."""
        if expr in self.done:
            return self.done[expr]
        alike = self.equal.setdefault(tvm_ffi.structural_hash(expr), [])
        found = next((value for other, value in alike
                      if tvm_ffi.structural_equal(expr, other)), None)
        if found is None:
            found = self.steps.keep(self._value(expr))
            alike.append((expr, found))
        self.done[expr] = found
        return found

    def _value(self, expr: Any) -> Value:
        kind = type(expr).__name__
        if kind == "IntImm":
            number = int(expr)
            dtype = register_of(number, number)
            return Value(const(number, dtype), number, number, dtype)
        if kind == "TensorLoad":
            return self.read(expr)
        if kind == "Cast":
            return self._cast(self.value(expr.value), str(expr.ty.dtype))
        special = self._ramp(expr) if kind == "Min" else self._magnitude(expr) if (
            kind == "Max") else None
        if special is not None:
            return special
        if kind in BINARY:
            return self._binary(expr, kind, self.value(expr.a), self.value(expr.b))
        if kind == "Call" and expr.op.same_as(_CLZ) and str(expr.args[0].ty.dtype) == "int32":
            return Value(tirx.clz(self.value(expr.args[0]).to("int32")), 0, 32)
        raise NotTaken(f"{kind} in an expression")

    def _cast(self, value: Value, dtype: str) -> Value:
        low, high = limits(dtype)
        if low <= value.lo and value.hi <= high:
            return value
        if dtype == "int64":
            return Value(value.to("int64"), value.lo, value.hi, "int64")
        return element(tirx.Cast(dtype, value.code), dtype)

    def _binary(self, expr: Any, op: str, a: Value, b: Value) -> Value:
        dtype = str(expr.ty.dtype)
        interval = self.known.get(expr) or _interval(op, a, b)
        lo, hi = limits(dtype)
        if interval is not None and lo <= interval[0] and interval[1] <= hi:
            lo, hi = interval
        for first, second in ((a, b), (b, a)):
            below = first.hi <= second.lo if op == "Min" else first.lo >= second.hi
            if op in ("Min", "Max") and below:
                return first
        mask = b.lo
        if op == "BitwiseAnd" and b.lo == b.hi and mask & (mask + 1) == 0 <= a.lo and a.hi <= mask:
            return a
        if op == "RShift":
            rescale = self._power_of_two(expr.a, b)
            if rescale is not None:
                return rescale
        # Operands and result in one register dtype: int32 and uint32 ones need an int64.
        kinds = {register_of(v.lo, v.hi) for v in (a, b)} | {register_of(lo, hi)}
        if op in ("LShift", "RShift"):
            kinds = {register_of(a.lo, a.hi), register_of(lo, hi)}
        kind = self._common(kinds, min(a.lo, b.lo, lo))
        if op in ("FloorDiv", "FloorMod") and b.lo != b.hi:
            # That no divisor is 0 or negative is the operator's promise; intervals may not see it.
            if kind != "int32":
                raise NotTaken(f"a division of {kind}")
            quotient = self.steps.w.value("vitq_divide", a.to(kind), b.to(kind))
            if op == "FloorMod":
                quotient = a.to(kind) - quotient * b.to(kind)
            return Value(quotient, lo, hi, kind)
        return Value(BINARY[op](a.to(kind), b.to(kind)), lo, hi, kind)

    @staticmethod
    def _common(kinds: set[str], lowest: int) -> str:
        if len(kinds) == 1:
            return kinds.pop()
        return "uint32" if "int64" not in kinds and lowest >= 0 else "int64"

    def _magnitude(self, expr: Any) -> Value | None:
        """Return ``max(x, 0 - x)``."""
        if type(expr.b).__name__ != "Sub" or not tvm_ffi.structural_equal(expr.a, expr.b.b):
            return None
        zero, value = self.value(expr.b.a), self.value(expr.a)
        if (zero.lo, zero.hi) != (0, 0) or value.dtype != "int32" or value.lo == -(2**31):
            return None
        code = self.steps.w.value("vitq_abs", value.code)
        return Value(code, max(value.lo, -value.hi, 0), max(-value.lo, value.hi))

    def _ramp(self, expr: Any) -> Value | None:
        """Return ``min(max(x, 0), end)``."""
        if type(expr.a).__name__ != "Max":
            return None
        low, value, end = (self.value(e) for e in (expr.a.b, expr.a.a, expr.b))
        if (low.lo, low.hi) != (0, 0) or end.lo < 0 or value.lo >= 0 or value.hi <= 0 or any(
                v.dtype != "int32" for v in (value, end)):
            return None
        code = self.steps.w.value("vitq_ramp", value.code, end.code)
        return Value(code, 0, min(value.hi, end.hi))

    def saturated(self, expr: Any, dtype: str) -> Value:
        """Return the value without clamps to all of its dtype, for one who limits it to that."""
        inner = expr
        for wanted, end in (("Cast", None), ("Min", 1), ("Max", 0)):
            if type(inner).__name__ != wanted:
                return self.value(expr)
            if end is None:
                inner = inner.value
                continue
            bound = self.value(inner.b)
            if bound.lo != bound.hi or bound.lo != limits(dtype)[end]:
                return self.value(expr)
            inner = inner.a
        found = self.value(inner)
        return found if found.dtype == "int32" else self.value(expr)

    def _power_of_two(self, total: Any, shift: Value) -> Value | None:
        """Return ``(x * 2^k + 2^(e-1)) >> e`` without its product: the scales were the same."""
        if type(total).__name__ != "Add" or type(total.a).__name__ != "Mul":
            return None
        factor, rounding = self.value(total.a.b), self.value(total.b)
        if any(v.lo != v.hi for v in (factor, rounding, shift)) or shift.lo < 1:
            return None
        if rounding.lo != 1 << (shift.lo - 1):
            return None
        return rescaled(self.value(total.a.a), factor.lo, shift.lo, False)


def rescaled(value: Value, mult: int, shift: int, general: bool = True) -> Value | None:
    """Return ``(value * mult + 2^(shift-1)) >> shift``, a shift where mult is a power of two.

    None if it is not and ``general`` is false.
    """
    power = mult.bit_length() - 1
    lo, hi = ((end * mult + (1 << (shift - 1))) >> shift for end in (value.lo, value.hi))
    if mult < 1 or mult != 1 << power:
        if not general:
            return None
        lo, hi = min(lo, hi), max(lo, hi)
        rounding = const(1 << (shift - 1), "int64")
        product = value.to("int64") * const(mult, "int64") + rounding
        kind = register_of(lo, hi)
        return Value(tirx.Cast(kind, product >> const(shift, "int64")), lo, hi, kind)
    down = shift - power
    if down <= 0:
        kind = register_of(min(lo, value.lo), max(hi, value.hi))
        return Value(value.to(kind) << const(-down, kind) if down else value.code, lo, hi,
                     kind if down else value.dtype)
    if down > 62:
        return None if not general else Value(const(0, "int32"), 0, 0)
    half = 1 << (down - 1)
    kind = register_of(min(value.lo, value.lo + half), value.hi + half)
    return Value((value.to(kind) + const(half, kind)) >> const(down, kind), lo, hi, kind)


def clamp_value(value: Value, low: int, high: int) -> Value:
    """Return ``value`` limited to [low, high], without what changes nothing."""
    code, dtype = value.code, value.dtype
    if value.hi > high:
        code = tirx.min(code, const(high, dtype))
    if value.lo < low:
        code = tirx.max(code, const(low, dtype))
    lo, hi = (min(max(end, low), high) for end in (value.lo, value.hi))
    kind = register_of(lo, hi)
    return Value(code if kind == dtype else tirx.Cast(kind, code), lo, hi, kind)
