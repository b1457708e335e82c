"""The dot sequences of AArch64 as TIR expressions, each with its meaning and the feature it needs.

All are exact for any codes, given what is said of them here. Where x86 broadcasts every group from
memory, NEON multiplies by one lane of a register, so ``span`` groups of a row are loaded at once.

=========  ==============================================  ==================  ===================
name       instructions                                    activations         feature
=========  ==============================================  ==================  ===================
smlal8     smull and chain - 1 x smlal of bytes, sadalp    int8, kv = 2        neon
smlal16    smlal of 16-bit lanes                           int16, kv = 1       neon
sdot       sdot                                            int8, kv = 4        dotprod
sdot16     sdot of the high bytes, then of the low ones    int16, kv = 4       dotprod
smmla      smmla: 2 rows x 8 by 8 x 2 columns              int8, kv = 8        i8mm
usmmla     usmmla, the same                                uint8, kv = 8       i8mm
smmla16    smmla of the high bytes, usmmla of the low      int16, kv = 8       i8mm
=========  ==============================================  ==================  ===================

``smlal8`` adds ``chain`` products in an int16 lane before ``sadalp`` widens them pair by pair: one
always fits (128 * 128), more are proved from the weights by :func:`chains_of`. The two passes of
``sdot16`` and ``smmla16`` write a code as ``256*high + low``: the sum over high bytes is shifted
left by 8 before the low ones are added to it, all modulo 2^32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from tvm import tirx

from ..builder import vector_type
from ..dot import Dot
from . import requant

__all__ = ["CHAINS", "DOTS", "ArmDot", "chains_of"]

CHAINS = (1, 2, 4, 8)
"""Numbers of groups of K that ``smlal8`` adds in int16; each divides the span of a load."""


@dataclass(frozen=True)
class ArmDot(Dot):
    """One dot sequence of AArch64: operands are vectors of 16 bytes.

    Parameters
    ----------
    sizes
        Register tiles (vectors of four columns, rows), the best first.
    two_rows
        Whether a step takes two rows: ``smmla`` and its like.
    high, low
        Names of the sequences that take the high and the low bytes of 16-bit codes.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    two_rows: bool = False
    high: str = ""
    low: str = ""

    @property
    def arithmetic(self) -> ModuleType:
        """``smull`` and ``srshl``."""
        return requant

    @property
    def span(self) -> int:
        """Groups in 16 bytes."""
        return 16 * 8 // int(self.word.removeprefix("int"))

    @property
    def rows(self) -> int:
        """Rows of one step."""
        return 2 if self.two_rows else 1

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """See ``sizes``."""
        return self.sizes

    @property
    def halves(self) -> tuple[Dot, Dot] | None:
        """See ``high`` and ``low``."""
        return (DOTS[self.high], DOTS[self.low]) if self.high else None

    @property
    def _width(self) -> str:
        """Type of one operand register."""
        return vector_type(self.operand, self.lanes * self.kv)

    def spread(self, word: Any) -> Any:
        """Return the codes of one group for every lane."""
        return tirx.reinterpret(self._width, tirx.Broadcast(word, self.lanes))

    def lane(self, codes: Any, index: int) -> Any:
        """Return one group of a loaded vector for every lane: the by-element operand."""
        words = tirx.reinterpret(vector_type(self.word, self.span), codes)
        picks = [tirx.const(index, "int32")] * self.lanes
        return tirx.reinterpret(self._width, tirx.Shuffle([words], picks))

    def step(self, acc: Any, groups: Sequence[Any], weights: Sequence[Any]) -> Any:
        """Return ``acc + sum_i groups[i] . weights[i]``."""
        call = tirx.call_llvm_pure_intrin
        short = None
        for codes, columns in zip(groups, weights, strict=True):
            if self.name == "smlal8":
                products = call("int16x8", self.intrinsic, columns, codes)
                short = products if short is None else short + products
            elif self.name == "smlal16":
                acc = acc + call("int32x4", self.intrinsic, columns, codes)
            elif self.two_rows:
                acc = call("int32x4", self.intrinsic, acc, codes, columns)
            else:
                acc = call("int32x4", self.intrinsic, acc, columns, codes)
        if short is not None:
            acc = acc + call("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", short)
        return acc


_BY_LANE = ((4, 5), (2, 8))
_TWO_ROWS = ((2, 12), (4, 6))
_NEON = "llvm.aarch64.neon."

DOTS = {
    dot.name: dot
    for dot in (
        ArmDot("smlal8", 4, 2, "int8", "int8", f"{_NEON}smull.v8i16", "smlal",
               ((4, 3), (2, 5))),
        ArmDot("smlal16", 4, 1, "int16", "int16", f"{_NEON}smull.v4i32", "smlal",
               ((4, 5), (2, 8))),
        ArmDot("sdot", 4, 4, "int8", "int8", f"{_NEON}sdot.v4i32.v16i8", "sdot", _BY_LANE),
        ArmDot("sdot16", 4, 4, "int16", "int8", "", "sdot", _BY_LANE, high="sdot", low="sdot"),
        ArmDot("smmla", 4, 8, "int8", "int8", f"{_NEON}smmla.v4i32.v16i8", "smmla", _TWO_ROWS,
               two_rows=True),
        ArmDot("usmmla", 4, 8, "uint8", "int8", f"{_NEON}usmmla.v4i32.v16i8", "usmmla", _TWO_ROWS,
               two_rows=True),
        ArmDot("smmla16", 4, 8, "int16", "int8", "", "smmla", _TWO_ROWS, two_rows=True,
               high="smmla", low="usmmla"),
    )
}


def chains_of(packed: np.ndarray, low: int, high: int) -> list[int]:
    """Return for each column block how many products ``smlal8`` may add in int16, proved exact.

    Parameters
    ----------
    packed
        int8 [blocks, groups, nt, 2].
    low, high
        Interval of the activation codes, within int8.

    Returns
    -------
    list of int
        The largest of :data:`CHAINS` for which no lane of any window leaves int16.
    """
    ends = packed.astype(np.int64)[..., None] * np.array([low, high])
    most, least = np.maximum(ends.max(-1), 0), np.minimum(ends.min(-1), 0)
    result = []
    for block in range(len(packed)):
        found = 1
        for chain in CHAINS:
            starts = np.arange(0, packed.shape[1], chain)
            above = np.add.reduceat(most[block], starts, axis=0).max(initial=0)
            below = np.add.reduceat(least[block], starts, axis=0).min(initial=0)
            if above <= 2**15 - 1 and below >= -(2**15):
                found = chain
        result.append(found)
    return result
