"""Interval analysis: proof that no accumulator, sum or product of the integer dialect overflows.

Every tensor gets the interval of its codes: constants theirs, quantized tensors what their clamp
leaves, layout operators what their operands have. Every ``vitq.*`` operator states, from its
operands' intervals and its actual weights, the range of each of its intermediates as a
:class:`~relay_passes.dialect.registry.Claim`; all claims must hold. The analysis never samples:
what it says holds for every input.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relay_passes.check_integer_only import LAYOUT_OPS, reachable
from relay_passes.dialect.checking import dtype_interval, value_interval
from relay_passes.dialect.registry import SPECS, Claim, Interval, constant_of
from relay_passes.errors import VitqError

__all__ = ["check_ranges", "code_intervals", "headroom_bits"]

_MENDS = {
    "int32": "give its input fewer bits (int8, or a smaller code range)",
    "int64": "its output scale is far too small for its input; calibrate that site again",
}


def check_ranges(mod: tvm.IRModule) -> list[dict[str, Any]]:
    """Prove the range of every intermediate of a module of the integer dialect.

    Parameters
    ----------
    mod : tvm.IRModule
        Integer dialect, fused or not, before legalisation.

    Returns
    -------
    list of dict
        One row a claim, in program order: ``binding``, ``op``, ``quantity``, ``lo``, ``hi``,
        ``dtype``, ``headroom_bits`` (how often the range could double).

    Raises
    ------
    VitqError
        Naming the first intermediate that may leave its dtype, or an operator without bounds.
    """
    rows: list[dict[str, Any]] = []
    for name, func in reachable(mod).items():
        _Analysis(name, rows).function(func)
    return rows


def code_intervals(func: relax.Function) -> dict[relax.Var, Any]:
    """Return the proved interval of every variable of a function, None where it has no codes.

    The function must have passed :func:`check_ranges`.
    """
    analysis = _Analysis("", [])
    analysis.function(func)
    return analysis.intervals


def headroom_bits(claim: Claim) -> float:
    """Return log2 of the factor by which a claim's range could grow and still fit its dtype."""
    info = np.iinfo(claim.dtype)
    factors = [
        limit / value
        for value, limit in ((claim.hi, int(info.max)), (claim.lo, int(info.min)))
        if value * limit > 0
    ]
    return round(math.log2(min(factors)), 2) if factors else float(info.bits)


class _Analysis:
    """Intervals of one function's variables; None for a float, a tuple for a tuple."""

    def __init__(self, prefix: str, rows: list[dict[str, Any]]) -> None:
        self.prefix = "" if prefix == "main" else f"{prefix}."
        self.rows = rows
        self.intervals: dict[relax.Var, Any] = {}

    def function(self, func: relax.Function) -> None:
        for param in func.params:
            self.intervals[param] = _of_type(param.ty)
        for block in func.body.blocks:
            for binding in block.bindings:
                where = self.prefix + binding.var.name
                self.intervals[binding.var] = self._binding(where, binding.value)

    def _binding(self, where: str, expr: relax.Expr) -> Any:
        if not isinstance(expr, relax.Call):
            return self._interval(expr)
        if isinstance(expr.op, tvm.ir.GlobalVar):
            return _of_type(expr.ty)
        name = str(expr.op.name)
        args = [self._interval(arg) for arg in expr.args]
        if name in SPECS:
            return self._operator(where, name, expr, args)
        if name == "relax.astype":
            claim = Claim("value", args[0].lo, args[0].hi, str(expr.attrs.dtype))
            self._record(where, name, [claim])
            return args[0]
        if name in LAYOUT_OPS:
            return _moved(name, expr, args)
        raise VitqError(
            f"{where}: {name} has no bounds, so its range cannot be proved; use vitq operators or "
            "layout operators"
        )

    def _operator(self, where: str, name: str, call: relax.Call, args: list[Any]) -> Any:
        if name == "vitq.quantize":
            args = [Interval(0, 0)]  # a float; its codes are clamped whatever it holds
        elif any(not isinstance(arg, Interval) for arg in args):
            raise VitqError(f"{where}: {name} takes a tensor that is not integer")
        interval, claims = SPECS[name].bounds(call, args)
        self._record(where, name, claims)
        if name == "vitq.dequantize":
            return None
        result = Claim("result", interval.lo, interval.hi, str(call.ty.dtype))
        if not any((c.lo, c.hi, c.dtype) == (result.lo, result.hi, result.dtype) for c in claims):
            self._record(where, name, [result])
        return interval

    def _record(self, where: str, name: str, claims: list[Claim]) -> None:
        for claim in claims:
            if not claim.holds:
                raise VitqError(
                    f"{where}: {name}: {claim.name} may reach [{claim.lo}, {claim.hi}], outside "
                    f"{claim.dtype}; {_MENDS.get(claim.dtype, _MENDS['int32'])}"
                )
            self.rows.append(
                {
                    "binding": where,
                    "op": name,
                    "quantity": claim.name,
                    "lo": claim.lo,
                    "hi": claim.hi,
                    "dtype": claim.dtype,
                    "headroom_bits": headroom_bits(claim),
                }
            )

    def _interval(self, expr: relax.Expr) -> Any:
        if isinstance(expr, relax.Var):
            return self.intervals[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._interval(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._interval(expr.tuple_value)[expr.index]
        constant = constant_of(expr)
        if constant is None or not np.issubdtype(constant.dtype, np.integer):
            return None
        return value_interval(constant)


def _of_type(ty: relax.Type) -> Interval | None:
    dtype = str(ty.dtype)
    return None if "float" in dtype else dtype_interval(dtype)


def _moved(name: str, call: relax.Call, args: list[Any]) -> Any:
    """Return the interval of a layout operator: the union of what it moves."""
    if name == "relax.split":
        return tuple(args[0] for _ in call.ty.fields)
    parts = args[0] if isinstance(args[0], tuple) else args[:1]
    if any(part is None for part in parts):
        return None
    lo, hi = min(p.lo for p in parts), max(p.hi for p in parts)
    sums = [p.row_sum for p in parts]
    if None in sums or not _keeps_rows(name, call):
        return Interval(lo, hi)
    return Interval(lo, hi, max(sums))


def _keeps_rows(name: str, call: relax.Call) -> bool:
    """Whether every row (last axis) of a layout operator's result is a row of an operand."""
    if name == "relax.reshape":
        return int(call.args[0].ty.shape.values[-1]) == int(call.ty.shape.values[-1])
    if name == "relax.permute_dims":
        axes = call.attrs.axes
        return axes is not None and int(axes[-1]) in (-1, len(axes) - 1)
    if name == "relax.concat":
        return int(call.attrs.axis) not in (-1, len(call.ty.shape.values) - 1)
    return name == "relax.strided_slice"  # part of a row sums to no more
