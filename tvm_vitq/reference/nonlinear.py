"""Reference of the nonlinear family: softmax, GELU, LayerNorm, straight from their formulas.

Everything is int64 NumPy with true floor division where the compiled definition multiplies by a
reciprocal, and with every intermediate checked against the dtype that its proof gives it. The
constants are part of the operators' definition and are stated a second time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_vitq.reference.registry import expect, reference

__all__ = ["reciprocal_root"]

Arrays = Sequence[np.ndarray]
Attrs = Mapping[str, Any]


def _rounded(value: np.ndarray, bits: Any) -> np.ndarray:
    """``value / 2**bits`` rounded half up."""
    return (2 * value + 2**bits) // 2 ** (bits + 1)


def _bit_length(value: np.ndarray) -> np.ndarray:
    """Number of bits of positive integers."""
    length = np.zeros_like(value)
    for n in range(63):
        length += value >= np.int64(2) ** n
    return length


def _base2_quotient(d: np.ndarray, one: int, pre_shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Quotient and remainder by ``one`` of ``d*log2(e)``, ``log2(e) ~ 1 + 1/2 - 1/16``."""
    scaled = d * 2**pre_shift if pre_shift >= 0 else _rounded(d, -pre_shift)
    base2 = expect(scaled + scaled // 2 - scaled // 16, "int32", "difference in base 2")
    return np.divmod(np.minimum(base2, 18 * one), one)


def _q15(a: np.ndarray | int, b: np.ndarray | int) -> np.ndarray:
    return expect(_rounded(a * b, 15), "int16", "product of 15-bit fractions")  # type: ignore


def _cubic(coefficients: Sequence[int], w: np.ndarray) -> np.ndarray:
    """Polynomial of a 15-bit fraction, highest order first."""
    value = np.full_like(w, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _q15(w, value) + coefficient
    return value


def _exponential(
    difference: np.ndarray, attrs: Attrs, scalars: np.ndarray | None, table: np.ndarray | None
) -> np.ndarray:
    """``e**(-in_scale * difference)`` with 15 fractional bits."""
    expect(difference, "uint16", "difference")
    if scalars is None:
        d = np.minimum(difference, attrs["diff_max"])
        quotient, rest = _base2_quotient(d, attrs["one"], attrs["pre_shift"])
        mantissa = _rounded((2 * attrs["one"] - rest) * attrs["unit_mult"], 14)
        return _rounded(np.minimum(mantissa, 2**15 - 1), quotient)
    diff_max, lift, mult = (int(v) for v in scalars)
    lifted = expect(np.minimum(difference, diff_max) * lift, "uint16", "lifted difference")
    quotient, rest = np.divmod(np.minimum(lifted * mult // 2**16, 2**15 - 1), 2**11)
    if table is not None:
        mantissa = table.astype(np.int64)[rest // 8]
    else:
        f = 16 * rest
        mantissa = -_cubic((1340, -7620, 22670, -(2**15) + 1), f)
    return _q15(-mantissa, -(2**15) // 2**quotient)


@reference("vitq.softmax")
def _softmax(args: Arrays, attrs: Attrs) -> np.ndarray:
    x, (numerator, out_shift) = args[0].astype(np.int64), args[1].astype(np.int64)
    scalars, table = (*args[2:], None, None)[:2]
    exp = _exponential(x.max(axis=-1, keepdims=True) - x, attrs, scalars, table)
    total = np.maximum(expect(exp.sum(axis=-1, keepdims=True), "int32", "row sum"), 2**15)
    bits = _bit_length(total) - 15
    total = _rounded(total, bits)
    factor = expect(-((numerator + total // 2) // total), "int16", "row factor")
    power = -(2**15 // 2 ** (bits - 1 + out_shift))
    return np.minimum(_q15(_q15(exp, factor), power), attrs["qmax"])


def _poly_tail(w: np.ndarray) -> np.ndarray:
    power = _cubic((17417, -29350, -13934, 32740), w)
    for _ in range(2):
        power = _q15(power, power)
    return _q15(4 * _q15(w, power), power)


def _shift_tail(u: np.ndarray, attrs: Attrs) -> np.ndarray:
    pre_shift, one = attrs["pre_shift"], attrs["one"]
    scaled = u * 2**pre_shift if pre_shift >= 0 else _rounded(u, -pre_shift)
    quotient, rest = _base2_quotient(scaled + scaled // 2 + scaled // 8 + scaled // 16, one, 0)
    z = _rounded((2 * one - rest) * attrs["unit_mult"], 14) // 2**quotient
    bend = 28672 - (z // 4 + z // 8)
    sigmoid = z * (32768 - z * bend // 2**15) // 2**15
    return scaled * expect(sigmoid, "int16", "sigmoid") // 2**8


def _tail(u: np.ndarray, attrs: Attrs, constants: Arrays) -> np.ndarray:
    form = attrs["form"]
    if form == "direct":
        return constants[0].astype(np.int64)[u]
    if form == "shift":
        return _shift_tail(np.minimum(u, attrs["tail_end"]), attrs)
    tail_end, lift, mult = (int(v) for v in constants[0])
    lifted = expect(np.minimum(u, tail_end) * lift, "uint16", "lifted argument")
    w = np.minimum(lifted * mult // 2**16, 2**15 - 1)
    if form == "poly":
        return _poly_tail(w)
    assert form == "interpolate"
    piece, rest = np.divmod(w, 2**7)
    left, right = (constants[1].astype(np.int64)[piece + n] for n in (0, 1))
    return left + _rounded((right - left) * rest, 7)


@reference("vitq.gelu")
def _gelu(args: Arrays, attrs: Attrs) -> np.ndarray:
    if attrs["form"] == "codes":
        x, table = args
        return table.astype(np.int64)[x.astype(np.int64) - np.iinfo(x.dtype).min]
    gain, tail_gain, ceiling, shift, finish = (a.astype(np.int64) for a in args[1:6])
    centred = args[0].astype(np.int64) - attrs["in_zero_point"]
    tail = _tail(np.abs(centred), attrs, args[6:])
    positive = np.clip(centred, 0, ceiling)
    if args[1].dtype == np.uint16:
        lifted = expect(positive * shift, "uint16", "lifted value")
        total = expect(lifted * gain // 2**16 - _q15(tail, tail_gain), "int16", "difference")
        codes = _q15(expect(total + finish[0], "int16", "sum"), finish[1])
    else:
        linear = expect(positive * gain, "int32", "linear product")
        curved = expect(tail * tail_gain, "int32", "tail product")
        codes = _rounded(expect(linear - curved, "int32", "sum"), shift) + finish[0]
    return np.clip(codes, attrs["qmin"], attrs["qmax"])


def reciprocal_root(v: np.ndarray) -> np.ndarray:
    """``1/sqrt(v)``, 30 fractional bits, of ``v`` in [1/4, 1): a cubic and two steps of Newton."""
    y = np.full_like(v, -654592838)
    for coefficient in (1672402406, -1586745591, 835482791):
        y = v * y // 2**30 + coefficient
    y = 4 * y
    for _ in range(2):
        y = y * (3 * 2**30 - v * (y * y // 2**30) // 2**30) // 2**31
    return y


@reference("vitq.layer_norm")
def _layer_norm(args: Arrays, attrs: Attrs) -> np.ndarray:
    x, mult, bias = (a.astype(np.int64) for a in args)
    channels = x.shape[-1]
    total = expect(x.sum(axis=-1, keepdims=True), "int32", "row sum")
    squares = (x * x).sum(axis=-1, keepdims=True)
    variance = (channels * squares - total * total) * 2 ** attrs["var_shift"] + attrs["eps_code"]
    assert np.all((variance > 0) & (variance < 2**62))
    half = (62 - _bit_length(variance)) // 2
    root = reciprocal_root(variance * 4**half // 2**32)
    lift = half + attrs["var_shift"] // 2 - attrs["headroom"]
    root = np.minimum(root // 2 ** np.maximum(-lift, 0), 2**31 - 1)
    centred = expect(channels * x - total, "int32", "centred value")
    lifted = expect(centred * 2 ** np.clip(lift, 0, 30), "int32", "lifted value")
    z = expect(lifted * root // 2**32, "int32", "normalised value")
    value = expect(z * mult // 2**32 + bias, "int32", "affine value")
    return np.clip(value // 2 ** attrs["out_shift"], attrs["qmin"], attrs["qmax"])
