"""Matmuls of two activations (attention): ``vitq.matmul`` and its forms with an epilogue.

``acc[..., m, n] = sum_k a[..., m, k] * b[..., k, n]`` in int32 (``b[..., n, k]`` with
``transpose_b``). Both zero points must be 0: nothing can be folded into a constant here. The range
is ``K * max|a| * max|b|``, or ``row sum of |a| * max|b|`` where ``a`` states its row sum.
``vitq.matmul_requant_add`` adds a requantised residual whose leading axes may be 1, as those of a
relative position bias are.

Once layout is folded (:mod:`relay_passes.fold_layout`) a call may have the attributes ``a_axes``,
``b_axes`` and ``out_axes``: then it takes ``permute_dims(a, a_axes)`` and ``permute_dims(b,
b_axes)`` and returns ``permute_dims(result, out_axes)``. The last axis stays the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te

from relay_passes.dialect.checking import (
    ACTIVATION_DTYPES,
    check_dyadic,
    clamp_interval,
    fail,
    output_interval,
    tensor_of,
    within_int32,
)
from relay_passes.dialect.dyadic import requantize_bounds
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.dialect.requantize import output_codes
from schedules.gemm import Epilogue
from schedules.matmul import matmul_te
from schedules.packing import scalar_form

__all__ = ["matmul", "matmul_requant"]


def matmul(a: relax.Expr, b: relax.Expr, transpose_b: bool = False) -> relax.Call:
    """Multiply codes by codes: int32 ``a @ b``.

    Parameters
    ----------
    a, b : relax.Expr
        int8, uint8 or int16 [..., M, K] and [..., K, N] ([..., N, K] with ``transpose_b``), equal
        leading dimensions, zero points 0.
    transpose_b : bool
        Whether ``b`` has its reduction axis last.
    """
    return call("matmul", a, b, transpose_b=bool(transpose_b))


def matmul_requant(
    a: relax.Expr,
    b: relax.Expr,
    transpose_b: bool,
    mult: int,
    shift: int,
    zp: int,
    qmin: int,
    qmax: int,
    dtype: str = "int8",
) -> relax.Call:
    """Make :func:`matmul` requantised with one dyadic pair."""
    return call(
        "matmul_requant",
        a,
        b,
        transpose_b=bool(transpose_b),
        mult=int(mult),
        shift=int(shift),
        **output_codes(zp, qmin, qmax, dtype),
    )


AXES = ("a_axes", "b_axes", "out_axes")


def _axes(attrs: Any) -> dict[str, list[int]]:
    """Return the permutations of a call that has some."""
    return {key: [int(axis) for axis in attrs[key]] for key in AXES if key in attrs}


def _permuted(node: relax.Call, shape: list[int], key: str) -> list[int]:
    axes = _axes(node.attrs).get(key)
    if axes is None:
        return shape
    if sorted(axes) != list(range(len(shape))) or axes[-1] != len(shape) - 1:
        raise fail(node, f"{key} {axes} is no permutation of {shape} that keeps the last axis")
    return [shape[axis] for axis in axes]


def _accumulator_shape(node: relax.Call) -> tuple[list[int], int]:
    a = _permuted(node, tensor_of(node, 0, ACTIVATION_DTYPES, "a")[0], "a_axes")
    b = _permuted(node, tensor_of(node, 1, ACTIVATION_DTYPES, "b")[0], "b_axes")
    fits = len(a) >= 2 and len(a) == len(b) and a[:-2] == b[:-2]
    if fits:
        n, k = (b[-2], b[-1]) if node.attrs["transpose_b"] else (b[-1], b[-2])
        fits = k == a[-1]
    if not fits:
        form = "[..., N, K]" if node.attrs["transpose_b"] else "[..., K, N]"
        raise fail(node, f"a {a} and b {b} do not fit [..., M, K] and {form}")
    return [*a[:-1], n], k


def _infer_matmul(node: relax.Call) -> relax.TensorType:
    return relax.TensorType(_permuted(node, _accumulator_shape(node)[0], "out_axes"), "int32")


def _infer_requant(node: relax.Call) -> relax.TensorType:
    shape = _permuted(node, _accumulator_shape(node)[0], "out_axes")
    check_dyadic(node, node.attrs["mult"], node.attrs["shift"], "mult, shift")
    output_interval(node)
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _compute_matmul(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    a, b = tensors
    return matmul_te(a, b, attrs["transpose_b"], Epilogue(), **_axes(attrs))


def _compute_requant(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    a, b, *residual, scalars = tensors
    keys = ("qmin", "qmax", "out_dtype", *(("res_mult", "res_shift") if residual else ()))
    dtypes = [str(a.dtype), str(b.dtype)]
    fields: dict[str, Any] = {key: attrs[key] for key in keys}
    fields |= scalar_form(attrs["shift"], attrs["zero_point"], int(a.shape[-1]), dtypes)
    epilogue = Epilogue("requant_add" if residual else "requant", **fields)
    return matmul_te(a, b, attrs["transpose_b"], epilogue, **_axes(attrs),
                     residual=residual[0] if residual else None, scalars=scalars)


def _scalars(node: relax.Call) -> np.ndarray:
    """Return multiplier, shift and, if it isn't 0, zero point: what layers differ in."""
    attrs = node.attrs
    zero_point = [attrs["zero_point"]] if attrs["zero_point"] else []
    return np.array([attrs["mult"], attrs["shift"], *zero_point], np.int32)


