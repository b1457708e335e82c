"""Argument checks and interval helpers that the operator families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx

from relay_passes.dialect.dyadic import MAX_SHIFT
from relay_passes.dialect.registry import Interval, constant_of
from relay_passes.errors import VitqError

__all__ = [
    "ACTIVATION_DTYPES",
    "INTEGER_DTYPES",
    "as_const",
    "check_dyadic",
    "clamp_interval",
    "constant_or_fail",
    "dtype_interval",
    "fail",
    "output_interval",
    "te_clamp",
    "tensor_of",
    "value_interval",
    "within_int32",
]

ACTIVATION_DTYPES = ("int8", "uint8", "int16")
INTEGER_DTYPES = ("int8", "uint8", "int16", "int32")


def fail(call: relax.Call, message: str) -> VitqError:
    """Return the one-line error that names the operator of ``call``."""
    return VitqError(f"{call.op.name}: {message}")


def tensor_of(
    call: relax.Call, index: int, dtypes: Sequence[str] | None = None, label: str = ""
) -> tuple[list[int], str]:
    """Return (shape, dtype) of an argument: a tensor of static shape and one of ``dtypes``."""
    label = label or f"argument {index}"
    if index >= len(call.args):
        raise fail(call, f"{label} is missing; {len(call.args)} arguments were given")
    ty = call.args[index].ty
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        raise fail(call, f"{label} must be a tensor of known shape, not {ty}")
    if not all(isinstance(extent, (int, tirx.IntImm)) for extent in ty.shape.values):
        raise fail(call, f"{label} has no static shape but {ty.shape}; export it with fixed sizes")
    if dtypes is not None and str(ty.dtype) not in dtypes:
        raise fail(call, f"{label} must be {' or '.join(dtypes)}, not {ty.dtype}")
    return [int(extent) for extent in ty.shape.values], str(ty.dtype)


def dtype_interval(dtype: str) -> Interval:
    """Return all values of an integer dtype."""
    info = np.iinfo(dtype)
    return Interval(int(info.min), int(info.max))


def output_interval(call: relax.Call) -> Interval:
    """Return [qmin, qmax] after checking that it and the zero point suit ``out_dtype``."""
    attrs = call.attrs
    qmin, qmax, zero_point, dtype = (attrs[k] for k in ("qmin", "qmax", "zero_point", "out_dtype"))
    if dtype not in INTEGER_DTYPES:
        raise fail(call, f"out_dtype must be {' or '.join(INTEGER_DTYPES)}, not {dtype}")
    whole = dtype_interval(dtype)
    if not whole.lo <= qmin <= qmax <= whole.hi:
        raise fail(call, f"codes [{qmin}, {qmax}] do not fit {dtype}")
    if not -(2**31) <= zero_point < 2**31:
        raise fail(call, f"zero point {zero_point} does not fit int32")
    return Interval(int(qmin), int(qmax))


def check_dyadic(call: relax.Call, mult: int, shift: int, label: str) -> None:
    """Refuse scalar dyadic parameters outside the contract."""
    if not (-(2**31) < mult < 2**31 and 1 <= shift <= MAX_SHIFT):
        raise fail(call, f"{label} ({mult}, {shift}) is no dyadic pair; make it with dyadic(ratio)")


def clamp_interval(lo: int, hi: int, codes: Interval) -> Interval:
    """Return the interval of values of [lo, hi] after clamping to ``codes``."""
    return Interval(min(max(lo, codes.lo), codes.hi), min(max(hi, codes.lo), codes.hi))


def value_interval(value: np.ndarray) -> Interval:
    """Return the interval that the elements of a constant span."""
    return Interval(int(value.min()), int(value.max())) if value.size else Interval(0, 0)


def constant_or_fail(call: relax.Call, index: int, label: str) -> np.ndarray:
    """Return a constant argument as int64, refuse anything else."""
    value = constant_of(call.args[index])
    if value is None:
        raise fail(call, f"{label} must be a constant, so that its range can be proved")
    return value.astype(np.int64)


def within_int32(lo: Any, hi: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds cut to int32: a bound past it has failed its claim, what follows is moot."""
    whole = np.iinfo(np.int32)
    return np.clip(lo, whole.min, whole.max), np.clip(hi, whole.min, whole.max)


def te_clamp(value: Any, lo: int, hi: int, dtype: str) -> Any:
    """Build ``cast(min(max(value, lo), hi))`` of an int64 expression."""
    low, high = tirx.const(lo, "int64"), tirx.const(hi, "int64")
    return tirx.min(tirx.max(value, low), high).astype(dtype)


def as_const(value: np.ndarray | relax.Expr, dtype: str) -> relax.Expr:
    """Return a Relax constant of ``dtype``; expressions pass through."""
    if not isinstance(value, np.ndarray):
        return value
    return relax.const(np.ascontiguousarray(value.astype(dtype, casting="same_kind")))
