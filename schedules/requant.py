"""Requantisation as vector code: bit-identical to ``(a*m + 2^(e-1)) >> e`` on int64.

The fast form of x86 is here, with what every architecture shares; ``schedules.arm.requant`` has the
same functions and :class:`Rescale` for AArch64.

For ``e >= 32`` the result is the high half of the 64-bit sum, shifted right by ``e - 32`` more:
``floor(x / 2^e) = floor(floor(x / 2^32) / 2^(e-32))``. So the products are made for even and odd
lanes (``vpmuldq``), the rounding constant is added in 64 bits, the two high halves are blended into
one vector of int32, and an ordinary 32-bit arithmetic shift finishes: no 64-bit arithmetic shift,
which AVX2 lacks. The result is below 2^30 in magnitude, so sums of two and a zero point fit int32.
A zero point can go into the rounding constant as ``zero_point * 2^e`` where that fits int64: one
addition less, and the clamp then ends in a saturating pack.

For smaller ``e`` a left shift of the operand that provably fits makes up the difference
(:func:`scalar_lift`), or the 64-bit form is used (:func:`requantize_wide`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import Writer, const, vector_type

__all__ = ["FOLDS_ZERO", "Rescale", "clamp", "requantize_wide", "scalar_lift", "scalar_rescale",
           "vector_rescale"]

FOLDS_ZERO = True
"""Whether the zero point can go into the rounding constants."""


@dataclass(frozen=True)
class Rescale:
    """Multiplier and shift of one vector of columns, laid out for :meth:`apply`.

    Parameters
    ----------
    even, odd
        int32 x lanes: multipliers whose even elements belong to even (odd) lanes; odd elements are
        ignored.
    round_even, round_odd
        int64 x lanes/2: the rounding constants ``2^(e-1)``, plus ``zero_point * 2^e`` if the zero
        point is folded in.
    shift
        int32 x lanes: e - 32.
    lift
        Left shift of the operand, already counted in e.
    """

    even: Any
    odd: Any
    round_even: Any
    round_odd: Any
    shift: Any
    lift: int = 0

    def apply(self, value: Any, lanes: int, writer: Writer) -> Any:
        """Return rq of an int32 vector, as an int32 vector."""
        full, half = vector_type("int32", lanes), vector_type("int64", lanes // 2)
        if self.lift:
            value = tirx.shift_left(value, const(self.lift, full))
        pairs = writer.bind("pairs", tirx.reinterpret(half, value))

        def product(factor: Any, part: Any, rounding: Any) -> Any:
            wide = _signed_low(tirx.reinterpret(half, factor), lanes)
            return tirx.reinterpret(full, _signed_low(part, lanes) * wide + rounding)

        even = product(self.even, pairs, self.round_even)
        odd = product(self.odd, _high(pairs, lanes), self.round_odd)
        picks = [i + 1 if i % 2 == 0 else lanes + i for i in range(lanes)]
        high = tirx.Shuffle([even, odd], [tirx.const(p, "int32") for p in picks])
        return tirx.shift_right(high, self.shift)


def _signed_low(pairs: Any, lanes: int) -> Any:
    """Sign-extend the low halves: with both factors so, LLVM multiplies with one vpmuldq."""
    by = const(32, vector_type("int64", lanes // 2))
    return tirx.shift_right(tirx.shift_left(pairs, by), by)


def _high(pairs: Any, lanes: int) -> Any:
    return tirx.shift_right(pairs, const(32, vector_type("int64", lanes // 2)))


def vector_rescale(
    mult: Any, shift: Any, lanes: int, lift: int = 0, zero_point: Any = 0
) -> dict[str, Any]:
    """Return the parts of a :class:`Rescale` for int32 vectors; ``shift + lift >= 32``.

    The zero point is a number, or an int32 expression. Keep the parts in memory and load them where
    they are used, in the block of the multiplication: see below.
    """
    shift = shift + const(lift, vector_type("int32", lanes))
    full, half = vector_type("int32", lanes), vector_type("int64", lanes // 2)
    # 2^(e-1) + zero_point * 2^e
    scale = const(2 * zero_point + 1, half) if isinstance(zero_point, int) else tirx.Broadcast(
        tirx.Cast("int64", zero_point) * 2 + 1, lanes // 2)
    bits = tirx.reinterpret(half, shift - const(1, full))
    return {
        "even": mult,
        # Not a 64-bit shift: LLVM would fold it with the sign extension of apply() into something
        # that it hoists out of the loop, and then no longer sees that vpmuldq is enough.
        "odd": tirx.Shuffle([mult], [tirx.const(i | 1, "int32") for i in range(lanes)]),
        "round_even": tirx.shift_left(scale, _signed_low(bits, lanes)),
        "round_odd": tirx.shift_left(scale, _high(bits, lanes)),
        "shift": shift - const(32, full),
    }


def scalar_lift(shift: int, operand_bits: int) -> int | None:
    """Return the left shift that brings ``shift`` to 32 or more, None if int32 has no room."""
    lift = max(0, 32 - shift)
    return lift if operand_bits + lift <= 32 else None


def scalar_rescale(mult: int, shift: int, lanes: int, lift: int, zero_point: int = 0) -> Rescale:
    """Return the rescale of one multiplier and shift for all lanes; ``shift + lift >= 32``."""
    full, half = vector_type("int32", lanes), vector_type("int64", lanes // 2)
    factor = const(mult, full)
    rounding = const((2 * zero_point + 1) << (shift + lift - 1), half)
    return Rescale(factor, factor, rounding, rounding, const(shift + lift - 32, full), lift)


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
