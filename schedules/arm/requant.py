"""Requantisation on AArch64: bit-identical to ``(a*m + 2^(e-1)) >> e`` on int64.

NEON has the whole formula: ``smull`` and ``smull2`` make the 64-bit products, ``srshl`` by ``-e``
is a rounding shift right by ``e``, its sum taken without overflow. So nothing need be lifted to
``e >= 32``, there are no rounding constants, and a zero point is added afterwards. Results below
2^31 in magnitude (what ``Epilogue.narrow`` states) are narrowed by dropping the upper halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..builder import Writer, const, vector_type

__all__ = ["FOLDS_ZERO", "Rescale", "scalar_rescale", "vector_rescale"]

FOLDS_ZERO = False
_PRODUCT, _SHIFT = "llvm.aarch64.neon.smull.v2i64", "llvm.aarch64.neon.srshl.v2i64"


@dataclass(frozen=True)
class Rescale:
    """Multiplier and shift of one vector of four columns.

    Parameters
    ----------
    mult
        int32 x 4.
    low, high
        int64 x 2: minus the shifts of columns 0 and 1, of 2 and 3.
    lift
        Not used: here shifts below 32 need none.
    """

    mult: Any
    low: Any
    high: Any
    lift: int = 0

    def apply(self, value: Any, lanes: int, writer: Writer) -> Any:
        """Return rq of an int32 vector, as an int32 vector."""
        assert lanes == 4
        value, mult = writer.bind("value", value), writer.bind("mult", self.mult)
        parts = []
        for part, by in enumerate((self.low, self.high)):
            product = tirx.call_llvm_pure_intrin(
                "int64x2", _PRODUCT, _half(value, part), _half(mult, part))
            shifted = tirx.call_llvm_pure_intrin("int64x2", _SHIFT, product, by)
            parts.append(writer.bind("part", tirx.reinterpret("int32x4", shifted)))
        return tirx.Shuffle(parts, [tirx.const(i, "int32") for i in (0, 2, 4, 6)])


def _half(value: Any, part: int) -> Any:
    return tirx.Shuffle([value], [tirx.const(2 * part + i, "int32") for i in range(2)])


def vector_rescale(
    mult: Any, shift: Any, lanes: int, lift: int = 0, zero_point: Any = 0
) -> dict[str, Any]:
    """Return the parts of a :class:`Rescale` for int32 vectors of multipliers and shifts."""
    assert lanes == 4 and isinstance(zero_point, int) and zero_point == 0
    minus = const(0, "int32x4") - shift
    low, high = (tirx.Cast("int64x2", _half(minus, part)) for part in (0, 1))
    return {"mult": mult, "low": low, "high": high}


def scalar_rescale(mult: int, shift: int, lanes: int, lift: int, zero_point: int = 0) -> Rescale:
    """Return the rescale of one multiplier and shift for all lanes."""
    assert zero_point == 0
    by = const(-shift, "int64x2")
    return Rescale(const(mult, vector_type("int32", lanes)), by, by)
