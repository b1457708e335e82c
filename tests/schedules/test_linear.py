"""The packed linear kernels equal int64 arithmetic; their inner loops are as intended."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.isa import isa_for, resolve_target
from schedules.packing import CHAINS, chains_of
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("kind,gather", [("acc", "x"), ("requant", "x"), ("requant_add", "x"),
                                         ("requant_add", "residual"), ("requant_add", "both")])
def test_rows_of_a_table(target: str, dtype: str, kind: str, gather: str) -> None:
    kernel = make_linear(29, 50, 131, target, kind, dtype, "int16", extreme=True, gather=gather)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("depth,pieces", [(12, 6), (48, 12), (96, 2), (147, 21)])
def test_rows_in_pieces(target: str, dtype: str, depth: int, pieces: int) -> None:
    kernel = make_linear(29, 50, depth, target, "requant_add", dtype, "int16", extreme=True,
                         gather="x", pieces=pieces)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


SHORT = ["x86-64-v3", pytest.param("x86-64-v4", marks=pytest.mark.skipif(
    isa_for(resolve_target("native")).vector_bits < 512, reason="this processor has no AVX-512"))]


@pytest.mark.parametrize("target", SHORT)
@pytest.mark.parametrize("largest,chain", [(127, 1), (64, 2), (32, 4)])
@pytest.mark.parametrize("codes,dtype", [((-100, 27), "int8"), ((0, 127), "uint8")], ids=str)
def test_sums_in_int16(
    target: str, largest: int, chain: int, codes: tuple[int, int], dtype: str
) -> None:
    kernel = make_linear(40, 64, 131, target, dtype=dtype, codes=codes, largest_weight=largest,
                         extreme=True)
    assert set(kernel.plan.chains) == {chain} and kernel.plan.dot.mnemonic == "vpmaddubsw"
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", SHORT)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_columns_that_do_not_fit_fall_back(target: str, dtype: str) -> None:
    largest = np.full(190, 16)
    largest[100] = 127
    largest[150] = 50
    kernel = make_linear(33, 190, 70, target, dtype=dtype, largest_weight=largest, extreme=True)
    assert {0, 1, 4} <= set(kernel.plan.chains) | {1}
    assert 0 in kernel.plan.chains
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_chains_are_exact(data: st.DataObject) -> None:
    """No code can take a window's sum out of int16, and the next chain up has one that does."""
    groups = data.draw(st.integers(1, 9))
    weights = st.sampled_from([-127, -64, -32, -3, 0, 3, 32, 64, 127])
    w = np.array(data.draw(st.lists(weights, min_size=groups * 8, max_size=groups * 8)), "int8")
    packed = w.reshape(1, groups, 2, 4)
    largest = data.draw(st.sampled_from([15, 63, 127, 255]))
    (chain,) = chains_of(packed, largest)

    def worst(length: int) -> int:
        parts = packed.astype(int).reshape(groups, 2, 2, 2)
        windows = [parts[i : i + length] for i in range(0, groups, length)]
        high = max(np.maximum(v, 0).sum(axis=(0, 3)).max() for v in windows) * largest
        low = min(np.minimum(v, 0).sum(axis=(0, 3)).min() for v in windows) * largest
        return max(high - 32767, -32768 - low)

    if chain:
        assert worst(chain) <= 0
    if chain < CHAINS[-1]:
        assert worst(max(2 * chain, 1)) > 0


def inner_loop(asm: str, mnemonic: str) -> list[str]:
    """Return the instructions of the basic block with the most uses of ``mnemonic``."""
    blocks = re.split(r"^\.?\w[\w.$]*:.*$|^\s+j\w+\s.*$", asm, flags=re.M)
    best = max(blocks, key=lambda block: len(re.findall(rf"\b{mnemonic}\b", block)))
    return [line.strip() for line in best.splitlines() if line.strip() and "\t." not in line]


@pytest.mark.parametrize("target,mnemonic,tile", [
    ("x86-64-v3", "vpmaddwd", 12), ("x86-64-v4", "vpmaddwd", 24), ("znver5", "vpdpbusd", 24),
    ("x86-64-v3", "vpmaddubsw", 12)])
def test_inner_loop(target: str, mnemonic: str, tile: int) -> None:
    largest = 64 if mnemonic == "vpmaddubsw" else 127
    codes = (0, 127) if mnemonic == "vpmaddubsw" else None
    asm = make_linear(197, 192, 192, target, codes=codes, largest_weight=largest).asm
    loop = inner_loop(asm, mnemonic)
    dots = [line for line in loop if line.startswith(mnemonic)]
    assert len(dots) >= tile - 2
    spills = [line for line in loop if "(%rsp)" in line or "(%rbp)" in line]
    assert not spills
    assert len(loop) <= (3.7 if mnemonic == "vpmaddubsw" else 3.1) * len(dots), loop


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "znver5"])
def test_no_float_arithmetic(target: str) -> None:
    asm = make_linear(20, 70, 63, target, "requant_add", out_dtype="int16").asm
    assert "vpmuldq" in asm and "vpmuludq" not in asm  # one multiplication for each product
    floating = re.findall(r"\bv?(?:add|sub|mul|div|fmadd\d+|max|min|cvt\w*)[ps][sd]\b", asm)
    assert not floating
