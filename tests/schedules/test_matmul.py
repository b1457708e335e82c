"""The activation matmul kernels equal int64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.kernels import make_matmul

TARGETS = ["x86-64-v3", "native"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transpose_b", [True, False], ids=["q_kt", "p_v"])
@pytest.mark.parametrize(
    "shape", [(3, 197, 197, 64), (2, 197, 64, 197), (5, 49, 49, 32), (4, 10, 33, 19), (1, 7, 3, 5)],
    ids=str)
def test_equals_int64(target: str, transpose_b: bool, shape: tuple[int, int, int, int]) -> None:
    kernel = make_matmul(shape, target, transpose_b)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("uint8", "int8"), ("int16", "int8"),
                                    ("int8", "int16"), ("uint8", "uint8")], ids=str)
@pytest.mark.parametrize("transpose_b", [True, False], ids=["q_kt", "p_v"])
@pytest.mark.parametrize("kind", ["acc", "requant", "requant_add"])
def test_extreme_codes(target: str, dtypes: tuple[str, str], transpose_b: bool, kind: str) -> None:
    kernel = make_matmul((2, 21, 45, 77), target, transpose_b, dtypes, kind=kind, extreme=True)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shift,out_dtype", [(18, "int32"), (31, "int16"), (32, "int8"),
                                             (45, "uint8"), (60, "int16")])
def test_any_shift(target: str, shift: int, out_dtype: str) -> None:
    kernel = make_matmul((1, 8, 32, 64), target, True, shift=shift, out_dtype=out_dtype)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", [*TARGETS, "x86-64"])
@pytest.mark.parametrize("axes", [((1, 0, 2), (1, 0, 2), ()), ((), (), (1, 0, 2)),
                                  ((1, 0, 2), (), (1, 0, 2))], ids=str)
@pytest.mark.parametrize("transpose_b", [True, False], ids=["q_kt", "p_v"])
def test_permuted(target: str, axes: tuple[tuple[int, ...], ...], transpose_b: bool) -> None:
    """Operands and result that lie permuted; "x86-64" takes the plain definition."""
    kernel = make_matmul((3, 21, 45, 32), target, transpose_b, axes=axes)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("zero_point", [0, 5, -128])
@pytest.mark.parametrize("shift", [33, 60], ids=["folded", "added"])
@pytest.mark.parametrize("target", [*TARGETS, "x86-64-v4"])
def test_scalars_are_spread_once(target: str, shift: int, zero_point: int) -> None:
    """The products of requantisation stay single instructions, factors from memory or not."""
    kernel = make_matmul((2, 21, 64, 32), target, True, shift=shift, zero_point=zero_point)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)
    assert "vpmuldq" in kernel.asm
    assert "vpmuludq" not in kernel.asm
    assert "vpmullq" not in kernel.asm


@pytest.mark.parametrize("target", [*TARGETS, "x86-64-v4"])
@pytest.mark.parametrize("transpose_b", [True, False], ids=["q_kt", "p_v"])
@pytest.mark.parametrize("kind", ["acc", "requant_add"])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 17, 24, 31, 33, 49, 65])
def test_last_columns(target: str, transpose_b: bool, kind: str, columns: int) -> None:
    """What is left of the columns is a smaller block that overlaps the one before."""
    kernel = make_matmul((2, 13, columns, 19), target, transpose_b, kind=kind, extreme=True)
    np.testing.assert_array_equal(kernel.run(), kernel.expected)
