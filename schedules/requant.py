"""Requantisation as vector code: bit-identical to ``(a*m + 2^(e-1)) >> e`` on int64.

For ``e >= 32`` the result is the high half of the 64-bit sum, shifted right by ``e - 32`` more:
``floor(x / 2^e) = floor(floor(x / 2^32) / 2^(e-32))``. So the products are made for even and odd
lanes (``vpmuldq``), the rounding constant is added in 64 bits, the two high halves are blended into
one vector of int32, and an ordinary 32-bit arithmetic shift finishes: no 64-bit arithmetic shift,
which AVX2 lacks. The result is below 2^30 in magnitude, so sums of two and a zero point fit int32.

For smaller ``e`` a left shift of the operand that provably fits makes up the difference
(:func:`scalar_lift`), or the 64-bit form is used (:func:`requantize_wide`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import Writer, const, vector_type

__all__ = ["Rescale", "clamp", "requantize", "requantize_wide", "scalar_lift", "scalar_rescale",
           "vector_rescale"]


@dataclass(frozen=True)
class Rescale:
    """Multiplier and shift of one vector of columns, laid out for :func:`requantize`.

    ``even``/``odd`` are the multipliers of even and odd lanes as int64, ``round_even`` and
    ``round_odd`` the rounding constants, ``shift`` is e - 32 for every lane, ``lift`` a left shift
    of the operand.
    """

    even: Any
    odd: Any
    round_even: Any
    round_odd: Any
    shift: Any
    lift: int = 0


def _low_half(pairs: Any, lanes: int) -> Any:
    by = const(32, vector_type("int64", lanes // 2))
    return tirx.shift_right(tirx.shift_left(pairs, by), by)


def _high_half(pairs: Any, lanes: int) -> Any:
    return tirx.shift_right(pairs, const(32, vector_type("int64", lanes // 2)))


def vector_rescale(mult: Any, shift: Any, lanes: int) -> dict[str, Any]:
    """Return the parts of a :class:`Rescale` for int32 vectors of multipliers and shifts >= 32."""
    half = vector_type("int64", lanes // 2)
    pairs = tirx.reinterpret(half, mult)
    bits = tirx.reinterpret(half, shift - const(1, vector_type("int32", lanes)))
    one = const(1, half)
    return {
        "even": _low_half(pairs, lanes),
        "odd": _high_half(pairs, lanes),
        "round_even": tirx.shift_left(one, _low_half(bits, lanes)),
        "round_odd": tirx.shift_left(one, _high_half(bits, lanes)),
        "shift": shift - const(32, vector_type("int32", lanes)),
    }


def scalar_lift(shift: int, operand_bits: int) -> int | None:
    """Return the left shift that brings ``shift`` to 32 or more, None if int32 has no room."""
    lift = max(0, 32 - shift)
    return lift if operand_bits + lift <= 32 else None


def scalar_rescale(mult: int, shift: int, lanes: int, operand_bits: int) -> Rescale:
    """Return the rescale of one multiplier and shift for all lanes.

    Raises
    ------
    ValueError
        The operand is too wide for the left shift that a small ``shift`` wants.
    """
    lift = scalar_lift(shift, operand_bits)
    if lift is None:
        raise ValueError(f"requantize: shift {shift} wants more than int{operand_bits} leaves")
    half = vector_type("int64", lanes // 2)
    rounding = const(1 << (shift + lift - 1), half)
    return Rescale(const(mult, half), const(mult, half), rounding, rounding,
                   const(shift + lift - 32, vector_type("int32", lanes)), lift)


def requantize(value: Any, by: Rescale, lanes: int, writer: Writer) -> Any:
    """Return rq of an int32 vector, as an int32 vector."""
    full = vector_type("int32", lanes)
    half = vector_type("int64", lanes // 2)
    if by.lift:
        value = tirx.shift_left(value, const(by.lift, full))
    pairs = writer.bind("pairs", tirx.reinterpret(half, value))
    even = _low_half(pairs, lanes) * by.even + by.round_even
    odd = _high_half(pairs, lanes) * by.odd + by.round_odd
    picks = [i + 1 if i % 2 == 0 else lanes + i for i in range(lanes)]
    high = tirx.Shuffle(
        [tirx.reinterpret(full, even), tirx.reinterpret(full, odd)],
        [tirx.const(p, "int32") for p in picks],
    )
    return tirx.shift_right(high, by.shift)


def requantize_wide(value: Any, mult: Any, shift: Any, lanes: int) -> Any:
    """Return rq as an int64 vector, for any shift; slow where 64-bit shifts are."""
    wide = vector_type("int64", lanes)
    bits = tirx.Cast(wide, shift)
    one = const(1, wide)
    product = tirx.Cast(wide, value) * tirx.Cast(wide, mult)
    return tirx.shift_right(product + tirx.shift_left(one, bits - one), bits)


def clamp(value: Any, low: int, high: int, dtype: str) -> Any:
    """Return ``value`` (of vector dtype ``dtype``) limited to [low, high]."""
    return tirx.max(tirx.min(value, const(high, dtype)), const(low, dtype))
