"""Reference of the arithmetic family: boundary, linear, matmul, requantize, add, sum.

Everything is int64 NumPy. A matmul runs on float32 BLAS where every partial sum is at most 2**24,
on float64 BLAS up to 2**53 (every operation is then exact, in any order), on int64 otherwise. The
rounding rule is ``rq(a, m, e) = floor(a * m / 2**e + 1/2)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_vitq.reference.registry import expect, reference

__all__ = ["exact_matmul", "requantized"]

Arrays = Sequence[np.ndarray]
Attrs = Mapping[str, Any]


def exact_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the exact int64 product of two integer arrays [..., M, K] and [..., K, N]."""
    if a.size == 0 or b.size == 0:
        return np.matmul(a.astype(np.int64), b.astype(np.int64))
    largest = [max(abs(int(t.min())), abs(int(t.max()))) for t in (a, b)]
    bound = a.shape[-1] * largest[0] * largest[1]
    dtype = np.float32 if bound <= 2**24 else np.float64 if bound <= 2**53 else np.int64
    return np.matmul(a.astype(dtype), b.astype(dtype)).astype(np.int64)


def requantized(a: np.ndarray, mult: Any, shift: Any) -> np.ndarray:
    """Return ``rq(a, mult, shift)`` of an array that fits int32."""
    wide = expect(a, "int32", "a requantisation's input").astype(np.int64)
    mult, shift = np.asarray(mult, np.int64), np.asarray(shift, np.int64)
    # |a| <= 2**31, |mult| < 2**31 and shift <= 62: the sum stays below 2**62 + 2**61.
    assert np.all((shift >= 1) & (shift <= 62)) and np.all(np.abs(mult) < 2**31)
    return np.right_shift(wide * mult + np.left_shift(np.int64(1), shift - 1), shift)


def _finished(value: np.ndarray, attrs: Attrs) -> np.ndarray:
    return np.clip(value + attrs["zero_point"], attrs["qmin"], attrs["qmax"])


@reference("vitq.quantize")
def _quantize(args: Arrays, attrs: Attrs) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinite product is clamped like any other
        scaled = args[0] * np.float32(attrs["inv_scale"]) + np.float32(0.5)
    zero_point = attrs["zero_point"]
    low, high = np.float32(attrs["qmin"] - zero_point), np.float32(attrs["qmax"] - zero_point)
    rounded = np.where(np.isnan(scaled), low, np.floor(scaled))
    return np.clip(rounded, low, high).astype(np.int64) + zero_point


@reference("vitq.dequantize")
def _dequantize(args: Arrays, attrs: Attrs) -> np.ndarray:
    centred = expect(args[0].astype(np.int64) - attrs["zero_point"], "int32", "q - zero_point")
    return centred.astype(np.float32) * np.float32(attrs["scale"])


@reference("vitq.linear")
def _linear(args: Arrays, _attrs: Attrs) -> np.ndarray:
    x, w, bias = args[:3]
    return expect(exact_matmul(x, w) + bias.astype(np.int64), "int32", "accumulator")


@reference("vitq.linear_requant")
def _linear_requant(args: Arrays, attrs: Attrs) -> np.ndarray:
    return _finished(requantized(_linear(args, attrs), args[3], args[4]), attrs)


@reference("vitq.linear_requant_add")
def _linear_requant_add(args: Arrays, attrs: Attrs) -> np.ndarray:
    branch = requantized(_linear(args, attrs), args[3], args[4])
    residual = requantized(args[5], attrs["res_mult"], attrs["res_shift"])
    return _finished(branch + residual, attrs)


@reference("vitq.matmul")
def _matmul(args: Arrays, attrs: Attrs) -> np.ndarray:
    a, b = args[:2]
    if attrs["transpose_b"]:
        b = np.swapaxes(b, -1, -2)
    return expect(exact_matmul(a, b), "int32", "accumulator")


@reference("vitq.matmul_requant")
def _matmul_requant(args: Arrays, attrs: Attrs) -> np.ndarray:
    return _finished(requantized(_matmul(args, attrs), attrs["mult"], attrs["shift"]), attrs)


@reference("vitq.matmul_requant_add")
def _matmul_requant_add(args: Arrays, attrs: Attrs) -> np.ndarray:
    scores = requantized(_matmul(args, attrs), attrs["mult"], attrs["shift"])
    return _finished(scores + requantized(args[2], attrs["res_mult"], attrs["res_shift"]), attrs)


@reference("vitq.requantize")
def _requantize(args: Arrays, attrs: Attrs) -> np.ndarray:
    x, mult, shift = args
    centred = x.astype(np.int64) - attrs["in_zero_point"]
    return _finished(requantized(centred, mult, shift), attrs)


@reference("vitq.add")
def _add(args: Arrays, attrs: Attrs) -> np.ndarray:
    terms = [
        requantized(
            value.astype(np.int64) - attrs[f"{side}_zero_point"],
            attrs[f"{side}_mult"],
            attrs[f"{side}_shift"],
        )
        for value, side in zip(args, "ab", strict=True)
    ]
    return _finished(terms[0] + terms[1], attrs)


@reference("vitq.sum")
def _sum(args: Arrays, attrs: Attrs) -> np.ndarray:
    total = args[0].sum(axis=attrs["axis"], keepdims=attrs["keepdims"], dtype=np.int64)
    return expect(total, "int32", "accumulator")
