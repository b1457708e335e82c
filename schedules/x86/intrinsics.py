"""The dot sequences of x86 as TIR expressions, each with its meaning and the feature it needs.

A sequence adds to each 32-bit lane the dot product of ``kv`` activation codes (the same for every
lane: a broadcast) and ``kv`` weight codes (one group per lane). All are exact here: products of
int16 x int8 and uint8 x int8 pairs fit what the instruction adds them in.

=============  ========================================  ====================  ===============
name           instructions                              activations           feature
=============  ========================================  ====================  ===============
vpmaddwd256    vpmaddwd + vpaddd                         int16, kv = 2         avx2
vpmaddwd512    the same, 512 bits                        int16, kv = 2         avx512bw
vpdpwssd256    vpdpwssd                                  int16, kv = 2         avxvnni
vpdpwssd512    the same, 512 bits                        int16, kv = 2         avx512vnni
vpdpbusd256    vpdpbusd                                  uint8, kv = 4         avxvnni
vpdpbusd512    the same, 512 bits                        uint8, kv = 4         avx512vnni
=============  ========================================  ====================  ===============
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..builder import vector_type

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
    """

    name: str
    lanes: int
    kv: int
    operand: str
    weight: str
    intrinsic: str
    fused: bool
    mnemonic: str

    def step(self, acc: Any, group: Any, weights: Any) -> Any:
        """Return ``acc + group . weights``.

        Parameters
        ----------
        acc
            int32 x lanes.
        group
            ``kv`` activation codes reinterpreted as one int32.
        weights
            ``weight`` dtype x (lanes * kv).
        """
        wide = vector_type(self.operand, self.lanes * self.kv)
        out = vector_type("int32", self.lanes)
        codes = tirx.reinterpret(wide, tirx.Broadcast(group, self.lanes))
        if self.fused:
            return tirx.call_llvm_pure_intrin(out, self.intrinsic, acc, codes, weights)
        return acc + tirx.call_llvm_pure_intrin(out, self.intrinsic, codes, weights)


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
    )
}
