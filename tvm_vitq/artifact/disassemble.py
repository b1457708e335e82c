"""Proof from the machine code: which kernels of an artefact hold floating-point arithmetic.

``objdump -d`` lists every function; instructions that add, multiply, divide, compare, round or
convert floating-point values are counted, those that only move, shuffle, mask or load bits (which
integer code uses too) are not; nor is AArch64's ``fneg``, which flips a bit: LLVM makes integer
constants with it. TVM names a kernel's code ``<kernel>_compute_``; the body of a
parallel loop follows it without a symbol of its own, so objdump counts it to the same name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relay_passes.errors import VitqError

from .elf import host_machine, read_elf

__all__ = ["BOUNDARY_KERNELS", "FloatCensus", "count_float_instructions", "is_float_arithmetic"]

BOUNDARY_KERNELS = ("vitq_quantize", "vitq_dequantize")
"""The kernels that may hold floating-point arithmetic: the input and the output boundary."""

_X86 = re.compile(
    r"^v?(?:(?:add|sub|mul|div|sqrt|min|max|round|rcp|rsqrt|rcp14|rsqrt14|rcp28|rsqrt28|addsub|hadd"
    r"|hsub|dp|dpbf16|exp2|scalef|getexp|getmant|range|reduce|rndscale|fixupimm|cmp[a-z_]*"
    r"|fn?m(?:add|sub|addsub|subadd)(?:132|213|231)?|fc?maddc?|fc?mulc?)(?:ss|sd|ps|pd|sh|ph)"
    r"|u?comi(?:ss|sd|sh)|cvt[a-z0-9]+|f[a-z0-9]+)$"
)
_X86_NOT = re.compile(r"^(?:fs|fxsave\w*|fxrstor\w*|fnop|fwait|femms)$")
_ARM = re.compile(r"^(?:f(?!mov|csel|dup|neg)[a-z0-9]+|[su]cvtf|bf(?!c$|i$|m$|xil$)[a-z0-9]+)$")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\s+(?:(?:lock|rep\w*|notrack|data16|cs|ds|bnd) )*(\S+)")
_KERNEL = re.compile(r"^(?:__tvm_ffi_)?(.+?)(?:_compute_)?(?:@plt.*)?$")
_BOUNDARY = re.compile(rf"^(?:{'|'.join(BOUNDARY_KERNELS)})_?\d*$")


@dataclass(frozen=True)
class FloatCensus:
    """Floating-point arithmetic instructions of a library, by function.

    Attributes
    ----------
    boundary
        Counts by mnemonic in the named boundary kernels: ``{kernel: {mnemonic: count}}``.
    elsewhere
        The same for every other function; empty for an integer-only artefact.
    instructions
        Number of instructions looked at.
    """

    boundary: dict[str, dict[str, int]]
    elsewhere: dict[str, dict[str, int]]
    instructions: int

    @property
    def total(self) -> int:
        """Floating-point arithmetic instructions outside the boundary kernels."""
        return sum(sum(count.values()) for count in self.elsewhere.values())


def is_float_arithmetic(mnemonic: str, machine: str = "x86_64") -> bool:
    """Whether an instruction computes, compares, rounds or converts floating-point values."""
    if machine == "aarch64":
        return bool(_ARM.match(mnemonic))
    return bool(_X86.match(mnemonic)) and not _X86_NOT.match(mnemonic)


def _census(lines: Iterable[str], machine: str) -> tuple[FloatCensus, set[str]]:
    counts: dict[str, Counter[str]] = {}
    names: set[str] = set()
    total, current = 0, ""
    for line in lines:
        if match := _FUNCTION.match(line):
            names.add(match[1])
            kernel = _KERNEL.match(match[1])
            current = kernel[1] if kernel else match[1]
        elif match := _INSTRUCTION.match(line):
            total += 1
            if is_float_arithmetic(match[1], machine):
                counts.setdefault(current, Counter())[match[1]] += 1
    inside = {k: dict(v) for k, v in counts.items() if _BOUNDARY.match(k)}
    outside = {k: dict(v) for k, v in counts.items() if not _BOUNDARY.match(k)}
    return FloatCensus(inside, outside, total), names


def count_float_instructions(path: str | Path) -> FloatCensus:
    """Disassemble an artefact and count the floating-point arithmetic of each function.

    Parameters
    ----------
    path
        An artefact for x86-64 or AArch64.

    Raises
    ------
    VitqError
        If there is no disassembler for the artefact's machine, or its kernel names were stripped.
    """
    machine = read_elf(path).machine
    cross = [] if machine == host_machine() else [f"{machine}-linux-gnu-objdump"]
    tools = (*cross, "objdump", "llvm-objdump") if not cross else (*cross, "llvm-objdump")
    tool = next((t for t in tools if shutil.which(t)), None)
    if tool is None:
        raise VitqError(f"no disassembler for {machine}; install binutils ({tools[0]})")
    done = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise VitqError(f"{tool} cannot disassemble {path}: {last}")
    census, names = _census(done.stdout.splitlines(), machine)
    if not any(name.endswith("_compute_") for name in names):
        raise VitqError(f"{path} was stripped of its kernel names, so its code proves nothing")
    return census
