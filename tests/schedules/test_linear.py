"""The packed linear kernels equal int64 arithmetic; their inner loops are as intended."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.helpers.kernels import make_linear

TARGETS = ["x86-64-v3", "native"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(197, 192, 192), (1, 1000, 192), (49, 97, 48), (7, 33, 5),
                                   (13, 16, 1), (26, 65, 63)], ids=str)
@pytest.mark.parametrize("kind,out_dtype", [("acc", "int32"), ("requant", "int8"),
                                            ("requant_add", "int16")])
def test_equals_int64(target: str, shape: tuple[int, int, int], kind: str, out_dtype: str) -> None:
    kernel = make_linear(*shape, target, kind, out_dtype=out_dtype)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("out_dtype", ["int8", "uint8", "int16", "int32"])
def test_extreme_codes(target: str, dtype: str, out_dtype: str) -> None:
    kernel = make_linear(31, 50, 130, target, dtype=dtype, out_dtype=out_dtype, extreme=True)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shifts", [(28, 40), (20, 60), (50, 63)], ids=str)
@pytest.mark.parametrize("res_shift", [12, 31, 45])
def test_any_shift(target: str, shifts: tuple[int, int], res_shift: int) -> None:
    kernel = make_linear(12, 40, 64, target, "requant_add", out_dtype="int16", shifts=shifts,
                         res_shift=res_shift)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


def inner_loop(asm: str, mnemonic: str) -> list[str]:
    """Return the instructions of the basic block with the most uses of ``mnemonic``."""
    blocks = re.split(r"^\.?\w[\w.$]*:.*$|^\s+j\w+\s.*$", asm, flags=re.M)
    best = max(blocks, key=lambda block: len(re.findall(rf"\b{mnemonic}\b", block)))
    return [line.strip() for line in best.splitlines() if line.strip() and "\t." not in line]


@pytest.mark.parametrize("target,mnemonic,tile", [
    ("x86-64-v3", "vpmaddwd", 12), ("x86-64-v4", "vpmaddwd", 24), ("znver5", "vpdpbusd", 24)])
def test_inner_loop(target: str, mnemonic: str, tile: int) -> None:
    asm = make_linear(197, 192, 192, target).asm
    loop = inner_loop(asm, mnemonic)
    dots = [line for line in loop if line.startswith(mnemonic)]
    assert len(dots) >= tile - 2
    assert not [line for line in loop if "(%rsp)" in line or "(%rbp)" in line], "spill"
    assert len(loop) <= 3.1 * len(dots), loop


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "znver5"])
def test_no_float_arithmetic(target: str) -> None:
    asm = make_linear(20, 70, 63, target, "requant_add", out_dtype="int16").asm
    floating = re.findall(r"\bv?(?:add|sub|mul|div|fmadd\d+|max|min|cvt\w*)[ps][sd]\b", asm)
    assert not floating
