"""Integer exponentials ``e**(-S*d)`` of a non-negative integer difference ``d``, in three families.

All three write ``e**(-S*d) = 2**-(q + f)`` with an integer part ``0 <= q <= 15`` and a fraction
``0 <= f < 1``, and take ``2**-f`` as a mantissa of 15 fractional bits, at most ``TOP = 2**15 - 1``.
Everything fits 16-bit lanes; ``q15(a, b) = (a*b + 2**14) >> 15`` is one instruction on x86::

    E = q15(-mantissa, -2**15 >> q)                  (15 fractional bits, rounded half up)

(the factor of ``q = 0`` would not fit as a positive number)

* ``poly``: ``t = min(d, diff_max) * (S * log2 e)`` with 11 fractional bits is the high half of a
  product of two 16-bit numbers, ``d * lift`` and ``mult``; the mantissa is a cubic in ``f``, 1 at 0
  and 1/2 at 1 (relative error below 5e-4).
* ``table``: the same ``t``; the mantissa is read from 256 entries. Splitting the integer part off
  makes 256 entries enough for every scale, also where a row spans thousands of codes.
* ``shift``: Shiftmax of I-ViT. ``d*log2 e ~ d + (d>>1) - (d>>4)``, ``one = round(1/S)``,
  ``q = d // one``, mantissa ``1 - f/2``. Guard: ``d`` is shifted first so that ``one`` has ten
  significant bits (rounding ``1/S`` itself is a temperature error of up to 20 % at coarse S). The
  quotient is an exact multiplication by a reciprocal, since no element may cost a division.

Differences past ``t = 16`` give exactly 0, so that thousands of far-away entries do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import te, tirx

from relay_passes.dialect.registry import Claim
from relay_passes.errors import VitqError

__all__ = [
    "CUTOFF",
    "METHODS",
    "TOP",
    "check_method",
    "check_scale",
    "cubic",
    "exponential_bounds",
    "exponential_design",
    "exponential_table",
    "masked",
    "q15",
    "quotient_bounds",
    "quotient_design",
    "round_shift",
    "te_exponential",
    "te_quotient",
]

METHODS = ("shift", "poly", "table")
CUTOFF = 18
"""``2**-t`` of the shift family is 0 from here on."""
TOP = 2**15 - 1
"""The exponential of 0; 15 fractional bits."""
T_BITS = 11
MINUS_MANTISSA = (-TOP, 22670, -7620, 1340)
"""Cubic of ``-2**-f``, lowest order first, 15 fractional bits; it ends above -1/2, so that ``t =
16`` rounds to 0."""
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


def round_shift(value: Any, bits: int) -> Any:
    """``value * 2**-bits`` rounded half up, for TE expressions and integers alike."""
    return (value + (1 << (bits - 1))) >> bits if bits else value


def q15(a: Any, b: Any) -> Any:
    """Product of two 15-bit fractions, ``(a*b + 2**14) >> 15``: ``vpmulhrsw`` on x86."""
    return round_shift(a * b, 15)


def masked(amount: Any, bits: int = 5) -> Any:
    """Return a shift amount with its upper bits cleared, which changes none that is in range.

    TVM's analysis bounds ``x >> n`` by the ends of what it knows of ``n``, also where those are
    negative, and then drops clamps that it takes for superfluous. So no variable amount goes bare.
    """
    return amount & ((1 << bits) - 1)


def cubic(coefficients: tuple[int, int, int, int], w: Any) -> Any:
    """Polynomial of a 15-bit fraction, coefficients lowest order first."""
    c0, c1, c2, c3 = coefficients
    return q15(w, q15(w, q15(w, c3) + c2) + c1) + c0


def quotient_design(scale: float) -> dict[str, int]:
    """Parameters of the shift family's ``q = d*log2e // one``: see the module's text.

    ``unit_mult`` brings ``2*one - rest`` to 15 fractional bits.
    """
    pre_shift = math.floor(math.log2(1023.0 * scale))
    one = max(1, math.floor(2.0**pre_shift / scale + 0.5))
    unit_mult = math.floor(2.0**29 / (2 * one) + 0.5)
    return {"pre_shift": pre_shift, "one": one, "reciprocal": 2**25 // one + 1,
            "unit_mult": unit_mult}


def exponential_design(
    method: str, scale: float, width: int
) -> tuple[dict[str, int], np.ndarray | None]:
    """Choose the integer parameters of ``e**(-scale*d)`` for ``0 <= d <= width < 2**16``.

    Returns
    -------
    dict
        Attributes: the parameters of the shift family, else empty.
    ndarray or None
        uint16 (diff_max, lift, mult) of the other families. Larger differences than diff_max are
        cut to it. They are an argument and no attributes so that layers share one kernel.
    """
    scale = min(scale, _COARSEST)
    if method == "shift":
        steps = max(1, math.ceil(CUTOFF / (_SHIFT_LOG2E * scale)))
        return {**quotient_design(scale), "diff_max": min(width, steps + 2)}, None
    slope = scale * _LOG2E * 2.0**T_BITS
    reach = min(math.ceil(2.0 ** (T_BITS + 4) / slope), 2**16 - 1)
    lift = (2**16 - 1) // reach
    mult = min(math.floor(slope * 2.0**16 / lift + 0.5), 2**16 - 1)
    return {}, np.array([min(width, reach), lift, mult], np.uint16)


def exponential_table() -> np.ndarray:
    """``2**-(i/256)`` with 15 fractional bits, at most ``TOP``: int16 [256]."""
    exact = np.floor(2.0 ** (15 - np.arange(256) / 256.0) + 0.5)
    # The last entry also stands for differences that are cut: it must round to 0 at q = 15.
    exact[-1] = 2**14 - 1
    return np.minimum(exact, TOP).astype(np.int16)


def te_quotient(d: Any, design: Mapping[str, int]) -> tuple[Any, Any]:
    """Quotient and remainder of ``d*log2e`` (by shifts) by ``one``."""
    one, pre_shift = design["one"], design["pre_shift"]
    scaled = d << pre_shift if pre_shift >= 0 else round_shift(d, -pre_shift)
    base2 = te.min(scaled + (scaled >> 1) - (scaled >> 4), CUTOFF * one)
    quotient = (base2 * design["reciprocal"]) >> 25
    return quotient, base2 - quotient * one


def te_exponential(
    method: str, d: Any, design: Mapping[str, int], scalars: te.Tensor | None,
    table: te.Tensor | None
) -> Any:
    """Build the int32 expression of the exponential of ``d`` (uint16)."""
    if method == "shift":
        quotient, rest = te_quotient(te.min(d.astype("int32"), design["diff_max"]), design)
        mantissa = te.min(round_shift((2 * design["one"] - rest) * design["unit_mult"], 14), TOP)
        return (((mantissa * 2) >> masked(quotient)) + 1) >> 1
    assert scalars is not None
    diff_max, lift, mult = (scalars(i) for i in range(3))
    product = (te.min(d, diff_max) * lift).astype("uint32") * mult.astype("uint32")
    t = te.min(product >> tirx.const(16, "uint32"), tirx.const(TOP, "uint32")).astype("int32")
    quotient, rest = t >> T_BITS, t & (2**T_BITS - 1)
    if method == "table":
        assert table is not None
        minus = 0 - table(rest >> (T_BITS - 8)).astype("int32")
    else:
        minus = cubic(MINUS_MANTISSA, rest << (15 - T_BITS))
    return q15(minus, tirx.const(-(2**15), "int32") >> masked(quotient, 4))


def exponential_bounds(
    method: str, width: int, design: Mapping[str, int], scalars: np.ndarray | None,
    table: np.ndarray | None
) -> list[Claim]:
    """Bounds of every intermediate of :func:`te_exponential` for differences up to ``width``."""
    claims = [Claim("difference", 0, width, "uint16")]
    if method == "shift":
        claims += quotient_bounds(min(width, design["diff_max"]), design)
        product = 2 * design["one"] * design["unit_mult"] + 2**13
        return [*claims, Claim("unit exponential", 0, product, "int32")]
    assert scalars is not None
    diff_max, lift, mult = (int(v) for v in scalars)
    lifted = min(width, diff_max) * lift
    claims += [
        Claim("lifted difference", 0, lifted, "uint16"),
        Claim("rescaled difference", 0, lifted * mult, "uint32"),
    ]
    if method == "table":
        assert table is not None
        minus = -table
    else:
        minus = cubic(MINUS_MANTISSA, np.arange(2**T_BITS, dtype=np.int64) << (15 - T_BITS))
    claims.append(Claim("mantissa", int(minus.min()), int(minus.max()), "int16"))
    return [*claims, Claim("exponential", 0, int(q15(minus.min(), -(2**15))), "int16")]


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
