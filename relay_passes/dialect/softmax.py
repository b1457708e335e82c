"""``vitq.softmax``: row softmax of integer logits along the last axis, in the three families.

With ``E = e**(-S*(rowmax - x))`` of ``relay_passes.dialect.exponent`` (15 fractional bits)::

    sum    = max(sum E, 2**15)                          int32
    n      = bits(sum) - 15                             1 .. 16
    factor = (numerator + (sum' >> 1)) // sum'          sum' = sum * 2**-n rounded
    v      = q15(E, -factor)                            q15(a, b) = (a*b + 2**14) >> 15
    out    = min(q15(v, -(2**15 >> s)), qmax)           s = min(n - 1 + out_shift, 16)

``numerator * 2**-(14 + out_shift) ~ 1/out_scale``, so that ``out ~ (E / sum) / out_scale``, and
``factor`` has 14 or 15 significant bits whatever the length of the row. That is the one division of
a row; the work for an element is two ``vpmulhrsw``. Factors are negative because 2**15 occurs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    TOP,
    check_method,
    check_scale,
    exponential_bounds,
    exponential_design,
    exponential_table,
    masked,
    q15,
    te_exponential,
)
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.errors import VitqError

__all__ = ["softmax"]

_LONGEST_ROW = 2**15 - 1
_ARGUMENTS = {"shift": 2, "poly": 3, "table": 4}
"""x, normaliser, scalars of the exponential, its table."""
_FACTOR_BITS = 15


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
    design, scalars = exponential_design(method, in_scale, codes.hi - codes.lo)
    constants = [as_const(_normaliser(out_scale), "int32")]
    if scalars is not None:
        constants.append(as_const(scalars, "uint16"))
    if method == "table":
        constants.append(as_const(exponential_table(), "int16"))
    return call("softmax", x, *constants, method=method, **design, qmax=int(qmax),
                out_dtype=str(out_dtype))


def _normaliser(out_scale: float) -> np.ndarray:
    """Return int32 (numerator, out_shift), the numerator in (2**28, 2**29]."""
    if not 2.0**-15 <= out_scale <= 1.0:
        raise VitqError(f"softmax: out_scale {out_scale} is outside [2**-15, 1]")
    exponent = math.ceil(math.log2(1.0 / out_scale))
    numerator = math.floor(2.0 ** (29 - exponent) / out_scale + 0.5)
    return np.array([numerator, 15 - exponent], np.int32)


def _infer(node: relax.Call) -> relax.TensorType:
    shape, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    attrs = node.attrs
    check_method("vitq.softmax", attrs["method"])
    if not shape or not 1 <= shape[-1] <= _LONGEST_ROW:
        raise fail(node, f"rows of shape {shape} must have 1 to {_LONGEST_ROW} entries")
    expected = {1: ("normaliser", "int32", 2), 2: ("scalars", "uint16", 3),
                3: ("table", "int16", 256)}
    for index in range(1, _ARGUMENTS[attrs["method"]]):
        label, dtype, length = expected[index]
        if tensor_of(node, index, [dtype], label)[0] != [length]:
            raise fail(node, f"{label} must have {length} entries")
    whole = dtype_interval(attrs["out_dtype"])
    if not 0 <= attrs["qmax"] <= whole.hi:
        raise fail(node, f"qmax {attrs['qmax']} does not fit {attrs['out_dtype']}")
    return relax.TensorType(shape, attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x, normaliser, scalars, table = (*tensors, None, None)[:4]
    *rows, length = x.shape

    k = te.reduce_axis((0, length), name="k")
    row_max = te.compute(rows, lambda *i: te.max(x(*i, k), axis=k), name="row_max")

    def exponential(*i: Any) -> Any:
        difference = row_max(*i[:-1]).astype("int32") - x(*i).astype("int32")
        value = te_exponential(attrs["method"], difference.astype("uint16"), attrs, scalars, table)
        return value.astype("int16")

    exp = te.compute(x.shape, exponential, name="exp")
    j = te.reduce_axis((0, length), name="j")
    row_sum = te.compute(
        rows, lambda *i: te.sum(exp(*i, j).astype("int32"), axis=j), name="row_sum")
    row_total = te.compute(
        rows, lambda *i: te.max(row_sum(*i), 1 << _FACTOR_BITS), name="row_total")
    row_shift = te.compute(
        rows,
        lambda *i: tirx.const(32 - _FACTOR_BITS, "int32")
        - tirx.clz(row_total(*i)).astype("int32"),
        name="row_shift",
    )

    def factor(*i: Any) -> Any:
        shift = masked(row_shift(*i))
        total = (row_total(*i) + ((tirx.const(1, "int32") << shift) >> 1)) >> shift
        return (0 - te.floordiv((total >> 1) + normaliser(0), total)).astype("int16")

    row_factor = te.compute(rows, factor, name="row_factor")

    def power(*i: Any) -> Any:
        shift = te.min(row_shift(*i) + (normaliser(1) - 1), 16)
        return (0 - (tirx.const(2**15, "int32") >> masked(shift))).astype("int16")

    row_power = te.compute(rows, power, name="row_power")

    def out(*i: Any) -> Any:
        value = q15(exp(*i).astype("int32"), row_factor(*i[:-1]).astype("int32"))
        value = q15(value, row_power(*i[:-1]).astype("int32"))
        return te.min(value, attrs["qmax"]).astype(attrs["out_dtype"])

    return te.compute(x.shape, out, name="softmax")


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    attrs = node.attrs
    shape, _ = tensor_of(node, 0)
    numerator, out_shift = (int(v) for v in constant_or_fail(node, 1, "normaliser"))
    constants = [constant_or_fail(node, i, "exponential") for i in range(2, len(node.args))]
    scalars, table = (*constants, None, None)[:2]
    claims = exponential_bounds(
        attrs["method"], args[0].hi - args[0].lo, attrs, scalars, table)
    length, half = shape[-1], 1 << (_FACTOR_BITS - 1)
    total = max(length * TOP, 2 * half)
    claims += [
        Claim("row sum", 0, total, "int32"),
        # The shift is less than 16: the sum is below 2**30.
        Claim("rounded row sum", 2 * half, total + half, "int32"),
        Claim("numerator", half, numerator + half, "int32"),
        Claim("row factor", -((numerator + half // 2) // half), 0, "int16"),
        Claim("output shift", 0, out_shift, "uint8"),
    ]
    # sum E <= (sum' + 1/2) * 2**n and factor <= numerator/sum' + 1/2; two roundings an element.
    mass = numerator + numerator // (2 * half) + half + 1
    row_sum = min(length * attrs["qmax"], (mass >> (14 + out_shift)) + 1 + length)
    return Interval(0, attrs["qmax"], row_sum), claims


register(
    "softmax",
    ["x", "normaliser", "scalars", "table"],
    "Integer softmax along the last axis.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