def _infer_requant_add(node: relax.Call) -> relax.TensorType:
    result = _infer_requant(node)
    shape, _ = _accumulator_shape(node)
    res, _ = tensor_of(node, 2, ["int8", "int16"], "res")
    fits = len(res) == len(shape) and res[-2:] == shape[-2:]
    if not fits or any(r not in (1, s) for r, s in zip(res, shape, strict=True)):
        raise fail(node, f"res has shape {res}, which does not broadcast to {shape}")
    check_dyadic(node, node.attrs["res_mult"], node.attrs["res_shift"], "res_mult, res_shift")
    return result


def _bounds_matmul(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    a, b = args
    _, k = _accumulator_shape(node)
    corners = [p * q for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
    lo, hi = k * min(corners), k * max(corners)
    if a.row_sum is not None:
        # The rows of ``a`` are probabilities: their sum is known, whatever their length.
        limit = a.row_sum * max(abs(b.lo), abs(b.hi))
        lo, hi = max(lo, -limit), min(hi, limit)
    claims = [
        Claim("partial sums", min(lo, 0), max(hi, 0), "int32"),
        Claim("accumulator", lo, hi, "int32"),
    ]
    return Interval(lo, hi), claims


def _bounds_requant(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    acc, claims = _bounds_matmul(node, args[:2])
    scale = node.attrs["mult"], node.attrs["shift"]
    product, (lo, hi) = requantize_bounds(*within_int32(acc.lo, acc.hi), *scale)
    claims.append(Claim("product", *product, "int64"))
    least, most = int(lo) + node.attrs["zero_point"], int(hi) + node.attrs["zero_point"]
    if len(args) > 2:
        scale = node.attrs["res_mult"], node.attrs["res_shift"]
        product, (lo, hi) = requantize_bounds(args[2].lo, args[2].hi, *scale)
        claims.append(Claim("residual product", *product, "int64"))
        least, most = least + int(lo), most + int(hi)
    claims.append(Claim("requantised", least, most, "int64"))
    return clamp_interval(least, most, output_interval(node)), claims


register(
    "matmul",
    ["a", "b"],
    "int32 a @ b of two activations.",
    infer=_infer_matmul,
    compute=_compute_matmul,
    bounds=_bounds_matmul,
)
register(
    "matmul_requant",
    ["a", "b"],
    "matmul with a requantising epilogue.",
    infer=_infer_requant,
    compute=_compute_requant,
    bounds=_bounds_requant,
    scalars=_scalars,
)
register(
    "matmul_requant_add",
    ["a", "b", "res"],
    "matmul_requant plus a requantised residual, before one clamp.",
    infer=_infer_requant_add,
    compute=_compute_requant,
    bounds=_bounds_requant,
    scalars=_scalars,
)
