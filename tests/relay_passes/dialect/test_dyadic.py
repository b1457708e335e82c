"""Dyadic parameters against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay_passes.dialect.dyadic import MAX_SHIFT, dyadic, requantize_bounds
from relay_passes.errors import VitqError
from tvm_vitq.reference.arithmetic import requantized

RATIOS = st.floats(min_value=2.0**-31, max_value=2.0**30 - 1)
ALMOST_ONE = float(np.nextafter(1.0, 0.0))
INT32 = st.integers(-(2**31), 2**31 - 1)


def contract(ratio: float) -> tuple[int, int]:
    """The rule of the contract, in exact arithmetic."""
    fraction, x = Fraction(ratio), 0
    while fraction >= 1:
        fraction, x = fraction / 2, x + 1
    while fraction < Fraction(1, 2):
        fraction, x = fraction * 2, x - 1
    mult = floor(fraction * 2**31 + Fraction(1, 2))
    if mult == 2**31:
        mult, x = mult // 2, x + 1
    return mult, 31 - x


@given(RATIOS)
@example(0.5)
@example(1.0)
@example(ALMOST_ONE)
@example(ALMOST_ONE * 2.0**29)
@example(2.0**-31)
@example(float(np.nextafter(2.0**30, 0.0)) / 2)
def test_equals_the_contract(ratio):
    mult, shift = (int(v) for v in dyadic(ratio))
    assert (mult, shift) == contract(ratio)
    assert 2**30 <= mult < 2**31 and 1 <= shift <= MAX_SHIFT
    assert abs(Fraction(mult, 2**shift) - Fraction(ratio)) <= Fraction(ratio) / 2**31


@given(st.floats(min_value=0, max_value=2.0**-31, allow_subnormal=True))
@example(0.0)
@example(2.0**-62)
@example(5e-324)
def test_tiny_ratios_round_at_the_largest_shift(ratio):
    mult, shift = (int(v) for v in dyadic(ratio))
    assert 0 <= mult < 2**31 and 1 <= shift <= MAX_SHIFT
    assert abs(Fraction(mult, 2**shift) - Fraction(ratio)) <= Fraction(1, 2**63)


@given(st.lists(RATIOS, min_size=1, max_size=9), st.booleans())
def test_arrays_are_elementwise_and_odd(ratios, negative):
    sign = -1 if negative else 1
    mult, shift = dyadic(sign * np.array(ratios))
    assert mult.dtype == shift.dtype == np.int32
    for ratio, m, e in zip(ratios, mult, shift, strict=True):
        assert (sign * int(m), int(e)) == contract(ratio)


@pytest.mark.parametrize("ratio", [np.nan, np.inf, 2.0**30, [1.0, -(2.0**31)]])
def test_refuses_what_has_no_parameters(ratio):
    with pytest.raises(VitqError, match="requantisation: "):
        dyadic(np.array(ratio))


@given(INT32, st.integers(-(2**31) + 1, 2**31 - 1), st.integers(1, 62))
@example(-(2**31), -(2**31) + 1, 62)
@example(2**31 - 1, 2**31 - 1, 1)
@example(3, 2**30, 31)  # 1.5 -> 2
@example(-3, 2**30, 31)  # -1.5 -> -1: halves go up
@example(-1, 2**30, 31)  # -0.5 -> 0
def test_rounding_is_exact_half_up(a, mult, shift):
    exact = floor(Fraction(a * mult, 2**shift) + Fraction(1, 2))
    assert int(requantized(np.array([a]), mult, shift)[0]) == exact


@given(INT32, INT32, st.integers(-(2**31) + 1, 2**31 - 1), st.integers(1, 62))
def test_bounds_are_reached(a, b, mult, shift):
    lo, hi = min(a, b), max(a, b)
    product, (least, most) = requantize_bounds(lo, hi, mult, shift)
    ends = requantized(np.array([lo, hi]), mult, shift)
    assert (int(least), int(most)) == (ends.min(), ends.max())
    assert product[0] >= -(2**63) and product[1] < 2**63
