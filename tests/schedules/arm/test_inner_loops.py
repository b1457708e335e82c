"""What AArch64's kernels are made of: read from assembly, and simulated by llvm-mca."""

from __future__ import annotations

import re

import pytest

from benchmarks.mca import inner_loop, mca, measure, multiplies_of
from tests.helpers.kernels import linear_case, matmul_case
from tvm_vitq.artifact.disassemble import is_float_arithmetic


@pytest.mark.parametrize("target,dtype,mnemonic,tile", [
    ("aarch64", "int8", "smlal", 16), ("cortex-a53", "int8", "smlal", 16),
    ("aarch64", "int16", "smlal", 20),
    ("aarch64+dotprod", "int8", "sdot", 20), ("aarch64+dotprod", "int16", "sdot", 20),
    ("cortex-a76", "int8", "sdot", 20), ("neoverse-n2", "int8", "smmla", 20),
    ("aarch64+i8mm", "int8", "smmla", 20), ("aarch64+i8mm", "uint8", "usmmla", 20),
    ("aarch64+i8mm", "int16", "smmla", 20)])
def test_inner_loop(target: str, dtype: str, mnemonic: str, tile: int) -> None:
    """Multiplies by lane or by row pairs, accumulators in registers, little else."""
    case = linear_case(197, 192, 192, target, dtype=dtype)
    multiplies = multiplies_of(case.plan.dot)
    loop = inner_loop(case.build().asm, multiplies)
    count = sum(line.split()[0] in multiplies for line in loop)
    assert any(line.startswith(mnemonic) for line in loop)
    assert count >= tile
    spills = [line for line in loop if re.search(r"\[(sp|x29)", line)]
    assert not spills
    # Plain NEON also adds pairs (a half) and spreads activations (a quarter of an instruction).
    assert len(loop) <= (2.0 if case.plan.dot.name == "smlal8" else 1.6) * count, loop
    lanes = [line for line in loop if re.match(rf"{mnemonic}2?\s.*\[\d\]$", line)]
    if mnemonic == "sdot" or case.plan.dot.name == "smlal16":
        assert len(lanes) == count, "an activation is not multiplied by lane"


@pytest.mark.parametrize("target", ["aarch64", "aarch64+dotprod", "aarch64+i8mm"])
def test_no_float_arithmetic(target: str) -> None:
    cases = [linear_case(20, 70, 63, target, "requant_add", out_dtype="int16"),
             matmul_case((1, 21, 45, 77), target, True, ("uint8", "int8"))]
    for case in cases:
        words = re.findall(r"^\s+([a-z][\w.]*)\s", case.build().asm, flags=re.M)
        assert len(words) > 100
        assert not [word for word in words if is_float_arithmetic(word, "aarch64")]


@pytest.mark.skipif(not mca(), reason="no llvm-mca of LLVM 16 or newer (Debian: llvm-19)")
@pytest.mark.parametrize("cpu,dtype", [("cortex-a76", "int8"), ("neoverse-n2", "int8"),
                                       ("neoverse-n2", "int16"), ("cortex-a72", "int8")])
def test_multiply_issue_limit(cpu: str, dtype: str) -> None:
    assert measure(cpu, dtype, mca()).share >= 0.85
