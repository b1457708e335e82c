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
from typing import Any

from tvm import tirx

from ..builder import const, vector_type

__all__ = ["DOTS", "Dot"]


@dataclass(frozen=True)
class Dot:
    """One dot sequence.

    Parameters
    ----------
    name
        Key in :data:`DOTS`.
    lanes
        32-bit lanes of the accumulator.
    kv
        Channels of K that one step takes.
    operand
        dtype that activations have in memory: ``"int16"`` or ``"uint8"``.
    weight
        dtype that weights have in registers: ``"int16"`` or ``"int8"``; int8 in memory either way.
    intrinsic
        LLVM's name of the multiplying instruction.
    fused
        Whether the instruction adds to the accumulator itself.
    mnemonic
        What a disassembly shows.
    widen
        LLVM's name of the instruction that turns pairs of int16 sums into int32, if there is one.
    """

    name: str
    lanes: int
    kv: int
    operand: str
    weight: str
    intrinsic: str
    fused: bool
    mnemonic: str

    widen: str = ""

    def step(self, acc: Any, groups: Sequence[Any], weights: Sequence[Any]) -> Any:
        """Return ``acc + sum_i groups[i] . weights[i]``.

        Parameters
        ----------
        acc
            int32 x lanes.
        groups
            Each ``kv`` activation codes reinterpreted as one int32.
        weights
            Each ``weight`` dtype x (lanes * kv).
        """
        wide = vector_type(self.operand, self.lanes * self.kv)
        out = vector_type("int32", self.lanes)
        pairs = vector_type("int16", self.lanes * 2)
        call = tirx.call_llvm_pure_intrin
        short = None
        for group, columns in zip(groups, weights, strict=True):
            codes = tirx.reinterpret(wide, tirx.Broadcast(group, self.lanes))
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
        Dot("vpmaddwd256", 8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd", False, "vpmaddwd"),
        Dot("vpmaddwd512", 16, 2, "int16", "int16", "llvm.x86.avx512.pmaddw.d.512", False,
            "vpmaddwd"),
        Dot("vpdpwssd256", 8, 2, "int16", "int16", "llvm.x86.avx512.vpdpwssd.256", True,
            "vpdpwssd"),
        Dot("vpdpwssd512", 16, 2, "int16", "int16", "llvm.x86.avx512.vpdpwssd.512", True,
            "vpdpwssd"),
        Dot("vpdpbusd256", 8, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.256", True,
            "vpdpbusd"),
        Dot("vpdpbusd512", 16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512", True,
            "vpdpbusd"),
        Dot("vpmaddubsw256", 8, 4, "uint8", "int8", "llvm.x86.avx2.pmadd.ub.sw", False,
            "vpmaddubsw", "llvm.x86.avx2.pmadd.wd"),
        Dot("vpmaddubsw512", 16, 4, "uint8", "int8", "llvm.x86.avx512.pmaddubs.w.512", False,
            "vpmaddubsw", "llvm.x86.avx512.pmaddw.d.512"),
    )
}
