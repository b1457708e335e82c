"""``vitq.softmax``: row softmax of integer logits along the last axis, in the three families.

With ``E = e**(-S*(rowmax - x))`` of ``relay_passes.dialect.exponent`` (16 fractional bits)::

    sum    = sum E                                       int32, at least ``top``
    shift  = bits(sum) - bits(top)
    factor = (numerator + (sum' >> 1)) // sum'           sum' = sum * 2**-shift rounded
    out    = min(E * factor * 2**-(out_shift + shift) rounded half up, qmax)

``numerator ~ 2**out_shift / out_scale``, so that ``out ~ (E / sum) / out_scale``. Scaling the sum
to the bits of ``top`` keeps ``E * factor`` inside int32 and the factor at 13 to 15 significant bits
whatever the length of the row. That is the one division of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import relax, te, tirx

from relay_passes.dialect.checking import (
    ACTIVATION_DTYPES,
    as_const,
    constant_or_fail,
    dtype_interval,
    fail,
    tensor_of,
)
from relay_passes.dialect.exponent import (
    check_method,
    check_scale,
    exponential_bounds,
    exponential_design,
    exponential_table,
    masked,
    te_exponential,
)
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.errors import VitqError

__all__ = ["softmax"]

_LONGEST_ROW = 2**15 - 1


def softmax(
    x: relax.Expr, in_scale: float, out_scale: float, qmax: int, out_dtype: str, method: str
) -> relax.Call:
    """Softmax along the last axis.

    Parameters
    ----------
    x : relax.Expr
        int8, uint8 or int16 logits [..., N], N at most 32767. Their zero point does not matter.
    in_scale, out_scale : float
        Steps of the logits and of the probabilities; 2**-15 <= out_scale <= 1, zero point 0.
    qmax : int
        Largest output code.
    out_dtype : str
        dtype of the probabilities.
    method : {"shift", "poly", "table"}
        Family of the exponential.

    Raises
    ------
    VitqError
        If a scale, the row length or the method is outside what is proved.
    """
    check_method("softmax", method)
    in_scale = check_scale("softmax", "in_scale", in_scale)
    out_scale = check_scale("softmax", "out_scale", out_scale)
    shape, dtype = [int(n) for n in x.ty.shape.values], str(x.ty.dtype)
    if not shape or not 1 <= shape[-1] <= _LONGEST_ROW:
        raise VitqError(f"softmax: rows of shape {shape} must have 1 to {_LONGEST_ROW} entries")
    if dtype not in ACTIVATION_DTYPES:
        raise VitqError(f"softmax: logits must be {' or '.join(ACTIVATION_DTYPES)}, not {dtype}")
    codes = dtype_interval(dtype)
    design = exponential_design(method, in_scale, codes.hi - codes.lo)
    numerator, out_shift = _numerator(out_scale, design["top"], shape[-1])
    table = [as_const(exponential_table(), "int32")] if method == "table" else []
    return call(
        "softmax",
        x,
        *table,
        method=method,
        **design,
        numerator=numerator,
        out_shift=out_shift,
        qmax=int(qmax),
        out_dtype=str(out_dtype),
    )


def _numerator(out_scale: float, top: int, length: int) -> tuple[int, int]:
    """Largest ``2**out_shift / out_scale`` that keeps ``E * factor`` and every shift in int32."""
    if not 2.0**-15 <= out_scale <= 1.0:
        raise VitqError(f"softmax: out_scale {out_scale} is outside [2**-15, 1]")
    sum_floor = 1 << (top.bit_length() - 1)
    limit = 2**30 * sum_floor // top
    out_shift = math.floor(math.log2(limit * out_scale))
    out_shift = max(1, min(out_shift, 30 - _largest_shift(top, length)))
    return math.floor(2.0**out_shift / out_scale + 0.5), out_shift


def _largest_shift(top: int, length: int) -> int:
    return (top * length).bit_length() - top.bit_length()


def _infer(node: relax.Call) -> relax.TensorType:
    shape, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    attrs = node.attrs
    check_method("vitq.softmax", attrs["method"])
    if not shape or not 1 <= shape[-1] <= _LONGEST_ROW:
        raise fail(node, f"rows of shape {shape} must have 1 to {_LONGEST_ROW} entries")
    if attrs["method"] == "table" and tensor_of(node, 1, ["int32"], "table")[0] != [256]:
        raise fail(node, "the table must have 256 entries")
    whole = dtype_interval(attrs["out_dtype"])
    if not 0 <= attrs["qmax"] <= whole.hi:
        raise fail(node, f"qmax {attrs['qmax']} does not fit {attrs['out_dtype']}")
    return relax.TensorType(shape, attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x, table = tensors[0], tensors[1] if len(tensors) > 1 else None
    *rows, length = x.shape
    method, top_bits, out_shift = attrs["method"], attrs["top"].bit_length(), attrs["out_shift"]

    k = te.reduce_axis((0, length), name="k")
    row_max = te.compute(rows, lambda *i: te.max(x(*i, k), axis=k), name="row_max")

    def exponential(*i: Any) -> Any:
        difference = row_max(*i[:-1]).astype("int32") - x(*i).astype("int32")
        return te_exponential(method, difference, attrs, table)

    exp = te.compute(x.shape, exponential, name="exp")
    j = te.reduce_axis((0, length), name="j")
    row_sum = te.compute(rows, lambda *i: te.sum(exp(*i, j), axis=j), name="row_sum")
    row_shift = te.compute(
        rows,
        lambda *i: tirx.const(32 - top_bits, "int32") - tirx.clz(row_sum(*i)).astype("int32"),
        name="row_shift",
    )

    def factor(*i: Any) -> Any:
        shift = masked(row_shift(*i))
        half = (tirx.const(1, "int32") << shift) >> 1
        total = (row_sum(*i) + half) >> shift
        return te.floordiv((total >> 1) + attrs["numerator"], total)

    row_factor = te.compute(rows, factor, name="row_factor")

    def out(*i: Any) -> Any:
        product = exp(*i) * row_factor(*i[:-1])
        value = ((product >> masked(row_shift(*i[:-1]) + (out_shift - 1))) + 1) >> 1
        return te.min(value, attrs["qmax"]).astype(attrs["out_dtype"])

    return te.compute(x.shape, out, name="softmax")


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    attrs = node.attrs
    shape, _ = tensor_of(node, 0)
    table = constant_or_fail(node, 1, "table") if attrs["method"] == "table" else None
    width = args[0].hi - args[0].lo
    claims = exponential_bounds(attrs["method"], width, attrs, table)
    top, numerator, length = attrs["top"], attrs["numerator"], shape[-1]
    sum_floor = 1 << (top.bit_length() - 1)
    shift = _largest_shift(top, length)
    factor = (numerator + sum_floor) // sum_floor + 1
    total = length * top
    claims += [
        Claim("row sum", top, total, "int32"),
        Claim("rounded row sum", sum_floor, total + (1 << shift >> 1), "int32"),
        Claim("2**(row shift + out_shift)", 1, 1 << (shift + attrs["out_shift"]), "int32"),
        Claim("row factor", 0, factor, "int32"),
        Claim("numerator", sum_floor, numerator + sum_floor, "int32"),
        Claim("probability product", 0, top * factor, "int32"),
    ]
    # out <= E*factor/2**n + 1/2; sum E*factor/2**shift <= (sum' + 1/2) * (numerator/sum' + 1/2).
    mass = numerator + numerator // (2 * sum_floor) + sum_floor + 2
    row_sum = min(length * attrs["qmax"], (mass >> attrs["out_shift"]) + 1 + (length + 1) // 2)
    return Interval(0, attrs["qmax"], row_sum), claims


register(
    "softmax",
    ["x", "table"],
    "Integer softmax along the last axis.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
