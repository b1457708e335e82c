"""The float boundary: ``vitq.quantize`` and ``vitq.dequantize`` alone see floats.

``quantize``: ``clamp(int(floor(x * f32(inv_scale) + 0.5)) + zero_point, qmin, qmax)`` in float32,
two roundings (product, sum), clamped before the cast, so that infinities are safe. A NaN becomes
``qmin``. ``dequantize``: ``f32(q - zero_point) * f32(scale)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from relay_passes.dialect.checking import (
    INTEGER_DTYPES,
    dtype_interval,
    fail,
    output_interval,
    tensor_of,
)
from relay_passes.dialect.registry import Claim, Interval, call, register

__all__ = ["dequantize", "quantize"]

_EXACT = 2**24  # integers up to here are exact in float32


def quantize(
    x: relax.Expr, scale: float, zp: int, qmin: int, qmax: int, dtype: str = "int8"
) -> relax.Call:
    """Quantize a float32 tensor with one scale and zero point.

    Parameters
    ----------
    x : relax.Expr
        float32 tensor of any shape.
    scale, zp, qmin, qmax, dtype
        Step, zero point, clamp and dtype of the codes. The operator holds ``float32(1 / scale)``.
    """
    inverse = np.float32(1.0 / float(scale)) if scale else np.float32(np.inf)
    return call(
        "quantize",
        x,
        inv_scale=float(inverse),
        zero_point=int(zp),
        qmin=int(qmin),
        qmax=int(qmax),
        out_dtype=str(dtype),
    )


def dequantize(q: relax.Expr, scale: float, zp: int = 0) -> relax.Call:
    """Turn integer codes into float32 values ``(q - zp) * scale``."""
    return call("dequantize", q, scale=float(np.float32(scale)), zero_point=int(zp))


def _infer_quantize(node: relax.Call) -> relax.TensorType:
    shape, _ = tensor_of(node, 0, ["float32"], "x")
    inverse = node.attrs["inv_scale"]
    if not (np.isfinite(inverse) and inverse > 0):
        raise fail(node, f"1/scale is {inverse}, not a positive number; calibrate the input again")
    codes = output_interval(node)
    zero_point = node.attrs["zero_point"]
    if max(abs(codes.lo - zero_point), abs(codes.hi - zero_point)) > _EXACT:
        raise fail(node, "codes less zero point pass 2**24, where float32 is no longer exact")
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _compute_quantize(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    (x,) = tensors
    zero_point = attrs["zero_point"]
    inverse, half = tirx.const(attrs["inv_scale"], "float32"), tirx.const(0.5, "float32")
    low = tirx.const(float(attrs["qmin"] - zero_point), "float32")
    high = tirx.const(float(attrs["qmax"] - zero_point), "float32")

    def element(*index: Any) -> Any:
        # The clamp stands between product and sum, so that no compiler can contract them into one
        # fused multiply-add, which rounds once instead of twice.
        scaled = x(*index) * inverse
        raised = tirx.Select(scaled > low, scaled, low)  # a comparison with NaN is false
        clamped = tirx.Select(raised < high, raised, high)
        return (tirx.floor(clamped + half).astype("int32") + zero_point).astype(attrs["out_dtype"])

    return te.compute(x.shape, element, name="out")


def _bounds_quantize(node: relax.Call, _args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    codes = output_interval(node)
    return codes, [Claim("codes", codes.lo, codes.hi, node.attrs["out_dtype"])]


def _infer_dequantize(node: relax.Call) -> relax.TensorType:
    shape, dtype = tensor_of(node, 0, INTEGER_DTYPES, "q")
    if not np.isfinite(node.attrs["scale"]):
        raise fail(node, f"scale is {node.attrs['scale']}; calibrate the output again")
    whole = dtype_interval(dtype)
    if not whole.lo <= node.attrs["zero_point"] <= whole.hi:
        raise fail(node, f"zero point {node.attrs['zero_point']} does not fit {dtype}")
    return relax.TensorType(shape, "float32")


def _compute_dequantize(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    (q,) = tensors
    scale = tirx.const(attrs["scale"], "float32")

    def element(*index: Any) -> Any:
        return (q(*index).astype("int32") - attrs["zero_point"]).astype("float32") * scale

    return te.compute(q.shape, element, name="out")


def _bounds_dequantize(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    lo, hi = args[0].lo - node.attrs["zero_point"], args[0].hi - node.attrs["zero_point"]
    return Interval(lo, hi), [Claim("centred codes", lo, hi, "int32")]


register(
    "quantize",
    ["x"],
    "Quantize float32 to integer codes: the input boundary.",
    infer=_infer_quantize,
    compute=_compute_quantize,
    bounds=_bounds_quantize,
)
register(
    "dequantize",
    ["q"],
    "Integer codes to float32: the output boundary.",
    infer=_infer_dequantize,
    compute=_compute_dequantize,
    bounds=_bounds_dequantize,
)
