"""The dot sequences of x86 as TIR expressions, each with its meaning and the feature it needs.

A sequence adds to each 32-bit lane the dot product of ``kv`` activation codes (the same for every
lane: a broadcast) and ``kv`` weight codes (one group per lane). All but ``vpmaddubsw`` are exact
for any codes: products of int16 x int8 and uint8 x int8 fit what the instruction adds them in.
``vpmaddubsw`` adds pairs in (saturating) int16, and ``chain`` such sums are added in int16 before
they are widened: exact if ``a_max`` times the positive (and the negative) weights of a window stays
in int16, which ``schedules.packing`` proves from the actual weights.

=============  ========================================  ====================  ===============
name           instructions                              activations           feature
=============  ========================================  ====================  ===============
vpmaddubsw256  chain x vpmaddubsw, chain - 1 x vpaddw,   uint8, kv = 4         avx2
               vpmaddwd by 1, vpaddd
vpmaddubsw512  the same, 512 bits                        uint8, kv = 4         avx512bw
vpmaddwd256    vpmaddwd + vpaddd                         int16, kv = 2         avx2
vpmaddwd512    the same, 512 bits                        int16, kv = 2         avx512bw
vpdpwssd256    vpdpwssd                                  int16, kv = 2         avxvnni
vpdpwssd512    the same, 512 bits                        int16, kv = 2         avx512vnni
vpdpbusd256    vpdpbusd                                  uint8, kv = 4         avxvnni
vpdpbusd512    the same, 512 bits                        uint8, kv = 4         avx512vnni
=============  ========================================  ====================  ===============
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tvm import tirx

from .. import requant
from ..builder import const, vector_type
from ..dot import Dot

__all__ = ["DOTS", "X86Dot"]


@dataclass(frozen=True)
class X86Dot(Dot):
    """One dot sequence of x86.

    Parameters
    ----------
    fused
        Whether the instruction adds to the accumulator itself.
    widen
        LLVM's name of the instruction that turns pairs of int16 sums into int32, if there is one.
    """

    fused: bool = False
    widen: str = ""

    @property
    def arithmetic(self) -> ModuleType:
        """Even and odd lanes: ``vpmuldq``."""
        return requant

    def spread(self, word: Any) -> Any:
        """Return the codes of one group for every lane."""
        wide = vector_type(self.operand, self.lanes * self.kv)
        return tirx.reinterpret(wide, tirx.Broadcast(word, self.lanes))

    def step(self, acc: Any, groups: Sequence[Any], weights: Sequence[Any]) -> Any:
        """Return ``acc + sum_i groups[i] . weights[i]``."""
        out = vector_type("int32", self.lanes)
        pairs = vector_type("int16", self.lanes * 2)
        call = tirx.call_llvm_pure_intrin
        short = None
        for codes, columns in zip(groups, weights, strict=True):
            if self.fused:
                acc = call(out, self.intrinsic, acc, codes, columns)
            elif not self.widen:
                acc = acc + call(out, self.intrinsic, codes, columns)
            else:
                sums = call(pairs, self.intrinsic, codes, columns)
                short = sums if short is None else short + sums
        if short is not None:
            acc = acc + call(out, self.widen, short, const(1, pairs))
        return acc


DOTS = {
    dot.name: dot
    for dot in (
        X86Dot("vpmaddwd256", 8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd", "vpmaddwd"),
        X86Dot("vpmaddwd512", 16, 2, "int16", "int16", "llvm.x86.avx512.pmaddw.d.512", "vpmaddwd"),
        X86Dot("vpdpwssd256", 8, 2, "int16", "int16", "llvm.x86.avx512.vpdpwssd.256", "vpdpwssd",
               fused=True),
        X86Dot("vpdpwssd512", 16, 2, "int16", "int16", "llvm.x86.avx512.vpdpwssd.512", "vpdpwssd",
               fused=True),
        X86Dot("vpdpbusd256", 8, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.256", "vpdpbusd",
               fused=True),
        X86Dot("vpdpbusd512", 16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512", "vpdpbusd",
               fused=True),
        X86Dot("vpmaddubsw256", 8, 4, "uint8", "int8", "llvm.x86.avx2.pmadd.ub.sw", "vpmaddubsw",
               widen="llvm.x86.avx2.pmadd.wd"),
        X86Dot("vpmaddubsw512", 16, 4, "uint8", "int8", "llvm.x86.avx512.pmaddubs.w.512",
               "vpmaddubsw", widen="llvm.x86.avx512.pmaddw.d.512"),
    )
}
