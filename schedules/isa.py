"""Instruction sets: what a kernel has to know of the machine, and which target has what.

One :class:`ISA` is one description of hardware: vector width, number of vector registers, the dot
sequences that may be used, and with them the packed layout of weights. It is found by asking LLVM
for the target's *features* (never by the processor's name), so it works for cross targets too.

A dot sequence named here is described in its architecture's ``intrinsics.py``: it multiplies ``kv``
neighbouring channels of K for each 32-bit lane, so packed weights are ``[N/nt, K/kv, nt, kv]``.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass

import tvm
import tvm_ffi

from .cuda.target import ARCHITECTURES, is_cuda_name, resolve_cuda_target
from .host import host_architecture

__all__ = ["AVX2", "AVX512BW", "AVX512VNNI", "AVXVNNI", "CUDA", "DOTPROD", "GENERIC", "I8MM",
           "ISA", "NEON", "architecture_of", "cuda_isa", "isa_for", "resolve_target"]

TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
"""LLVM triples of the architectures that are compiled for."""

# LLVM's "generic" schedules for an in-order core, and then keeps too much in registers; without
# these three features a Cortex-A72 is plain Armv8.0.
_ARMV8 = {"mcpu": "cortex-a72", "mattr": ["+neon", "-aes", "-sha2", "-crc"]}
EXTENSIONS = {
    "": _ARMV8,
    "dotprod": {"mcpu": "generic", "mattr": ["+neon", "+dotprod"]},
    "i8mm": {"mcpu": "generic", "mattr": ["+neon", "+dotprod", "+i8mm"]},
}
"""What may follow ``aarch64+``, and LLVM's processor and features for it."""

ALIASES = {"apple-m1": "apple-a14", "apple-m2": "apple-a15", "apple-m3": "apple-a16",
           "cobalt-100": "neoverse-n2"}
