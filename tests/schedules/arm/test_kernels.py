"""AArch64's matmul kernels equal int64 arithmetic, under qemu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.arm import LEVELS, different, emulator, needs_qemu
from tests.helpers.kernels import Case, linear_case, matmul_case

pytestmark = needs_qemu
BuildOnce = Callable[..., Path]

SHAPES = [(29, 48, 192), (1, 40, 64), (13, 97, 48), (7, 33, 5), (3, 16, 1), (26, 65, 63)]
BATCHED = [(2, 29, 29, 64), (2, 29, 64, 29), (2, 16, 16, 24), (1, 10, 33, 19), (1, 7, 3, 5)]
DTYPES = [("int8", "int8"), ("uint8", "int8"), ("int16", "int8"), ("int8", "int16"),
          ("uint8", "uint8"), ("int16", "uint8")]


def check(cases: dict[str, Case], target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    counts = different(cases, tmp_path, emulator(build_once, LEVELS[target]))
    assert counts == dict.fromkeys(cases, 0)


@pytest.mark.parametrize("target", LEVELS)
def test_linear(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    cases = {}
    for i, shape in enumerate(SHAPES):
        cases[f"acc{i}"] = linear_case(*shape, target, "acc", out_dtype="int32")
        cases[f"requant{i}"] = linear_case(*shape, target, dtype="uint8")
        cases[f"add{i}"] = linear_case(*shape, target, "requant_add", "int16", out_dtype="int16")
    check(cases, target, tmp_path, build_once)


@pytest.mark.parametrize("target", LEVELS)
def test_linear_extreme_codes(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    cases = {
        f"{dtype}_{out}": linear_case(31, 50, 130, target, dtype=dtype, out_dtype=out, extreme=True)
        for dtype in ("int8", "uint8", "int16") for out in ("int8", "uint8", "int16", "int32")
    }
    check(cases, target, tmp_path, build_once)


@pytest.mark.parametrize("target", LEVELS)
def test_linear_any_shift(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    cases = {
        f"s{low}_{res}": linear_case(6, 24, 32, target, "requant_add", out_dtype="int16",
                                     shifts=(low, high), res_shift=res)
        for low, high in ((28, 40), (20, 60), (50, 63)) for res in (12, 31, 45)
    }
    check(cases, target, tmp_path, build_once)


@pytest.mark.parametrize("target", LEVELS)
def test_linear_rows_of_a_table(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    cases = {
        f"{dtype}_{gather}": linear_case(29, 50, 131, target, "requant_add", dtype, "int16",
                                         extreme=True, gather=gather)
        for dtype in ("int8", "uint8", "int16") for gather in ("x", "residual", "both")
    }
    cases |= {
        f"{dtype}_pieces{pieces}": linear_case(29, 50, depth, target, "requant", dtype,
                                               extreme=True, gather="x", pieces=pieces)
        for dtype in ("int8", "uint8", "int16") for depth, pieces in ((12, 6), (96, 2), (147, 21))
    }
    check(cases, target, tmp_path, build_once)


@pytest.mark.parametrize("target", LEVELS)
def test_matmul(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    cases = {}
    for i, shape in enumerate(BATCHED):
        for transposed in (False, True):
            cases[f"m{i}_{transposed}"] = matmul_case(shape, target, transposed)
    for j, dtypes in enumerate(DTYPES):
        for kind in ("acc", "requant_add"):
            for transposed in (False, True):
                cases[f"d{j}_{kind}_{transposed}"] = matmul_case(
                    (2, 21, 45, 77), target, transposed, dtypes, kind=kind, extreme=True)
    for k, axes in enumerate([((1, 0, 2), (1, 0, 2), ()), ((1, 0, 2), (), (1, 0, 2))]):
        for transposed in (False, True):
            cases[f"p{k}_{transposed}"] = matmul_case(
                (3, 21, 45, 32), target, transposed, axes=axes)
    for shift, out in ((18, "int32"), (31, "int16"), (32, "int8"), (45, "uint8"), (60, "int16")):
        cases[f"s{shift}"] = matmul_case((1, 8, 32, 64), target, True, shift=shift, out_dtype=out)
    check(cases, target, tmp_path, build_once)


@pytest.mark.parametrize("largest,chain", [(127, 2), (63, 4), (31, 8), (128, 1)])
def test_sums_in_int16(largest: int, chain: int, tmp_path: Path, build_once: BuildOnce) -> None:
    """As many bytes products as are proved to fit are added in int16, and no more."""
    case = linear_case(20, 48, 131, "aarch64", largest_weight=largest, extreme=True)
    assert set(case.plan.chains) == {chain} and case.plan.dot.name == "smlal8"
    check({"main": case}, "aarch64", tmp_path, build_once)
