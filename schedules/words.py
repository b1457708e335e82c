"""Operations on vectors of 16-bit words that have instructions of their own, by architecture.

==============  ==========================================  ====================  ==============
operation       meaning                                     x86                   AArch64
==============  ==========================================  ====================  ==============
rounded         ``(a*b + 2^14) >> 15``, not (-2^15)^2       ``vpmulhrsw``         ``sqrdmulh``
high            ``(a*b) >> 16`` of unsigned words           ``vpmulhuw``          by 32 bits
power           ``-2^15 >> q``, 0 <= q <= 15                ``vpsravw``, or both  ``sshl``
                                                            bytes by ``vpshufb``
pair_sums       ``a[2i]*b[2i] + a[2i+1]*b[2i+1]`` in int32  ``vpmaddwd``          none
==============  ==========================================  ====================  ==============
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .builder import const, vector_of, vector_type
from .isa import ISA

__all__ = ["Words", "words_for"]

# High byte of -2^15 >> q at q; low byte at q - 8, where negative indices give 0.
_POWER_BYTES = (-128, -64, -32, -16, -8, -4, -2, *[-1] * 9)


@dataclass(frozen=True)
class Words:
    """LLVM intrinsics for one vector width, "" where there is none."""

    width: int
    rounded_name: str = ""
    high_name: str = ""
    bytes_name: str = ""
    pairs_name: str = ""

    def rounded(self, a: Any, b: Any) -> Any:
        """Return ``(a*b + 2^14) >> 15`` of int16 vectors; needs ``rounded_name``."""
        return tirx.call_llvm_pure_intrin(vector_type("int16", self.width), self.rounded_name, a, b)

    def high(self, a: Any, b: Any) -> Any:
        """Return ``(a*b) >> 16`` of uint16 vectors."""
        word, wide = (vector_type(dtype, self.width) for dtype in ("uint16", "uint32"))
        if self.high_name:
            return tirx.call_llvm_pure_intrin(word, self.high_name, a, b)
        product = tirx.Cast(wide, a) * tirx.Cast(wide, b)
        return tirx.Cast(word, tirx.shift_right(product, const(16, wide)))

    def power(self, q: Any) -> Any:
        """Return ``-2^15 >> q`` of an int16 vector."""
        word = vector_type("int16", self.width)
        if not self.bytes_name:
            return tirx.shift_right(const(-(2**15), word), q)
        byte = vector_type("int8", 2 * self.width)
        index = tirx.reinterpret(byte, q * const(0x0101, word)) + tirx.reinterpret(
            byte, const(0x00F8, word))
        table = vector_of(_POWER_BYTES * (self.width // 8), "int8")
        return tirx.reinterpret(
            word, tirx.call_llvm_pure_intrin(byte, self.bytes_name, table, index))

    def pair_sums(self, a: Any, b: Any) -> Any:
        """Return the sums of neighbouring products, int32 x width/2; needs ``pairs_name``."""
        return tirx.call_llvm_pure_intrin(
            vector_type("int32", self.width // 2), self.pairs_name, a, b)


_X86 = (
    Words(8, "llvm.x86.ssse3.pmul.hr.sw.128", "llvm.x86.sse2.pmulhu.w",
          "llvm.x86.ssse3.pshuf.b.128", "llvm.x86.sse2.pmadd.wd"),
    Words(16, "llvm.x86.avx2.pmul.hr.sw", "llvm.x86.avx2.pmulhu.w", "llvm.x86.avx2.pshuf.b",
          "llvm.x86.avx2.pmadd.wd"),
    Words(32, "llvm.x86.avx512.pmul.hr.sw.512", "llvm.x86.avx512.pmulhu.w.512", "",
          "llvm.x86.avx512.pmaddw.d.512"),
)
_NEON = (Words(8, "llvm.aarch64.neon.sqrdmulh"),)


def words_for(isa: ISA, width: int) -> Words:
    """Return the word operations of an instruction set for vectors of ``width`` words."""
    if not isa.has_kernels:
        return Words(width)
    known = _NEON if "neon" in isa.features else _X86
    return next((words for words in known if words.width == width), Words(width))
