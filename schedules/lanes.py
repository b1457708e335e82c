"""Scalar TE expressions as vector code, with every value in the narrowest lanes that hold it.

TE definitions of integer operators are written in int32 and int64. Most of their values are small,
and 16-bit lanes carry twice as many of them. :class:`Lanes` rebuilds an expression for ``width``
neighbouring elements while it tracks the interval of every value: an operation runs in 16-bit lanes
(signed or unsigned) if operands and result provably fit, else in 32, else in 64. Values are
numbered, so a common subexpression is computed once.

Patterns become few instructions: ``(a*b + 2^14) >> 15`` and ``(uint32(a)*uint32(b)) >> 16`` of
16-bit values and ``-2^15 >> q`` are operations of ``schedules.words``; a sum, difference or product
that is cast to 16 bits is taken modulo 2^16; ``(int64(a)*int64(b)) >> 32`` of 32-bit values takes
the high halves of two ``vpmuldq``.

Intervals come from interval arithmetic, and exactly where a value is a function of one value of at
most 17 bits: then it is computed for all of them (polynomials of one argument are far narrower than
interval arithmetic sees). Intervals that grow past an expression's own dtype are cut to it: the
operator's definition promises (and its range proof shows) that nothing overflows there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import tirx

from .builder import Writer, const, vector_type
from .words import Words

__all__ = ["Lanes", "Unsupported", "Value"]

BINARY = {
    "Add": tirx.Add, "Sub": tirx.Sub, "Mul": tirx.Mul, "Min": tirx.Min, "Max": tirx.Max,
    "FloorDiv": tirx.FloorDiv, "FloorMod": tirx.FloorMod, "LShift": tirx.LShift,
    "RShift": tirx.RShift, "BitwiseAnd": tirx.BitwiseAnd, "BitwiseOr": tirx.BitwiseOr,
    "BitwiseXor": tirx.BitwiseXor,
}
EXTREMES = {("Min", "int"): "llvm.smin", ("Max", "int"): "llvm.smax",
            ("Min", "uint"): "llvm.umin", ("Max", "uint"): "llvm.umax"}
VECTOR = frozenset(BINARY) - {"FloorDiv", "FloorMod", "BitwiseOr", "BitwiseXor"}


class Unsupported(Exception):
    """The expression holds something that has no vector form here."""


@dataclass(frozen=True)
class Value:
    """A translated value: its code, what lanes it is in now, its interval, its number."""

    code: Any
    dtype: str
    lo: int
    hi: int
    vector: bool
    number: int
    base: int = -1
    samples: Any = field(default=None, compare=False, repr=False)


def limits(dtype: str) -> tuple[int, int]:
    """Return the interval of an integer dtype; there are no float lanes."""
    if not dtype.startswith(("int", "uint")):
        raise Unsupported(dtype)
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _fits(dtype: str, *values: tuple[int, int]) -> bool:
    low, high = limits(dtype)
    return all(low <= lo and hi <= high for lo, hi in values)


def _cut(interval: tuple[int, int], dtype: str) -> tuple[int, int]:
    low, high = limits(dtype)
    lo, hi = interval
    return (low, high) if lo < low or hi > high else (lo, hi)


def _evaluate(op: str, a: Any, b: Any) -> Any:
    """Return an operation on int64 samples, None if it has no meaning for some of them."""
    if op in ("LShift", "RShift"):
        if np.min(b) < 0 or np.max(b) > 62:
            return None
        return np.left_shift(a, b) if op == "LShift" else np.right_shift(a, b)
    functions = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Min": np.minimum,
                 "Max": np.maximum, "BitwiseAnd": np.bitwise_and}
    return functions[op](a, b) if op in functions else None


def _interval(op: str, a: Value, b: Value) -> tuple[int, int] | None:
    """Return the exact interval of an operation on two intervals, None if nothing is known."""
    if op == "Add":
        return a.lo + b.lo, a.hi + b.hi
    if op == "Sub":
        return a.lo - b.hi, a.hi - b.lo
    if op == "Mul":
        ends = [p * q for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
        return min(ends), max(ends)
    if op == "Min":
        return min(a.lo, b.lo), min(a.hi, b.hi)
    if op == "Max":
        return max(a.lo, b.lo), max(a.hi, b.hi)
    if op == "BitwiseAnd" and min(a.lo, b.lo) < 0 <= max(a.lo, b.lo):
        return 0, a.hi if a.lo >= 0 else b.hi
    if op == "BitwiseAnd" and a.lo >= 0 and b.lo >= 0:
        return 0, min(a.hi, b.hi)
    if op in ("RShift", "LShift") and b.lo >= 0 and b.hi < 64:
        move: Callable[[int, int], int] = (lambda x, n: x >> n) if op == "RShift" else (
            lambda x, n: x << n)
        ends = [move(x, n) for x in (a.lo, a.hi) for n in (b.lo, b.hi)]
        return min(ends), max(ends)
    return None


class Lanes:
    """Translates expressions into ``writer`` for ``width`` elements at a time.

    Parameters
    ----------
    writer
        Where values are bound.
    words
        Word operations of the target; they know the number of elements of a vector.
    load
        ``load(buffer, indices)`` gives the :class:`Value` of a TensorLoad (through
        :meth:`leaf`), indices untranslated.
    """

    def __init__(self, writer: Writer, words: Words, load: Callable[[Any], Value]) -> None:
        self.w = writer
        self.words = words
        self.width = words.width
        self.load = load
        self.known: dict[Any, Value] = {}

    # Values

    def leaf(self, key: Any, code: Any, dtype: str, vector: bool,
             interval: tuple[int, int] | None = None) -> Value:
        """Return the value of ``code``, bound once under ``key``."""
        return self._number(("leaf", key), code, dtype, vector, interval or limits(dtype))

    def _number(self, key: Any, code: Any, dtype: str, vector: bool,
                interval: tuple[int, int]) -> Value:
        if key not in self.known:
            bound = self.w.bind("v" if vector else "s", code)
            self.known[key] = Value(bound, dtype, *interval, vector, len(self.known))
        return self.known[key]

    def constant(self, value: int, dtype: str) -> Value:
        """Return a constant."""
        key = ("const", value, dtype)
        if key not in self.known:
            self.known[key] = Value(const(value, dtype), dtype, value, value, False,
                                    len(self.known))
        return self.known[key]

    def to(self, value: Value, dtype: str, vector: bool | None = None) -> Value:
        """Return a value in other lanes (and as a vector, if asked)."""
        vector = value.vector if vector is None else vector
        if vector and not value.vector and value.lo == value.hi:
            code = const(value.lo, vector_type(dtype, self.width))
            return Value(code, dtype, value.lo, value.hi, True, value.number)
        if value.dtype != dtype:
            kind = vector_type(dtype, self.width) if value.vector else dtype
            done = self._number(("to", value.number, dtype), tirx.Cast(kind, value.code), dtype,
                                value.vector, (value.lo, value.hi))
            value = replace(value, code=done.code, dtype=dtype)
        if vector and not value.vector:
            done = self._number(("splat", value.number, dtype),
                                tirx.Broadcast(value.code, self.width), dtype, True,
                                (value.lo, value.hi))
            value = replace(value, code=done.code, vector=True)
        return value

    # Expressions

    def translate(self, expr: Any) -> Value:
        """Return the value of a TE expression."""
        kind = type(expr).__name__
        if kind == "IntImm":
            return self.constant(int(expr), str(expr.ty.dtype))
        if kind == "TensorLoad":
            return self.load(expr)
        if kind == "Cast":
            dtype = str(expr.ty.dtype)
            return self._modular(expr.value, dtype) or self._cast(self.translate(expr.value), dtype)
        if kind in BINARY:
            return self._pattern(expr) or self._binary(
                kind, self.translate(expr.a), self.translate(expr.b), str(expr.ty.dtype))
        if kind == "Call":
            return self._call(expr)
        raise Unsupported(kind)

    def _cast(self, value: Value, dtype: str) -> Value:
        if not value.vector:
            return self.to(value, dtype) if value.dtype != dtype else value
        if _fits(dtype, (value.lo, value.hi)):
            return value
        return self._number(("cast", value.number, dtype),
                            tirx.Cast(vector_type(dtype, self.width), value.code), dtype, True,
                            limits(dtype))

    def _modular(self, expr: Any, dtype: str) -> Value | None:
        """Return a sum, difference or product of 16-bit values modulo 2^16."""
        op = type(expr).__name__
        if dtype not in ("int16", "uint16") or op not in ("Add", "Sub", "Mul"):
            return None
        a, b = self.translate(expr.a), self.translate(expr.b)
        if not (a.vector or b.vector) or not all(
                _fits("int16", (v.lo, v.hi)) or _fits("uint16", (v.lo, v.hi)) for v in (a, b)):
            return None
        known = _interval(op, a, b)
        if known is not None and _fits(dtype, known):
            return None
        code = BINARY[op](self.to(a, dtype, True).code, self.to(b, dtype, True).code)
        return self._number(("modulo", op, a.number, b.number, dtype), code, dtype, True,
                            limits(dtype))

    def _sampled(self, value: Value) -> tuple[int, Any]:
        """Return (base, samples) of a value, itself the base if it is small enough."""
        if value.lo == value.hi:
            return -1, np.int64(value.lo)
        if value.samples is not None:
            return value.base, value.samples
        if value.hi - value.lo < 2**17 + 2:
            return value.number, np.arange(value.lo, value.hi + 1, dtype=np.int64)
        return -2, None

    def _exactly(self, op: Callable[[Any, Any], Any], a: Value, b: Value) -> tuple[int, Any]:
        """Return (base, samples) of an operation on functions of one base, samples None if not."""
        (base_a, left), (base_b, right) = self._sampled(a), self._sampled(b)
        bases = {base for base in (base_a, base_b) if base != -1}
        if len(bases) != 1 or -2 in bases or not (a.vector or b.vector):
            return -1, None
        result = op(left, right)
        return (bases.pop(), result) if result is not None else (-1, None)

    def _with_samples(self, value: Value, base: int, samples: Any) -> Value:
        if samples is None or value.samples is not None:
            return value
        done = replace(value, base=base, samples=samples)
        for key, known in self.known.items():
            if known is value:
                self.known[key] = done
                break
        return done

    def _binary(self, op: str, a: Value, b: Value, dtype: str) -> Value:
        if op in ("Add", "Mul", "Min", "Max", "BitwiseAnd") and a.number > b.number:
            a, b = b, a
        known = _interval(op, a, b)
        base, samples = self._exactly(lambda p, q: _evaluate(op, p, q), a, b)
        if samples is not None:
            known = int(samples.min()), int(samples.max())
            if not _fits(dtype, known):
                samples = None
        interval = limits(dtype) if known is None else _cut(known, dtype)
        key = (op, a.number, b.number, dtype)
        if not (a.vector or b.vector):
            left, right = self.to(a, dtype), self.to(b, dtype)
            return self._number(key, BINARY[op](left.code, right.code), dtype, False, interval)
        if op not in VECTOR:
            raise Unsupported(op)
        if (op in ("Min", "Max") and a.vector != b.vector) or op == "Min":
            trivial = self._no_op(op, a, b)
            if trivial is not None:
                return trivial
        for mask, other in ((a, b), (b, a)):
            if (op == "BitwiseAnd" and mask.lo == mask.hi and mask.lo & (mask.lo + 1) == 0
                    and other.vector and other.lo >= 0 and other.hi <= mask.lo):
                return other
        lanes = self._lanes_for(op, a, b, interval)
        left, right = self.to(a, lanes, True), self.to(b, lanes, True)
        if op in ("Min", "Max"):
            # TVM's interval analysis fails on products of clamped vectors: keep clamps from it.
            code = tirx.call_llvm_pure_intrin(
                vector_type(lanes, self.width), EXTREMES[op, lanes.rstrip("0123456789")],
                left.code, right.code)
        else:
            code = BINARY[op](left.code, right.code)
        return self._with_samples(
            self._number(key, code, lanes, True, interval), base, samples)

    def _no_op(self, op: str, a: Value, b: Value) -> Value | None:
        """Return the operand that a min or max always picks, if there is one."""
        for first, second in ((a, b), (b, a)):
            below = first.hi <= second.lo if op == "Min" else first.lo >= second.hi
            if below and first.vector:
                return first
        return None

    def _lanes_for(self, op: str, a: Value, b: Value, result: tuple[int, int]) -> str:
        values = [(a.lo, a.hi), (b.lo, b.hi), result]
        variable_shift = op in ("LShift", "RShift") and b.lo != b.hi
        for lanes in ("int16", "uint16"):
            if _fits(lanes, *values) and not variable_shift:
                return lanes
        return "int32" if _fits("int32", *values) else "int64"

    def _call(self, expr: Any) -> Value:
        name = str(expr.op.name)
        args = [self.translate(arg) for arg in expr.args]
        if any(arg.vector for arg in args):
            raise Unsupported(name)
        dtype = str(expr.ty.dtype)
        code = tirx.call_intrin(dtype, name, *(arg.code for arg in args))
        key = (name, *(arg.number for arg in args))
        return self._number(key, code, dtype, False, limits(dtype))

    # Patterns

    def _pattern(self, expr: Any) -> Value | None:
        if type(expr).__name__ == "Max" and type(expr.b).__name__ == "Sub":
            return self._magnitude(expr)
        if type(expr).__name__ != "RShift":
            return None
        if type(expr.a).__name__ == "IntImm" and int(expr.a) == -(2**15):
            return self._power(self.translate(expr.b))
        if type(expr.b).__name__ != "IntImm":
            return None
        amount, inner = int(expr.b), expr.a
        if amount == 32 and str(expr.ty.dtype) == "int64" and type(inner).__name__ == "Mul":
            return self._high_product(self.translate(inner.a), self.translate(inner.b))
        if amount == 16 and str(expr.ty.dtype) == "uint32" and type(inner).__name__ == "Mul":
            return self._high_word(self.translate(inner.a), self.translate(inner.b))
        if (amount == 15 and type(inner).__name__ == "Add" and type(inner.a).__name__ == "Mul"
                and type(inner.b).__name__ == "IntImm" and int(inner.b) == 2**14):
            return self._rounded_product(self.translate(inner.a.a), self.translate(inner.a.b))
        return None

    def _rounded_product(self, a: Value, b: Value) -> Value | None:
        if not self.words.rounded_name or not (a.vector or b.vector):
            return None
        if not all(_fits("int16", (v.lo, v.hi)) for v in (a, b)) or a.lo + b.lo == -(2**16):
            return None
        ends = [(p * q + 2**14) >> 15 for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
        base, samples = self._exactly(lambda p, q: (p * q + 2**14) >> 15, a, b)
        if samples is not None:
            ends = [int(samples.min()), int(samples.max())]
        left, right = self.to(a, "int16", True), self.to(b, "int16", True)
        code = self.words.rounded(left.code, right.code)
        return self._with_samples(
            self._number(("mulhrs", a.number, b.number), code, "int16", True,
                         (min(ends), max(ends))), base, samples)

    def _high_word(self, a: Value, b: Value) -> Value | None:
        if not (a.vector or b.vector) or not all(_fits("uint16", (v.lo, v.hi)) for v in (a, b)):
            return None
        left, right = self.to(a, "uint16", True), self.to(b, "uint16", True)
        code = self.words.high(left.code, right.code)
        return self._number(("mulhu", a.number, b.number), code, "uint16", True,
                            (a.lo * b.lo >> 16, a.hi * b.hi >> 16))

    def _magnitude(self, expr: Any) -> Value | None:
        """Return ``max(x, 0 - x)`` of 16-bit x, whose result may be 2^15."""
        negated = expr.b
        if type(negated.a).__name__ != "IntImm" or int(negated.a):
            return None
        x = self.translate(expr.a)
        if (not x.vector or x.number != self.translate(negated.b).number
                or not _fits("int16", (x.lo, x.hi))):
            return None
        full = vector_type("int16", self.width)
        value = self.to(x, "int16").code
        code = tirx.call_llvm_pure_intrin(full, "llvm.smax", value, const(0, full) - value)
        most = max(abs(x.lo), abs(x.hi))
        dtype = "int16" if most < 2**15 else "uint16"
        if dtype == "uint16":
            code = tirx.Cast(vector_type(dtype, self.width), code)
        base, samples = self._exactly(lambda p, _: np.abs(p), x, x)
        return self._with_samples(
            self._number(("magnitude", x.number), code, dtype, True, (0, most)), base, samples)

    def _power(self, q: Value) -> Value | None:
        """Return ``-2^15 >> q`` in 16-bit lanes."""
        if not (q.vector and q.lo >= 0 and q.hi <= 15):
            return None
        code = self.words.power(self.to(q, "int16").code)
        shift = self.constant(-(2**15), "int32")
        base, samples = self._exactly(lambda p, n: _evaluate("RShift", p, n), shift, q)
        return self._with_samples(
            self._number(("power", q.number), code, "int16", True, (-(2**15), -1)), base, samples)

    def _high_product(self, a: Value, b: Value) -> Value | None:
        if not (a.vector or b.vector):
            return None
        if not all(_fits("int32", (v.lo, v.hi)) for v in (a, b)):
            return None
        ends = [(p * q) >> 32 for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
        left, right = self.to(a, "int32", True).code, self.to(b, "int32", True).code
        full, half = (vector_type("int32", self.width), vector_type("int64", self.width // 2))
        by = const(32, half)

        def extended(value: Any, odd: bool) -> Any:
            pairs = tirx.reinterpret(half, value)
            if odd:
                pairs = tirx.shift_right(pairs, by)
            return tirx.shift_right(tirx.shift_left(pairs, by), by)

        def product(odd: bool) -> Any:
            # Of a splat both halves are the same. LLVM knows the even one's sign extension also
            # where it stands outside the loop, and only then multiplies by one vpmuldq.
            factors = [extended(code, odd and v.vector) for v, code in ((a, left), (b, right))]
            return tirx.reinterpret(full, factors[0] * factors[1])

        even, odd = product(False), product(True)
        picks = [i + 1 if i % 2 == 0 else self.width + i for i in range(self.width)]
        code = tirx.Shuffle([even, odd], [tirx.const(p, "int32") for p in picks])
        return self._number(("high", a.number, b.number), code, "int32", True,
                            (min(ends), max(ends)))
