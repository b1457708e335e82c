"""The one place where a pending value is rounded to codes (used by :mod:`relay_passes.lower`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatchmethod

import numpy as np
import tvm
from tvm import relax

from .dialect.add import add
from .dialect.boundary import dequantize, quantize
from .dialect.gelu import gelu
from .dialect.layer_norm import layer_norm
from .dialect.linear import linear
from .dialect.matmul import matmul
from .dialect.reduce import sum_
from .dialect.requantize import requantize
from .dialect.softmax import softmax
from .errors import VitqError
from .values import (
    Activation,
    Codes,
    Constant,
    Mean,
    Norm,
    Product,
    Real,
    Score,
    Sum,
)

__all__ = ["Rounder"]

INT32 = (-(2**31), 2**31 - 1)
# Larger than any int16 result can use; leaves room for the other summands in int32.
CONSTANT_LIMIT = 2**24
Target = tuple[float, int, int, int, str]  # scale, zero point, qmin, qmax, dtype


class Rounder:
    """Turn a value into codes of a given scale, zero point and dtype."""

    def __init__(
        self,
        emit: Callable[[relax.Expr], relax.Var],
        lookup: Callable[[relax.Var], relax.Expr | None],
        fail: Callable[[str], VitqError],
    ) -> None:
        self.emit = emit
        self.lookup = lookup
        self.fail = fail

    def __call__(self, value: object, target: Target) -> Codes:
        """Round ``value`` to the target codes, emitting integer operators."""
        expr = self._round(value, target)
        scale, zero_point, qmin, qmax, _ = target
        return Codes(expr, scale, zero_point, qmin, qmax)

    def dequantize(self, codes: Codes) -> relax.Expr:
        """Logit codes to float32: the network's output boundary."""
        return dequantize(codes.expr, codes.scale, codes.zero_point)

    @singledispatchmethod
    def _round(self, value: object, target: Target) -> relax.Expr:
        raise self.fail(f"cannot quantize a {type(value).__name__.lower()}")

    @_round.register
    def _(self, value: Real, target: Target) -> relax.Expr:
        return self.emit(quantize(value.expr, *target))

    @_round.register
    def _(self, value: Constant, target: Target) -> relax.Expr:
        return relax.const(_codes_of(value.data, target))

    @_round.register
    def _(self, value: Codes, target: Target) -> relax.Expr:
        scale, zero_point, qmin, qmax, dtype = target
        same = np.float32(value.scale) == np.float32(scale) and value.zero_point == zero_point
        if same and value.dtype == dtype and qmin <= value.qmin and value.qmax <= qmax:
            return value.expr
        ratio = value.scale / scale
        return self.emit(
            requantize(value.expr, ratio, value.zero_point, zero_point, qmin, qmax, dtype)
        )

    @_round.register
    def _(self, value: Product, target: Target) -> relax.Expr:
        acc, scale = self._product(value)
        return self._requantize(acc, scale, target)

    @_round.register
    def _(self, value: Score, target: Target) -> relax.Expr:
        acc, scale = self._score(value)
        return self._requantize(acc, scale, target)

    @_round.register
    def _(self, value: Sum, target: Target) -> relax.Expr:
        scale, zero_point, qmin, qmax, dtype = target
        wide = (scale, 0, *INT32, "int32")
        # Accumulators first: they are brought to the target scale in int32 and then added.
        order = sorted(value.terms, key=lambda t: isinstance(t, Constant))
        order.sort(key=lambda t: not isinstance(t, (Product, Score)))
        total: relax.Expr | None = None
        ratio, total_zero = 1.0, 0
        for index, term in enumerate(order):
            if isinstance(term, (Product, Score)):
                expr, term_ratio, term_zero = self._round(term, wide), 1.0, 0
            elif isinstance(term, Constant):
                expr, term_ratio, term_zero = _constant_term(term, scale), 1.0, 0
            else:
                expr, term_ratio, term_zero = term.expr, term.scale / scale, term.zero_point
            if total is None:
                total, ratio, total_zero = expr, term_ratio, term_zero
                continue
            last = index == len(order) - 1
            out = (zero_point, qmin, qmax, dtype) if last else (0, *INT32, "int32")
            total = self.emit(
                add(total, expr, ratio, term_ratio, total_zero, term_zero, *out)
            )
            ratio, total_zero = 1.0, 0
        assert total is not None
        return total

    @_round.register
    def _(self, value: Activation, target: Target) -> relax.Expr:
        scale, zero_point, qmin, qmax, dtype = target
        x = value.x
        if value.kind == "softmax":
            if zero_point != 0:
                # Imported quantizers: round to the same steps from 0, then move the codes exactly.
                steps = (scale, 0, 0, min(qmax - zero_point, 32767), "int16")
                plain = self._round(value, steps)
                return self.emit(requantize(plain, 1.0, 0, zero_point, qmin, qmax, dtype))
            return self.emit(
                softmax(x.expr, x.scale, scale, qmax, dtype, value.method)
            )
        return self.emit(
            gelu(
                x.expr, x.scale, x.zero_point, scale, zero_point, qmin, qmax, dtype,
                value.method, value.channel_scale,
            )
        )

    @_round.register
    def _(self, value: Norm, target: Target) -> relax.Expr:
        x = value.x
        expr = x.expr
        if x.zero_point != 0:
            expr = self._centred(x)
        return self.emit(
            layer_norm(expr, x.scale, value.gamma, value.beta, value.eps, *target)
        )

    @_round.register
    def _(self, value: Mean, target: Target) -> relax.Expr:
        scale, zero_point, qmin, qmax, dtype = target
        total = self.emit(sum_(value.x.expr, value.axis, value.keepdims))
        ratio = value.x.scale / (value.size * scale)
        zero = value.size * value.x.zero_point
        return self.emit(
            requantize(total, ratio, zero, zero_point, qmin, qmax, dtype)
        )

    # -- accumulators --------------------------------------------------------------------------
    def _centred(self, x: Codes) -> relax.Expr:
        """Codes with their zero point subtracted, exactly, as int16."""
        if x.dtype not in ("int8", "uint8"):
            raise self.fail("only 8-bit codes may have a zero point here")
        return self.emit(requantize(x.expr, 1.0, x.zero_point, 0, -255, 255, "int16"))

    def _product(self, value: Product) -> tuple[relax.Expr, np.ndarray]:
        x, codes = value.x, value.weight.codes
        scale = x.scale * value.weight.scale
        # A channel without weights may take any scale: the one that keeps its bias exact enough.
        empty = ~codes.any(axis=0)
        scale = np.where(empty, np.maximum(np.abs(value.bias), 1e-30) / 2**20, scale)
        bias = np.floor(value.bias / scale + 0.5)
        bias -= float(x.zero_point) * codes.astype("int64").sum(axis=0)
        worst = int(np.argmax(np.abs(bias)))
        if abs(bias[worst]) >= 2**31:
            raise self.fail(
                f"bias of output channel {worst} does not fit int32 at scale {scale[worst]:.3g}; "
                "the weight scale of that channel is too small"
            )
        acc = linear(x.expr, relax.const(codes), relax.const(bias.astype("int32")))
        return self.emit(acc), scale

    def _score(self, value: Score) -> tuple[relax.Expr, np.ndarray]:
        a = value.a.expr if value.a.zero_point == 0 else self._centred(value.a)
        b = value.b.expr if value.b.zero_point == 0 else self._centred(value.b)
        scale = np.array([value.a.scale * value.b.scale * value.factor])
        swapped = self._row_major(value.b) if value.b.zero_point == 0 else None
        if swapped is not None:
            return self.emit(matmul(a, swapped, True)), scale
        return self.emit(matmul(a, b, False)), scale

    def _row_major(self, b: Codes) -> relax.Expr | None:
        """``b`` with its last two axes swapped, when that keeps the source's last axis in place."""
        call = self.lookup(b.expr) if isinstance(b.expr, relax.Var) else None
        if not (isinstance(call, relax.Call) and call.op == tvm.ir.Op.get("relax.permute_dims")):
            return None
        axes = [int(axis) for axis in call.attrs["axes"]]
        axes[-1], axes[-2] = axes[-2], axes[-1]
        if axes[-1] != len(axes) - 1:
            return None
        source = call.args[0]
        if axes == list(range(len(axes))):
            return source
        return self.emit(relax.op.permute_dims(source, axes))

    def _requantize(self, acc: relax.Expr, scale: np.ndarray, target: Target) -> relax.Expr:
        out_scale, zero_point, qmin, qmax, dtype = target
        return self.emit(
            requantize(acc, scale / out_scale, 0, zero_point, qmin, qmax, dtype)
        )


def _constant_term(term: Constant, scale: float) -> relax.Expr:
    """Codes of a constant summand: int16 where they fit, else int32, never clipped to int16."""
    codes = _codes_of(term.data, (scale, 0, -CONSTANT_LIMIT, CONSTANT_LIMIT, "int32"))
    return relax.const(codes.astype("int16") if np.abs(codes).max(initial=0) < 2**15 else codes)


def _codes_of(data: np.ndarray, target: Target) -> np.ndarray:
    scale, zero_point, qmin, qmax, dtype = target
    codes = np.floor(data.astype("float64") / scale + 0.5) + zero_point
    return np.clip(codes, qmin, qmax).astype(dtype)
