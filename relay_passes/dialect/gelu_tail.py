"""The curved part of GELU, ``tail(u) = u * Phi(-u)`` for ``u >= 0``, as integers (see ``gelu``).

Every form maps ``|t|`` (int32, below 2**17) to an integer ``H`` in [0, 2**15) whose real value is
``H * TAIL_UNIT[form]``. Arguments past the end of the curved part (4.5 standard deviations, 7.4 for
``shift``) are cut to it, where the tail is below 2e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from relay_passes.dialect.exponent import (
    CUTOFF,
    cubic,
    masked,
    q15,
    quotient_bounds,
    quotient_design,
    round_shift,
    te_quotient,
)
from relay_passes.dialect.registry import Claim

__all__ = ["ROOT", "TAIL_UNIT", "exact_gelu", "tail_bounds", "tail_design", "te_tail"]

END = 4.5
ROOT = (32740, -13934, -29350, 17417)
"""Cubic of ``(2*Phi(-4.5 w))**(1/8)`` on [0, 1], lowest order first, 15 fractional bits."""
PIECES, PIECE_BITS = 256, 7
_TABLE_UNIT = 2.0**-17
_UNIT_BITS = 15
_SHIFT_END = 7.5


def exact_gelu(value: np.ndarray) -> np.ndarray:
    """``x * Phi(x)`` in float64."""
    return value * 0.5 * np.vectorize(math.erfc, otypes=[float])(-value / math.sqrt(2.0))


def _exact_tail(u: np.ndarray) -> np.ndarray:
    return -exact_gelu(-u)


TAIL_UNIT: dict[str, Callable[[float, Mapping[str, int]], float]] = {
    "direct": lambda _scale, _design: _TABLE_UNIT,
    "interpolate": lambda _scale, _design: _TABLE_UNIT,
    "poly": lambda _scale, _design: END * 2.0**-18,
    "shift": lambda scale, design: scale * 2.0 ** -(design["pre_shift"] + 7),
}
"""Real value of one step of ``H``, from (in_scale, design)."""


def tail_design(
    method: str, in_scale: float, furthest: int
) -> tuple[str, dict[str, int], list[np.ndarray]]:
    """Choose (form, attributes, constants) for ``0 <= |t| <= furthest``.

    The constants are int32 [...] tables and, before them, uint16 (tail_end, lift, mult) of the
    forms that rescale ``|t|`` to ``w``, arguments so that layers share one kernel.
    """
    if method == "table" and furthest <= 512:
        entries = _exact_tail(np.arange(furthest + 1) * in_scale) / _TABLE_UNIT
        return "direct", {}, [np.floor(entries + 0.5).astype(np.int32)]
    if method == "shift":
        design = quotient_design(min(in_scale, _SHIFT_END))
        design["tail_end"] = min(furthest, math.ceil(_SHIFT_END / in_scale))
        return "shift", design, []
    reach = min(max(math.ceil(END / in_scale), 1), 2**16 - 1)
    lift = (2**16 - 1) // reach
    mult = math.floor(min(in_scale / END, 1.0) * 2.0 ** (_UNIT_BITS + 16) / lift + 0.5)
    scalars = np.array([min(furthest, reach), lift, min(mult, 2**16 - 1)], np.uint16)
    if method == "poly":
        return "poly", {}, [scalars]
    # One entry past the end, so that the last piece has a right neighbour.
    entries = _exact_tail(np.arange(PIECES + 1) * (END / PIECES)) / _TABLE_UNIT
    return "interpolate", {}, [scalars, np.floor(entries + 0.5).astype(np.int32)]


def _power4(w: Any) -> Any:
    root = cubic(ROOT, w)
    square = q15(root, root)
    return q15(square, square)


def te_tail(form: str, u: Any, design: Mapping[str, int], constants: Sequence[te.Tensor]) -> Any:
    """Build the int32 expression of ``H`` of ``u = |t|``."""
    if form == "direct":
        return constants[0](u)
    if form == "shift":
        return _shift_tail(te.min(u, design["tail_end"]), design)
    tail_end, lift, mult = (constants[0](i) for i in range(3))
    cut = te.min(u, tail_end.astype("int32")).astype("uint16")
    product = (cut * lift).astype("uint32") * mult.astype("uint32")
    last = tirx.const(2**_UNIT_BITS - 1, "uint32")
    w = te.min(product >> tirx.const(16, "uint32"), last).astype("int32")
    if form == "poly":
        power4 = _power4(w)
        return q15(q15(w, power4) << 2, power4)
    piece, rest = w >> PIECE_BITS, w & ((1 << PIECE_BITS) - 1)
    left, right = constants[1](piece), constants[1](piece + 1)
    return left + round_shift((right - left) * rest, PIECE_BITS)


def _shift_tail(u: Any, design: Mapping[str, int]) -> Any:
    pre_shift, one = design["pre_shift"], design["one"]
    scaled = u << pre_shift if pre_shift >= 0 else round_shift(u, -pre_shift)
    argument = scaled + (scaled >> 1) + (scaled >> 3) + (scaled >> 4)
    quotient, rest = te_quotient(argument, {**_quotient(design), "pre_shift": 0})
    # 2**-f ~ 1 - f/2 with 15 fractional bits, then down by the integer part.
    z = round_shift((2 * one - rest) * design["unit_mult"], 14) >> masked(quotient)
    bend = 28672 - ((z >> 2) + (z >> 3))
    sigmoid = (z * (32768 - ((z * bend) >> 15))) >> 15
    return (scaled * sigmoid) >> 8


def _quotient(design: Mapping[str, int]) -> dict[str, int]:
    return {key: design[key] for key in ("one", "reciprocal", "pre_shift")}


def tail_bounds(
    form: str, furthest: int, design: Mapping[str, int], constants: Sequence[np.ndarray]
) -> tuple[int, list[Claim]]:
    """Return (largest H, claims) for ``0 <= |t| <= furthest``."""
    if form == "direct":
        table = constants[0]
        # The index must stay inside the table: its distance to the end is not negative.
        return int(table.max()), [
            Claim("entries past the index", table.size - 1 - furthest, table.size, "uint32")
        ]
    if form == "shift":
        return _shift_bounds(min(furthest, design["tail_end"]), design)
    tail_end, lift, mult = (int(v) for v in constants[0])
    lifted = min(furthest, tail_end) * lift
    claims = [Claim("lifted argument", 0, lifted, "uint16"),
              Claim("rescaled argument", 0, lifted * mult, "uint32")]
    if form == "interpolate":
        table = constants[1]
        steps = np.diff(table) * ((1 << PIECE_BITS) - 1)
        claims.append(Claim("interpolation", int(steps.min()), int(steps.max()), "int32"))
        return int(table.max()), claims
    # The argument has 15 bits: the bounds are those of all its values.
    w = np.arange(1 << _UNIT_BITS, dtype=np.int64)
    root, power4 = cubic(ROOT, w), _power4(w)
    part = q15(w, power4) << 2
    for name, value in (("root", root), ("tail, first factor", part)):
        claims.append(Claim(name, int(value.min()), int(value.max()), "int16"))
    return int(q15(part, power4).max()), claims


def _shift_bounds(end: int, design: Mapping[str, int]) -> tuple[int, list[Claim]]:
    pre_shift, one = design["pre_shift"], design["one"]
    scaled = end << pre_shift if pre_shift >= 0 else round_shift(end, -pre_shift)
    claims = [Claim("shifted argument", 0, scaled, "int32")]
    claims += quotient_bounds(2 * scaled, {**_quotient(design), "pre_shift": 0})
    claims.append(Claim("unit exponential", 0, 2 * one * design["unit_mult"] + 2**13, "int32"))
    # Every argument is tried: at most a few thousand after the shift.
    u = np.arange(end + 1, dtype=np.int64)
    v = u << pre_shift if pre_shift >= 0 else round_shift(u, -pre_shift)
    v = np.unique(v)
    a = v + (v >> 1) + (v >> 3) + (v >> 4)
    base2 = np.minimum(a + (a >> 1) - (a >> 4), CUTOFF * one)
    z = round_shift((2 * one - base2 % one) * design["unit_mult"], 14) >> (base2 // one)
    bend = 28672 - ((z >> 2) + (z >> 3))
    sigmoid = (z * (32768 - ((z * bend) >> 15))) >> 15
    claims.append(Claim("bend", int((z * bend).min()), int((z * bend).max()), "int32"))
    claims.append(Claim("sigmoid", int(sigmoid.min()), int(sigmoid.max()), "int16"))
    tail = v * sigmoid
    claims.append(Claim("tail", int(tail.min()), int(tail.max()), "int32"))
    return int((tail >> 8).max()), claims
