"""Weight matmuls on a GPU equal int64 NumPy bit for bit; what nvcc makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.cuda.compile import compile_cuda, ptx, sass
from schedules.cuda.emulate import Emulator
from schedules.cuda.linear import linears
from schedules.cuda.lower import lower
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.tile import CHOICES, SHARED, SPARE, CudaTile, default_tile, tiles
from tests.helpers.cuda import emulator, needs_nvcc, needs_nvdisasm
from tests.helpers.cuda_linear import (
    LinearCase,
    check,
    gelu_tail,
    linear_case,
    main_loop,
    scheduled,
)

SMALL = CudaTile(32, 32, 64, 2, 1, 3)

CASES: dict[str, tuple[CudaTile | None, dict[str, Any]]] = {
    "int8": (SMALL, {}),
    "uint8": (SMALL, {"dtype": "uint8", "rows": 33, "columns": 64, "depth": 64}),
    "int16": (SMALL, {"dtype": "int16", "rows": 33, "columns": 100, "depth": 96}),
    "one row": (SMALL, {"rows": 1, "columns": 1, "depth": 1}),
    "sums": (SMALL, {"rows": 40, "columns": 36, "depth": 130, "kind": "acc"}),
    "sums, odd columns": (SMALL, {"rows": 3, "columns": 37, "depth": 192, "kind": "acc"}),
    "sums of int16": (SMALL, {"dtype": "int16", "rows": 7, "columns": 64, "depth": 200,
                              "kind": "acc"}),
    "uint8 codes": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "out_dtype": "uint8",
                            "zero_point": 100}),
    "int16 codes": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "out_dtype": "int16"}),
    "saturating int16": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "out_dtype": "int16",
                                 "shifts": (33, 36), "clamp": (-32768, 32767)}),
    "int32 codes": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "out_dtype": "int32"}),
    "int32 codes, wide": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "out_dtype": "int32",
                                  "shifts": (8, 60)}),
    "narrow clamp": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "clamp": (-7, 20)}),
    "lifted": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "shifts": (24, 40),
                       "out_dtype": "int16"}),
    "wide": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "shifts": (2, 60)}),
    "wide, residual": (SMALL, {"rows": 9, "columns": 64, "depth": 48, "shifts": (2, 60),
                               "kind": "requant_add", "out_dtype": "int16"}),
    "residual": (SMALL, {"rows": 35, "columns": 96, "depth": 48, "kind": "requant_add",
                         "out_dtype": "int16"}),
    "residual of the same scale": (SMALL, {"rows": 35, "columns": 96, "depth": 48,
                                           "kind": "requant_add", "out_dtype": "int16",
                                           "res": (2**30, 30)}),
    "residual of half the scale": (SMALL, {"rows": 35, "columns": 40, "depth": 48,
                                           "kind": "requant_add", "out_dtype": "int16",
                                           "res": (2**30, 33)}),
    "residual of twice the scale": (SMALL, {"rows": 35, "columns": 40, "depth": 48,
                                            "kind": "requant_add", "out_dtype": "int16",
                                            "res": (2**30, 29)}),
    "residual of int8": (SMALL, {"rows": 35, "columns": 40, "depth": 48, "kind": "requant_add",
                                 "res_dtype": "int8", "res": (1900000000, 30)}),
    "residual of uint8": (SMALL, {"rows": 35, "columns": 35, "depth": 48, "kind": "requant_add",
                                  "res_dtype": "uint8"}),
    "residual, small shift": (SMALL, {"rows": 5, "columns": 32, "depth": 48,
                                      "kind": "requant_add", "out_dtype": "int16",
                                      "res": (1900000001, 12)}),
    "rows by a table": (SMALL, {"rows": 35, "columns": 40, "depth": 80, "gather": "x"}),
    "residual by a table": (SMALL, {"rows": 35, "columns": 40, "depth": 80, "gather": "residual",
                                    "kind": "requant_add", "out_dtype": "int16"}),
    "both by a table": (SMALL, {"rows": 35, "columns": 40, "depth": 96, "gather": "both",
                                "kind": "requant_add", "out_dtype": "int16"}),
    "pieces": (SMALL, {"rows": 20, "columns": 96, "depth": 192, "gather": "x", "pieces": 12}),
    "pieces of 14": (SMALL, {"dtype": "uint8", "rows": 20, "columns": 96, "depth": 588,
                             "gather": "x", "pieces": 42}),
    "pieces of 7 int16": (SMALL, {"dtype": "int16", "rows": 20, "columns": 32, "depth": 147,
                                  "gather": "x", "pieces": 21}),
    "odd depth": (SMALL, {"rows": 35, "columns": 40, "depth": 75}),
    "depth in words": (SMALL, {"rows": 35, "columns": 40, "depth": 588}),
    "depth in double words": (SMALL, {"dtype": "int16", "rows": 35, "columns": 40, "depth": 84}),
    "tokens": (CudaTile(64, 64, 64, 2, 2, 4), {"rows": 197, "columns": 192, "depth": 192}),
    "long": (CudaTile(64, 96, 64, 2, 1, 4), {"rows": 65, "columns": 97, "depth": 768}),
    "four warps along": (CudaTile(64, 32, 128, 4, 1, 2), {"rows": 130, "columns": 32,
                                                           "depth": 384}),
    "six stages": (CudaTile(16, 64, 64, 1, 2, 6), {"dtype": "int16", "rows": 17, "columns": 64,
                                                    "depth": 704}),
    "two parts of K": (CudaTile(32, 64, 128, 2, 2, 3, 2), {"rows": 33, "columns": 64,
                                                            "depth": 700}),
    "four parts of K": (CudaTile(16, 32, 256, 1, 1, 2, 4), {
        "dtype": "int16", "rows": 17, "columns": 36, "depth": 1000, "kind": "requant_add",
        "out_dtype": "int16", "extreme": True}),
    "large": (CudaTile(128, 128, 64, 2, 2, 3), {"rows": 129, "columns": 136, "depth": 200}),
    "eight warps": (CudaTile(256, 128, 64, 4, 2, 4), {"rows": 250, "columns": 128,
                                                       "depth": 320}),
    "all -128": (SMALL, {"rows": 20, "columns": 64, "depth": 768, "kind": "acc",
                         "extreme": True}),
    "extreme int16": (SMALL, {"dtype": "int16", "rows": 20, "columns": 64, "depth": 500,
                              "extreme": True, "out_dtype": "int16"}),
    "extreme int16 sums": (SMALL, {"dtype": "int16", "rows": 5, "columns": 32, "depth": 500,
                                   "extreme": True, "kind": "acc"}),
    "head": (None, {"dtype": "int16", "rows": 1, "columns": 1000, "depth": 192,
                    "out_dtype": "int16"}),
    "head of int8": (None, {"rows": 3, "columns": 36, "depth": 512}),
    "head of uint8": (None, {"dtype": "uint8", "rows": 4, "columns": 64, "depth": 272,
                             "extreme": True}),
    "head with residual": (None, {"rows": 2, "columns": 64, "depth": 48, "kind": "requant_add",
                                  "out_dtype": "int16"}),
    "head's sums": (None, {"dtype": "int16", "rows": 4, "columns": 33, "depth": 400,
                           "kind": "acc", "extreme": True}),
    "head by a table": (None, {"rows": 4, "columns": 64, "depth": 96, "gather": "x"}),
    "head with residual by a table": (None, {"rows": 6, "columns": 64, "depth": 96,
                                             "gather": "residual", "kind": "requant_add"}),
    "head of a ragged depth": (None, {"rows": 4, "columns": 64, "depth": 75}),
    "default tile": (None, {"rows": 197, "columns": 96, "depth": 96}),
}


@pytest.fixture(scope="module")
def every() -> Iterator[tuple[dict[str, LinearCase], Emulator]]:
    cases = {name: linear_case(**options) for name, (_, options) in CASES.items()}
    names = {name: f"k{index}" for index, name in enumerate(cases)}
    yield cases, emulator({names[name]: scheduled(case, CASES[name][0])
                           for name, case in cases.items()}, "sm_90")


@pytest.mark.parametrize("name", CASES)
def test_equals_int64(name: str, every: tuple[dict[str, LinearCase], Emulator]) -> None:
    cases, ready = every
    check(ready, f"k{list(CASES).index(name)}", cases[name])


def test_turing() -> None:
    """Copies are synchronous there, and a large mma is made of small ones."""
    case = linear_case(rows=70, columns=40, depth=200, kind="requant_add", out_dtype="int16")
    check(emulator({"k": scheduled(case, SMALL)}, "sm_75"), "k", case)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["int8", "uint8", "int16"]), st.integers(1, 90), st.integers(1, 110),
    st.integers(1, 300), st.sampled_from(["acc", "requant", "requant_add"]),
    st.sampled_from(["int8", "uint8", "int16"]), st.booleans(), st.integers(0, 999),
    st.sampled_from(CHOICES[7:]), st.integers(2, 5), st.sampled_from(["", "x", "both"]),
)
def test_any_shape(
    dtype: str, rows: int, columns: int, depth: int, kind: str, out_dtype: str, extreme: bool,
    seed: int, cut: tuple[int, int, int, int, int], stages: int, gather: str,
) -> None:
    bm, bn, warps_m, warps_n, warps_k = cut
    case = linear_case(
        dtype, rows, columns, depth, kind, out_dtype, extreme=extreme, seed=seed, gather=gather
        if gather != "both" or kind == "requant_add" else "", shifts=(20 + seed % 20, 55),
        res=(2**30 + seed % 2, 20 + seed % 20))
    tile = CudaTile(bm, bn, 64 * warps_k, warps_m, warps_n, stages, warps_k)
    check(emulator({"k": scheduled(case, tile)}, "sm_90"), "k", case, 1)


def test_tile_must_fit() -> None:
    for wrong in ((24, 32, 64, 1, 1, 3), (32, 48, 64, 1, 1, 3), (32, 32, 32, 1, 1, 3),
                  (32, 32, 64, 1, 1, 7), (32, 32, 64, 1, 1, 1), (32, 32, 64, 1, 1, 3, 2)):
        with pytest.raises(ValueError, match="is no tile"):
            CudaTile(*wrong)


def test_default_tile_fills_the_device_or_its_tensor_cores() -> None:
    small = default_tile(197, [192] * 3, 192, 1)
    assert -(-197 // small.bm) * 3 * (192 // small.bn) >= 100
    large = default_tile(64 * 197, [768], 3072, 1, shared=200 << 10)
    assert large.bm * large.bn >= 128 * 128
    tail = default_tile(64 * 197, [3072], 768, 1, True)
    assert tail.bm * tail.bn <= 64 * tail.threads
    for shared in (SHARED, 98 << 10, 200 << 10):
        for itemsize in (1, 2):
            tile = default_tile(64 * 197, [768], 3072, itemsize, shared=shared)
            assert tile.shared_bytes(itemsize) <= shared


@needs_nvcc
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("arch,kind,out_dtype", [
    ("sm_80", "requant", "int8"), *((arch, "requant_add", "int16") for arch in (
        "sm_75", "sm_80", "sm_90"))])  # a residual takes registers beside everything else
def test_no_local_memory(arch: str, dtype: str, kind: str, out_dtype: str) -> None:
    case = linear_case(dtype, 1001, 392, 384, kind, out_dtype, res=(2**30, 30))
    itemsize = np.dtype(dtype).itemsize
    room = int(resolve_cuda_target(arch).attrs["max_shared_memory_per_block"])
    choices = tiles(itemsize, max(SHARED, room - SPARE))
    assert len(choices) >= 12
    kernels = {f"k{i}": scheduled(case, tile) for i, tile in enumerate(choices)}
    _, resources = compile_cuda(lower(kernels, resolve_cuda_target(arch))[0], arch)
    for i, tile in enumerate(choices):
        found = resources[f"k{i}_kernel"]
        assert not found.spills, (tile, found)
        assert found.registers * tile.threads <= 65536, (tile, found)


@needs_nvcc
def test_no_local_memory_on_turing() -> None:
    """Where copies go through registers: behind a GELU, and of three members.

    Left to itself ptxas keeps a few values of both in local memory.
    """
    one = linear_case("int8", 97, 384, 384, "requant", "int16")
    tail, _, _ = gelu_tail(one.expected, "poly", channels=True)
    first = linear_case("int8", 1576, 192, 192)
    three = [first, *(linear_case("int8", 1576, 192, 192, share=first.inputs[:1], seed=i)
                      for i in (1, 2))]
    kernels = {
        "gelu": linears([one.func], [tail], CudaTile(96, 128, 64, 2, 4, 4)),
        "three": linears([case.func for case in three], [None] * 3,
                         CudaTile(128, 64, 64, 2, 2, 4)),
    }
    _, resources = compile_cuda(lower(kernels, resolve_cuda_target("sm_75"))[0], "sm_75")
    assert not any(found.spills for found in resources.values()), resources


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_ptx(arch: str) -> None:
    """Tensor cores and asynchronous copies in the loop, dp4a for few rows, no floats anywhere."""
    large = linear_case(rows=256, columns=256, depth=1024)
    few = linear_case("int16", 1, 1000, 192, "requant", "int16")
    with resolve_cuda_target(arch):
        kernels = {"large": scheduled(large, None), "few": scheduled(few, None)}
    text = ptx(lower(kernels, resolve_cuda_target(arch))[0], arch)
    shape = "m8n8k16" if arch == "sm_75" else "m16n8k32"
    assert f"mma.sync.aligned.{shape}" in text["large_kernel"]
    assert ("cp.async.cg" in text["large_kernel"]) == (arch != "sm_75")
    assert "dp4a" in text["few_kernel"] and "mma.sync" not in text["few_kernel"]
    for body in text.values():
        assert not re.search(r"\.f(16|32|64)\b", body) and ".local" not in body


@needs_nvdisasm
@pytest.mark.parametrize("dtype,most", [("int8", 140), ("int16", 180)])
def test_inner_loop(dtype: str, most: int) -> None:
    """A step of the large tile: 64 mma, 16 ldmatrix, one barrier, no moves between registers."""
    tile = CudaTile(128, 128, 64, 2, 2, 3) if dtype == "int8" else CudaTile(128, 64, 64, 4, 1, 3)
    case = linear_case(dtype, 1024, 768, 768)
    target = resolve_cuda_target("sm_90")
    code = sass(lower({"k": scheduled(case, tile)}, target)[0], "sm_90")["k_kernel"]
    body = main_loop(code, "IMMA")
    assert body.count("IMMA") == 64 and body.count("LDSM") == 16
    assert body.count("BAR") == 1 and body.count("MOV") <= 2
    assert len(body) <= most


def test_needs_no_target() -> None:
    assert tvm.target.Target.current(allow_none=True) is None
    assert scheduled(linear_case(rows=300), None).attrs["tirx.noalias"]