"""Processor names that LLVM takes but does not list."""


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
    unsigned8
        Name of the dot sequence for uint8 activations, if it is another.
    any16
        Name of the sequence of two 16-bit operands, where ``dot16`` wants int8 for the second.
    """

    name: str
    features: tuple[str, ...]
    vector_bits: int
    registers: int
    dot8: str
    dot16: str
    proved8: str = ""
    unsigned8: str = ""
    any16: str = ""

    def dot(self, left: str, right: str = "int8") -> str:
        """Return the dot sequence for activations of dtype ``left``; "" if there is none.

        Parameters
        ----------
        left
            int8, uint8 or int16.
        right
            dtype of the other operand: int8 for weights, any of the three for activations.
        """
        if right != "int8" and self.any16:
            return self.any16
        if right == "uint8" and self.dot8 != self.dot16:
            return ""
        if "int16" in (left, right):
            return self.dot16
        return self.unsigned8 if left == "uint8" and self.unsigned8 else self.dot8

    @property
    def lanes(self) -> int:
        """Number of 32-bit lanes of a vector."""
        return self.vector_bits // 32

    @property
    def gpu(self) -> bool:
        """Whether it is that of an NVIDIA GPU."""
        return self.features == ("cuda",)

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
I8MM = ISA("i8mm", ("neon", "dotprod", "i8mm"), 128, 32, "smmla", "smmla16", unsigned8="usmmla",
           any16="smlal16")
DOTPROD = ISA("dotprod", ("neon", "dotprod"), 128, 32, "sdot", "sdot16", any16="smlal16")
NEON = ISA("neon", ("neon",), 128, 32, "smlal8", "smlal16", any16="smlal16")
GENERIC = ISA("generic", (), 128, 16, "", "")


def cuda_isa(arch: str) -> ISA:
    """Return the integer units of an NVIDIA GPU's architecture, such as ``"sm_80"``.

    What :data:`~schedules.cuda.target.ARCHITECTURES` does not list, later generations, is taken
    for ``"sm_80"``, whose kernels take no more shared memory than any of them has.

    Raises
    ------
    ValueError
        If it has no int8 tensor cores.
    """
    number = int(re.sub(r"\D", "", arch) or 0)
    if number < 75:
        raise ValueError(f"{arch} has no int8 tensor cores: they begin with sm_75")
    known = next((name for name in (arch, f"sm_{number}") if name in ARCHITECTURES), "sm_80")
    return ISA(known, ("cuda",), 256, 255, "mma8", "mma16")


CUDA = cuda_isa("sm_80")

_PREFERENCE = {"x86_64": (AVX512VNNI, AVX512BW, AVXVNNI, AVX2), "aarch64": (I8MM, DOTPROD, NEON)}


def architecture_of(target: tvm.target.Target) -> str:
    """Return the architecture of an LLVM target, for example ``"aarch64"``."""
    triple = str(target.attrs.get("mtriple", "") or "")
    return triple.partition("-")[0] or host_architecture()


def isa_for(target: tvm.target.Target) -> ISA:
    """Return the best instruction set that kernels exist for and ``target`` has."""
    if target.kind.name != "llvm":
        return cuda_isa(str(target.attrs["arch"])) if target.kind.name == "cuda" else GENERIC
    has_feature = tvm_ffi.get_global_func("target.target_has_feature")
    for isa in _PREFERENCE.get(architecture_of(target), ()):
        if all(has_feature(feature, target) for feature in isa.features):
            return isa
    return GENERIC


@functools.cache
def _known_cpus(architecture: str) -> frozenset[str]:
    if architecture not in TRIPLES:
        return frozenset()
    target = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLES[architecture]})
    names = tvm_ffi.get_global_func("target.llvm_get_cpu_archlist")(target)
    return frozenset(str(name) for name in names)


def resolve_target(name: str = "native", threads: int | None = None) -> tvm.target.Target:
    """Return the target called ``name``: an LLVM one, or a CUDA one.

    Parameters
    ----------
    name
        ``"native"`` (the processor that runs this); ``"aarch64"``, ``"aarch64+dotprod"`` or
        ``"aarch64+i8mm"``; or any processor name that LLVM knows, first for this machine's
        architecture, then for the others: ``"x86-64-v3"`` (AVX2), ``"x86-64-v4"`` (AVX-512),
        ``"znver3"``, ``"cortex-a76"``, ``"apple-m1"``, …; or a GPU's, ``"cuda"`` or ``"sm_75"`` to
        ``"sm_90a"`` (:func:`schedules.cuda.target.resolve_cuda_target`).
    threads
        Number of cores written into the target, by default this machine's.

    Raises
    ------
    ValueError
        LLVM does not know the name (one line that says which names are usual).
    """
    if is_cuda_name(name):
        return resolve_cuda_target(name)
    fields = {"kind": "llvm", "num-cores": threads or os.cpu_count() or 1}
    host = host_architecture()
    base, _, extension = name.partition("+")
    if name == "native":
        cpu = str(tvm_ffi.get_global_func("target.llvm_get_system_cpu")())
        return tvm.target.Target({**fields, "mcpu": cpu})
    if base == "aarch64" and extension in EXTENSIONS:
        return tvm.target.Target(
            {**fields, "mtriple": TRIPLES["aarch64"], **EXTENSIONS[extension]})
    cpu = ALIASES.get(name, name)
    if cpu in _known_cpus(host):
        return tvm.target.Target({**fields, "mcpu": cpu})
    for architecture, triple in TRIPLES.items():
        if cpu in _known_cpus(architecture):
            return tvm.target.Target({**fields, "mtriple": triple, "mcpu": cpu})
    raise ValueError(
        f"unknown target {name!r}: use native, x86-64-v3 (AVX2), x86-64-v4 (AVX-512), aarch64, "
        "aarch64+dotprod, aarch64+i8mm, a processor name that LLVM knows, for example znver3 or "
        "cortex-a76, or cuda, sm_75 … sm_90a for an NVIDIA GPU"
    )
