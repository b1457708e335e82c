"""Integer exponentials ``e**(-S*d)`` of a non-negative integer difference ``d``, in three families.

All three write ``e**(-S*d) = 2**-(q + f)`` with an integer part ``q`` and a fraction
``0 <= f < 1``, take ``2**-f`` as a mantissa of 29 fractional bits and shift it down by ``q``::

    E = ((mantissa >> (q + 12)) + 1) >> 1            (16 fractional bits, rounded, at most ``top``)

* ``poly``: ``t = d * (S * log2 e)`` as a dyadic product with 15 fractional bits; the mantissa is
  ``1 - f*(B1 - B2*f)``, the relative minimax quadratic of ``2**-f`` divided by its value at 0 (a
  factor common to a row cancels in a softmax). Every factor is a 15-bit number.
* ``table``: the same with 8 fractional bits; the mantissa is read from 256 entries. Splitting the
  integer part off makes 256 entries enough for every scale, also where a row spans thousands of
  codes.
* ``shift``: Shiftmax of I-ViT. ``d*log2 e ~ d + (d>>1) - (d>>4)``, ``one = round(1/S)``,
  ``q = d // one``, mantissa ``1 - f/2``. Guard: ``d`` is shifted first so that ``one`` has ten
  significant bits (rounding ``1/S`` itself is a temperature error of up to 20 % at coarse S). The
  quotient is an exact multiplication by a reciprocal, since no element may cost a division.

Differences past ``t = 18`` give exactly 0, so that thousands of far-away entries do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import te

from relay_passes.dialect.registry import Claim
from relay_passes.errors import VitqError

__all__ = [
    "CUTOFF",
    "EXP_BITS",
    "MANTISSA_BITS",
    "METHODS",
    "check_method",
    "check_scale",
    "exponential_bounds",
    "exponential_design",
    "exponential_table",
    "masked",
    "quotient_bounds",
    "quotient_design",
    "rescale",
    "round_shift",
    "te_exponential",
    "te_quotient",
]

METHODS = ("shift", "poly", "table")
CUTOFF = 18
"""``2**-t`` is 0 from here on."""
EXP_BITS = 16
"""Fractional bits of an exponential."""
MANTISSA_BITS = 29
FRACTION_BITS = {"poly": 15, "table": 8}
B1, B2 = 10931, 2767
"""Quadratic of ``2**-f`` with 14 fractional bits: ``1 - f*(B1 - B2*f) * 2**-14``."""
_LOG2E = math.log2(math.e)
_SHIFT_LOG2E = 1.4375
_COARSEST = 16.0
"""Steps of 16 or more make every difference but 0 vanish; larger scales are treated as 16."""


def check_method(operator: str, method: str) -> None:
    """Refuse an unknown family."""
    if method not in METHODS:
        raise VitqError(f"{operator}: method {method!r} is unknown; use {', '.join(METHODS)}")


def check_scale(operator: str, label: str, scale: float) -> float:
    """Return a scale as a float after checking that it is finite and positive."""
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise VitqError(
            f"{operator}: {label} is {value}; a scale must be finite and positive, calibrate that "
            "site again"
        )
    return value


def rescale(ratio: float) -> tuple[int, int]:
    """Return (m, e) with ``m * 2**-e ~ ratio`` for differences below 2**16 and an int32 product.

    ``0 <= e <= 16`` and, for ratios below 2**15, ``m < 2**15``: then ``d*m + 2**(e-1)`` stays below
    2**31 for every ``d`` below 2**16. The relative error of a ratio of at least 1/4 is 2**-15.
    """
    e = max(0, min(16, 14 - math.floor(math.log2(ratio))))
    m = math.floor(ratio * 2.0**e + 0.5)
    return (min(m, 2**15 - 1) if e else m), e


def round_shift(value: Any, bits: int) -> Any:
    """``value * 2**-bits`` rounded half up, for TE expressions and integers alike."""
    return (value + (1 << (bits - 1))) >> bits if bits else value


def masked(amount: Any, bits: int = 5) -> Any:
    """Return a shift amount with its upper bits cleared, which changes none that is in range.

    TVM's analysis bounds ``x >> n`` by the ends of what it knows of ``n``, also where those are
    negative, and then drops clamps that it takes for superfluous. So no variable amount goes bare.
    """
    return amount & ((1 << bits) - 1)


def quotient_design(scale: float) -> dict[str, int]:
    """Parameters of the shift family's ``q = d*log2e // one``: see the module's text."""
    pre_shift = math.floor(math.log2(1023.0 * scale))
    one = max(1, math.floor(2.0**pre_shift / scale + 0.5))
    return {"pre_shift": pre_shift, "one": one, "reciprocal": 2**25 // one + 1}


def exponential_design(method: str, scale: float, width: int) -> dict[str, int]:
    """Choose the integer parameters of ``e**(-scale*d)`` for ``0 <= d <= width < 2**16``.

    Returns
    -------
    dict
        ``diff_max`` (larger differences are cut to it), ``top`` (the exponential of 0) and the
        parameters of the family.
    """
    scale = min(scale, _COARSEST)
    if method == "shift":
        steps = max(1, math.ceil(CUTOFF / (_SHIFT_LOG2E * scale)))
        design = quotient_design(scale)
        design["diff_max"] = min(width, steps + 2)
        design["mantissa_shift"] = MANTISSA_BITS - (2 * design["one"]).bit_length()
        largest = 2 * design["one"] << design["mantissa_shift"]
        design["top"] = round_shift(largest, MANTISSA_BITS - EXP_BITS)
        return design
    slope = scale * _LOG2E
    mult, shift = rescale(slope * 2.0 ** FRACTION_BITS[method])
    return {
        "diff_max": min(width, math.ceil(CUTOFF / slope) + 1),
        "diff_mult": mult,
        "diff_shift": shift,
        "top": 2**EXP_BITS,
    }


def exponential_table() -> np.ndarray:
    """``2**-(i/256)`` with 29 fractional bits: int32 [256]."""
    return np.floor(2.0 ** (MANTISSA_BITS - np.arange(256) / 256.0) + 0.5).astype(np.int32)


def te_quotient(d: Any, design: Mapping[str, int]) -> tuple[Any, Any]:
    """Quotient and remainder of ``d*log2e`` (by shifts) by ``one``."""
    one, pre_shift = design["one"], design["pre_shift"]
    scaled = d << pre_shift if pre_shift >= 0 else round_shift(d, -pre_shift)
    base2 = te.min(scaled + (scaled >> 1) - (scaled >> 4), CUTOFF * one)
    quotient = (base2 * design["reciprocal"]) >> 25
    return quotient, base2 - quotient * one


def te_exponential(method: str, d: Any, design: Mapping[str, int], table: te.Tensor | None) -> Any:
    """Build the int32 expression of the exponential of ``d`` (int32, not negative)."""
    d = te.min(d, design["diff_max"])
    if method == "shift":
        quotient, rest = te_quotient(d, design)
        mantissa = (2 * design["one"] - rest) << design["mantissa_shift"]
    else:
        bits = FRACTION_BITS[method]
        t = te.min(round_shift(d * design["diff_mult"], design["diff_shift"]), CUTOFF << bits)
        quotient, fraction = t >> bits, t & ((1 << bits) - 1)
        if method == "table":
            assert table is not None
            mantissa = table(fraction)
        else:
            slope = B1 - round_shift(fraction * B2, 15)
            mantissa = (1 << MANTISSA_BITS) - fraction * slope
    return ((mantissa >> masked(quotient + (MANTISSA_BITS - EXP_BITS - 1))) + 1) >> 1


def exponential_bounds(
    method: str, width: int, design: Mapping[str, int], table: np.ndarray | None
) -> list[Claim]:
    """Bounds of every intermediate of :func:`te_exponential` for differences up to ``width``."""
    d = min(width, design["diff_max"])
    claims = [Claim("difference", 0, width, "int32")]
    if method == "shift":
        claims += quotient_bounds(d, design)
        one = design["one"]
        least, most = one + 1, 2 * one
        mantissa = (least << design["mantissa_shift"], most << design["mantissa_shift"])
    else:
        bits = FRACTION_BITS[method]
        product = d * design["diff_mult"] + (1 << design["diff_shift"] >> 1)
        claims.append(Claim("rescaled difference", 0, product, "int32"))
        last = (1 << bits) - 1
        if method == "table":
            assert table is not None
            mantissa = (int(table.min()), int(table.max()))
        else:
            claims.append(Claim("slope", B1 - round_shift(last * B2, 15), B1, "int16"))
            mantissa = ((1 << MANTISSA_BITS) - last * B1, 1 << MANTISSA_BITS)
    claims.append(Claim("mantissa", *mantissa, "int32"))
    claims.append(Claim("exponential", 0, design["top"], "int32"))
    return claims


def quotient_bounds(d: int, design: Mapping[str, int]) -> list[Claim]:
    """Bounds of :func:`te_quotient`; the last claim states that the quotient is exact."""
    one, pre_shift = design["one"], design["pre_shift"]
    scaled = d << pre_shift if pre_shift >= 0 else round_shift(d, -pre_shift)
    base2 = min(scaled + (scaled >> 1), CUTOFF * one)
    excess = design["reciprocal"] * one - 2**25
    return [
        Claim("shifted difference", 0, scaled, "int32"),
        Claim("base-2 difference", 0, scaled + (scaled >> 1), "int32"),
        Claim("quotient product", 0, base2 * design["reciprocal"], "int32"),
        # floor(n * r / 2**25) equals n // one while n * (r*one - 2**25) < 2**25.
        Claim("reciprocal error (x 64)", 0, 64 * base2 * excess, "int32"),
    ]
