"""``vitq.requantize``: bring integers to another scale, per tensor or per channel of the last axis.

``clamp(rq(x - in_zero_point, mult[n], shift[n]) + zero_point, qmin, qmax)``, with ``rq`` of
``relay_passes.dialect.dyadic``. The helpers of the fused operators (:func:`check_channels`,
:func:`output_codes`) are here too, since they are the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te

from relay_passes.dialect.checking import (
    INTEGER_DTYPES,
    as_const,
    clamp_interval,
    constant_or_fail,
    fail,
    output_interval,
    te_clamp,
    tensor_of,
    within_int32,
)
from relay_passes.dialect.dyadic import MAX_SHIFT, dyadic, requantize_bounds
from relay_passes.dialect.registry import Claim, Interval, call, constant_of, register
from schedules.matmul import requantize_te

__all__ = ["check_channels", "output_codes", "requantize"]


def requantize(
    x: relax.Expr,
    ratio: float | np.ndarray,
    in_zp: int,
    zp: int,
    qmin: int,
    qmax: int,
    dtype: str = "int8",
) -> relax.Call:
    """Requantise ``x`` by ``ratio`` = S_in / S_out.

    Parameters
    ----------
    x : relax.Expr
        int8, uint8, int16 or int32 tensor [..., N].
    ratio : float or ndarray [N]
        One ratio, or one for each channel of the last axis.
    in_zp, zp, qmin, qmax, dtype
        Zero points of input and output, clamp and dtype of the output codes.
    """
    mult, shift = dyadic(np.atleast_1d(np.asarray(ratio, dtype=np.float64)))
    return call(
        "requantize",
        x,
        as_const(mult, "int32"),
        as_const(shift, "int32"),
        in_zero_point=int(in_zp),
        **output_codes(zp, qmin, qmax, dtype),
    )


def output_codes(zp: int, qmin: int, qmax: int, dtype: str) -> dict[str, Any]:
    """Return the attributes that every requantising operator has."""
    return {
        "zero_point": int(zp),
        "qmin": int(qmin),
        "qmax": int(qmax),
        "out_dtype": str(dtype),
    }


def check_channels(node: relax.Call, first: int, channels: int, scalar: bool = False) -> None:
    """Check the (mult, shift) pair at arguments ``first`` and ``first + 1``: int32 [channels]."""
    for index, label in ((first, "mult"), (first + 1, "shift")):
        shape, _ = tensor_of(node, index, ["int32"], label)
        if shape != [channels] and not (scalar and shape == [1]):
            raise fail(node, f"{label} has shape {shape}, expected [{channels}], one a channel")
    shift = constant_of(node.args[first + 1])
    if shift is not None and shift.size and not (shift.min() >= 1 and shift.max() <= MAX_SHIFT):
        raise fail(node, f"shifts span [{shift.min()}, {shift.max()}], expected 1 to {MAX_SHIFT}")


def _infer(node: relax.Call) -> relax.TensorType:
    shape, _ = tensor_of(node, 0, INTEGER_DTYPES, "x")
    if not shape:
        raise fail(node, "x must have at least one dimension; reshape it to [1]")
    check_channels(node, 1, shape[-1], scalar=True)
    output_interval(node)
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x, mult, shift = tensors
    per_channel = int(mult.shape[0]) > 1

    def element(*index: Any) -> Any:
        channel = index[-1] if per_channel else 0
        value = x(*index).astype("int64") - attrs["in_zero_point"]
        scaled = requantize_te(value, mult(channel), shift(channel)) + attrs["zero_point"]
        return te_clamp(scaled, attrs["qmin"], attrs["qmax"], attrs["out_dtype"])

    return te.compute(x.shape, element, name="out")


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    mult, shift = constant_or_fail(node, 1, "mult"), constant_or_fail(node, 2, "shift")
    lo, hi = args[0].lo - node.attrs["in_zero_point"], args[0].hi - node.attrs["in_zero_point"]
    claims = [Claim("centred codes", lo, hi, "int32")]
    product, (least, most) = requantize_bounds(*within_int32(lo, hi), mult, shift)
    claims.append(Claim("product", *product, "int64"))
    lo, hi = int(least.min()) + node.attrs["zero_point"], int(most.max()) + node.attrs["zero_point"]
    claims.append(Claim("requantised", lo, hi, "int64"))
    return clamp_interval(lo, hi, output_interval(node)), claims


register(
    "requantize",
    ["x", "mult", "shift"],
    "Dyadic requantisation to another scale.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
