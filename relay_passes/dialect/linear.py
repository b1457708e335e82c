"""Weight matmuls: ``vitq.linear`` and its forms with a requantising, residual-adding epilogue.

``acc[..., n] = sum_k x[..., k] * w[k, n] + bias[n]`` in int32. The zero point of ``x`` is folded
into ``bias`` by whoever makes the call (``bias - zp * sum_k w[k, n]``). The range proof takes the
actual weights: with ``P[n]``, ``Q[n]`` the sums of the positive and the negative weights of a
column and ``x`` in [lo, hi], the accumulator is in ``[lo * P + hi * Q, hi * P + lo * Q] + bias``,
both ends reached; a partial sum in any order of ``k`` in the same with ``min(lo, 0)`` and
``max(hi, 0)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te

from relay_passes.dialect.checking import (
    ACTIVATION_DTYPES,
    as_const,
    check_dyadic,
    clamp_interval,
    constant_or_fail,
    fail,
    output_interval,
    tensor_of,
    within_int32,
)
from relay_passes.dialect.dyadic import requantize_bounds
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.dialect.requantize import check_channels, output_codes
from schedules.gemm import Epilogue
from schedules.matmul import linear_te

__all__ = ["linear", "linear_requant", "linear_requant_add"]

_RESIDUAL_DTYPES = ("int8", "int16", "int32")


def linear(x: relax.Expr, w: np.ndarray | relax.Expr, bias: np.ndarray | relax.Expr) -> relax.Call:
    """Multiply codes by int8 weights: int32 ``x @ w + bias``.

    Parameters
    ----------
    x : relax.Expr
        int8, uint8 or int16 codes [..., K].
    w : ndarray or relax.Expr
        int8 [K, N].
    bias : ndarray or relax.Expr
        int32 [N], at scale S_x * S_w, zero point of ``x`` folded in.
    """
    return call("linear", x, as_const(w, "int8"), as_const(bias, "int32"))


def linear_requant(
    x: relax.Expr,
    w: np.ndarray | relax.Expr,
    bias: np.ndarray | relax.Expr,
    mult: np.ndarray | relax.Expr,
    shift: np.ndarray | relax.Expr,
    zp: int,
    qmin: int,
    qmax: int,
    dtype: str = "int8",
) -> relax.Call:
    """Make :func:`linear` requantised per output channel; ``mult``, ``shift``: int32 [N]."""
    return call(
        "linear_requant",
        x,
        as_const(w, "int8"),
        as_const(bias, "int32"),
        as_const(mult, "int32"),
        as_const(shift, "int32"),
        **output_codes(zp, qmin, qmax, dtype),
    )


def linear_requant_add(
    x: relax.Expr,
    w: np.ndarray | relax.Expr,
    bias: np.ndarray | relax.Expr,
    mult: np.ndarray | relax.Expr,
    shift: np.ndarray | relax.Expr,
    res: relax.Expr,
    res_mult: int,
    res_shift: int,
    zp: int,
    qmin: int,
    qmax: int,
    dtype: str = "int16",
) -> relax.Call:
    """Make :func:`linear_requant` plus a requantised residual ``res`` [..., N] (zero point 0)."""
    return call(
        "linear_requant_add",
        x,
        as_const(w, "int8"),
        as_const(bias, "int32"),
        as_const(mult, "int32"),
        as_const(shift, "int32"),
        res,
        res_mult=int(res_mult),
        res_shift=int(res_shift),
        **output_codes(zp, qmin, qmax, dtype),
    )


# Type inference


def _accumulator_shape(node: relax.Call) -> list[int]:
    x, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    w, _ = tensor_of(node, 1, ["int8"], "w")
    bias, _ = tensor_of(node, 2, ["int32"], "bias")
    if len(w) != 2 or not x or x[-1] != w[0] or bias != [w[1]]:
        raise fail(node, f"x {x}, w {w}, bias {bias} do not fit [..., K], [K, N], [N]")
    return [*x[:-1], w[1]]


def _infer_linear(node: relax.Call) -> relax.TensorType:
    return relax.TensorType(_accumulator_shape(node), "int32")


def _infer_requant(node: relax.Call) -> relax.TensorType:
    shape = _accumulator_shape(node)
    check_channels(node, 3, shape[-1])
    output_interval(node)
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _infer_requant_add(node: relax.Call) -> relax.TensorType:
    result = _infer_requant(node)
    shape = _accumulator_shape(node)
    res, _ = tensor_of(node, 5, _RESIDUAL_DTYPES, "res")
    if res != shape:
        raise fail(node, f"res has shape {res}, expected {shape}")
    check_dyadic(node, node.attrs["res_mult"], node.attrs["res_shift"], "res_mult, res_shift")
    return result


# Definition


def _compute_linear(tensors: Sequence[te.Tensor], _attrs: Any) -> te.Tensor:
    x, w, bias = tensors
    return linear_te(x, w, bias, Epilogue())


def _compute_requant(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x, w, bias, mult, shift = tensors[:5]
    codes = {key: attrs[key] for key in ("zero_point", "qmin", "qmax", "out_dtype")}
    if len(tensors) == 5:
        return linear_te(x, w, bias, Epilogue("requant", **codes), mult, shift)
    scale = {key: attrs[key] for key in ("res_mult", "res_shift")}
    epilogue = Epilogue("requant_add", **codes, **scale)
    return linear_te(x, w, bias, epilogue, mult, shift, tensors[5])


# Ranges


@dataclass(frozen=True)
class _Accumulator:
    """Per-channel bounds of the finished accumulator, and the claims on the way to it."""

    lo: np.ndarray
    hi: np.ndarray
    claims: list[Claim]


def _accumulator_bounds(node: relax.Call, args: Sequence[Interval]) -> _Accumulator:
    x = args[0]
    w, bias = constant_or_fail(node, 1, "w"), constant_or_fail(node, 2, "bias")
    positive = np.maximum(w, 0).sum(axis=0)
    negative = w.sum(axis=0) - positive
    lo = x.lo * positive + x.hi * negative + bias
    hi = x.hi * positive + x.lo * negative + bias
    below, above = min(x.lo, 0), max(x.hi, 0)
    partial_lo = below * positive + above * negative + np.minimum(bias, 0)
    partial_hi = above * positive + below * negative + np.maximum(bias, 0)
    claims = [
        Claim("partial sums", int(partial_lo.min()), int(partial_hi.max()), "int32"),
        Claim("accumulator", int(lo.min()), int(hi.max()), "int32"),
    ]
    return _Accumulator(lo, hi, claims)


def _bounds_linear(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    acc = _accumulator_bounds(node, args)
    return Interval(acc.claims[-1].lo, acc.claims[-1].hi), acc.claims


def _bounds_requant(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    acc = _accumulator_bounds(node, args)
    mult, shift = constant_or_fail(node, 3, "mult"), constant_or_fail(node, 4, "shift")
    product, (lo, hi) = requantize_bounds(*within_int32(acc.lo, acc.hi), mult, shift)
    claims = [*acc.claims, Claim("product", *product, "int64")]
    least, most = int(lo.min()), int(hi.max())
    if len(args) > 5:
        scale = node.attrs["res_mult"], node.attrs["res_shift"]
        product, (lo, hi) = requantize_bounds(args[5].lo, args[5].hi, *scale)
        claims.append(Claim("residual product", *product, "int64"))
        least, most = least + int(lo), most + int(hi)
    least, most = least + node.attrs["zero_point"], most + node.attrs["zero_point"]
    claims.append(Claim("requantised", least, most, "int64"))
    return clamp_interval(least, most, output_interval(node)), claims


_WEIGHTED = ["x", "w", "bias"]
register(
    "linear",
    _WEIGHTED,
    "int32 x @ w + bias with constant int8 weights.",
    infer=_infer_linear,
    compute=_compute_linear,
    bounds=_bounds_linear,
)
register(
    "linear_requant",
    [*_WEIGHTED, "mult", "shift"],
    "linear with a requantising epilogue, per output channel.",
    infer=_infer_requant,
    compute=_compute_requant,
    bounds=_bounds_requant,
)
register(
    "linear_requant_add",
    [*_WEIGHTED, "mult", "shift", "res"],
    "linear_requant plus a requantised residual, before one clamp.",
    infer=_infer_requant_add,
    compute=_compute_requant,
    bounds=_bounds_requant,
)
