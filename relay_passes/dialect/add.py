"""``vitq.add``: the sum of two quantized tensors on a third scale.

``clamp(rq(a - a_zp, a_mult, a_shift) + rq(b - b_zp, b_mult, b_shift) + zero_point, qmin, qmax)``,
with NumPy broadcasting of ``a`` against ``b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, te

from relay_passes.dialect.checking import (
    INTEGER_DTYPES,
    check_dyadic,
    clamp_interval,
    fail,
    output_interval,
    te_clamp,
    tensor_of,
    within_int32,
)
from relay_passes.dialect.dyadic import dyadic, requantize_bounds
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.dialect.requantize import output_codes
from schedules.matmul import requantize_te

__all__ = ["add"]


def add(
    a: relax.Expr,
    b: relax.Expr,
    ratio_a: float,
    ratio_b: float,
    az: int,
    bz: int,
    zp: int,
    qmin: int,
    qmax: int,
    dtype: str = "int16",
) -> relax.Call:
    """Add codes of two scales.

    Parameters
    ----------
    a, b : relax.Expr
        Integer tensors whose shapes broadcast.
    ratio_a, ratio_b : float
        S_a / S_out and S_b / S_out.
    az, bz, zp, qmin, qmax, dtype
        Zero points of the inputs and the output, clamp and dtype of the output codes.
    """
    a_mult, a_shift = dyadic(float(ratio_a))
    b_mult, b_shift = dyadic(float(ratio_b))
    return call(
        "add",
        a,
        b,
        a_mult=int(a_mult),
        a_shift=int(a_shift),
        a_zero_point=int(az),
        b_mult=int(b_mult),
        b_shift=int(b_shift),
        b_zero_point=int(bz),
        **output_codes(zp, qmin, qmax, dtype),
    )


def _broadcast(node: relax.Call, a: list[int], b: list[int]) -> list[int]:
    rank = max(len(a), len(b))
    shape = []
    for p, q in zip([1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b, strict=True):
        if p != q and 1 not in (p, q):
            raise fail(node, f"shapes {a} and {b} do not broadcast")
        shape.append(q if p == 1 else p)
    return shape


def _infer(node: relax.Call) -> relax.TensorType:
    a, _ = tensor_of(node, 0, INTEGER_DTYPES, "a")
    b, _ = tensor_of(node, 1, INTEGER_DTYPES, "b")
    for side in ("a", "b"):
        mult, shift = node.attrs[f"{side}_mult"], node.attrs[f"{side}_shift"]
        check_dyadic(node, mult, shift, f"{side}_mult, {side}_shift")
    output_interval(node)
    return relax.TensorType(_broadcast(node, a, b), node.attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    rank = max(len(t.shape) for t in tensors)
    padded = [[1] * (rank - len(t.shape)) + [int(e) for e in t.shape] for t in tensors]
    shape = [q if p == 1 else p for p, q in zip(*padded, strict=True)]

    def operand(side: int, index: Sequence[Any]) -> Any:
        tensor, name = tensors[side], "ab"[side]
        own = index[rank - len(tensor.shape) :]
        place = [0 if int(e) == 1 else i for i, e in zip(own, tensor.shape, strict=True)]
        centred = tensor(*place).astype("int64") - attrs[f"{name}_zero_point"]
        return requantize_te(centred, attrs[f"{name}_mult"], attrs[f"{name}_shift"])

    def element(*index: Any) -> Any:
        value = operand(0, index) + operand(1, index) + attrs["zero_point"]
        return te_clamp(value, attrs["qmin"], attrs["qmax"], attrs["out_dtype"])

    return te.compute(shape, element, name="out")


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    least = most = node.attrs["zero_point"]
    claims = []
    for interval, side in zip(args, "ab", strict=True):
        zero_point = node.attrs[f"{side}_zero_point"]
        lo, hi = interval.lo - zero_point, interval.hi - zero_point
        claims.append(Claim(f"centred {side}", lo, hi, "int32"))
        product, (low, high) = requantize_bounds(
            *within_int32(lo, hi), node.attrs[f"{side}_mult"], node.attrs[f"{side}_shift"]
        )
        claims.append(Claim(f"product {side}", *product, "int64"))
        least, most = least + int(low), most + int(high)
    claims.append(Claim("sum", least, most, "int64"))
    return clamp_interval(least, most, output_interval(node)), claims


register(
    "add",
    ["a", "b"],
    "Sum of two quantized tensors on a third scale.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
