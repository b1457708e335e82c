"""Instruction sets: what a kernel has to know of the machine, and which target has what.

One :class:`ISA` is one description of hardware: vector width, number of vector registers, the dot
sequences that may be used, and with them the packed layout of weights. It is found by asking LLVM
for the target's *features* (never by the processor's name), so it works for cross targets too.

A dot sequence named here is described in ``schedules.x86.intrinsics``: it multiplies ``kv``
neighbouring channels of K for each 32-bit lane, so packed weights are ``[N/nt, K/kv, nt, kv]``.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import tvm
import tvm_ffi

__all__ = ["AVX2", "AVX512BW", "AVX512VNNI", "AVXVNNI", "GENERIC", "ISA", "isa_for",
           "resolve_target"]


@dataclass(frozen=True)
class ISA:
    """One instruction set.

    Parameters
    ----------
    name
        Short name, used in records and reports.
    features
        LLVM features that a target must have.
    vector_bits
        Width of the vectors that kernels use.
    registers
        Number of architectural vector registers.
    dot8
        Name of the dot sequence for 8-bit activations, "" if there is none.
    dot16
        Name of the dot sequence for 16-bit activations, "" if there is none.
    proved8
        Name of a faster sequence for 8-bit activations that is exact only for some weights.
    """

    name: str
    features: tuple[str, ...]
    vector_bits: int
    registers: int
    dot8: str
    dot16: str
    proved8: str = ""

    @property
    def lanes(self) -> int:
        """Number of 32-bit lanes of a vector."""
        return self.vector_bits // 32

    @property
    def has_kernels(self) -> bool:
        """Whether there are hand-made matmul kernels for this instruction set."""
        return bool(self.dot16)


AVX512VNNI = ISA("avx512vnni", ("avx512f", "avx512bw", "avx512vl", "avx512vnni"), 512, 32,
                 "vpdpbusd512", "vpdpwssd512")
AVX512BW = ISA("avx512bw", ("avx512f", "avx512bw", "avx512vl"), 512, 32,
               "vpmaddwd512", "vpmaddwd512", "vpmaddubsw512")
AVXVNNI = ISA("avxvnni", ("avx2", "avxvnni"), 256, 16, "vpdpbusd256", "vpdpwssd256")
AVX2 = ISA("avx2", ("avx2",), 256, 16, "vpmaddwd256", "vpmaddwd256", "vpmaddubsw256")
GENERIC = ISA("generic", (), 128, 16, "", "")

_PREFERENCE = (AVX512VNNI, AVX512BW, AVXVNNI, AVX2)


def isa_for(target: tvm.target.Target) -> ISA:
    """Return the best instruction set that kernels exist for and ``target`` has."""
    if target.kind.name != "llvm":
        return GENERIC
    has_feature = tvm_ffi.get_global_func("target.target_has_feature")
    for isa in _PREFERENCE:
        if all(has_feature(feature, target) for feature in isa.features):
            return isa
    return GENERIC


@functools.lru_cache(maxsize=1)
def _known_cpus() -> frozenset[str]:
    names = tvm_ffi.get_global_func("target.llvm_get_cpu_archlist")(
        tvm.target.Target({"kind": "llvm"})
    )
    return frozenset(str(name) for name in names)


def resolve_target(name: str = "native", threads: int | None = None) -> tvm.target.Target:
    """Return the LLVM target called ``name``.

    Parameters
    ----------
    name
        ``"native"`` (the processor that runs this), or any processor name that LLVM knows for this
        machine's architecture: ``"x86-64-v3"`` (AVX2), ``"x86-64-v4"`` (AVX-512), ``"znver3"``, …
    threads
        Number of cores written into the target, by default this machine's.

    Raises
    ------
    ValueError
        LLVM does not know the name (one line that says which names are usual).
    """
    cpu = name
    if name == "native":
        cpu = str(tvm_ffi.get_global_func("target.llvm_get_system_cpu")())
    if cpu not in _known_cpus():
        raise ValueError(
            f"unknown target {name!r}: use native, x86-64-v3 (AVX2), x86-64-v4 (AVX-512) or a "
            "processor name that LLVM knows, for example znver3 or icelake-server"
        )
    cores = threads or os.cpu_count() or 1
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": cores})
