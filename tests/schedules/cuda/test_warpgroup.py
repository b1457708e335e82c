"""Weight matmuls by products of four warps: equal to int64, and what they must wait for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.builder import const
from schedules.cuda.compile import compile_cuda, ptx, sass
from schedules.cuda.emulate import EmulationError, Emulator
from schedules.cuda.linear import linears
from schedules.cuda.lower import lower
from schedules.cuda.target import ARCHITECTURES, resolve_cuda_target
from schedules.cuda.tile import (
    MOST_OUTPUTS,
    SPARE,
    WARPGROUP_CHOICES,
    CudaTile,
    default_tile,
    warpgroup_tiles,
)
from schedules.cuda.writer import CudaWriter, pointer
from tests.helpers.cuda import emulator, kernel, needs_nvcc, needs_nvdisasm, words
from tests.helpers.cuda_linear import (
    LinearCase,
    check,
    gelu_tail,
    linear_case,
    main_loop,
    scheduled,
)

TARGET = resolve_cuda_target("sm_90a")
SHARED = ARCHITECTURES["sm_90a"] - SPARE


def tile(bm: int, bn: int, bk: int, warps_m: int, warps_n: int, stages: int) -> CudaTile:
    return CudaTile(bm, bn, bk, warps_m, warps_n, stages, wgmma=True)


SMALL = tile(64, 64, 64, 4, 1, 3)

CASES: dict[str, tuple[CudaTile, dict[str, Any]]] = {
    "int8": (SMALL, {}),
    "uint8": (SMALL, {"dtype": "uint8", "rows": 70, "columns": 64, "depth": 64}),
    "one row": (SMALL, {"rows": 1, "columns": 1, "depth": 1}),
    "sums": (SMALL, {"rows": 140, "columns": 36, "depth": 130, "kind": "acc"}),
    "residual": (SMALL, {"rows": 75, "columns": 96, "depth": 448, "kind": "requant_add",
                         "out_dtype": "int16"}),
    "rows of 128 bytes": (tile(64, 96, 128, 4, 1, 4), {"rows": 130, "columns": 100,
                                                        "depth": 768}),
    "64 rows twice": (tile(256, 128, 128, 8, 1, 3), {"rows": 300, "columns": 130, "depth": 400}),
    "four beside four": (tile(128, 128, 64, 4, 2, 6), {"rows": 130, "columns": 250,
                                                        "depth": 704}),
    "256 columns": (tile(128, 256, 128, 8, 1, 4), {"rows": 129, "columns": 500, "depth": 640}),
    "192 x 192": (tile(192, 192, 128, 12, 1, 3), {"rows": 197, "columns": 384, "depth": 384}),
    "sixteen warps": (tile(256, 64, 64, 16, 1, 3), {"dtype": "uint8", "rows": 260, "columns": 64,
                                                     "depth": 96}),
    "rows by a table": (SMALL, {"rows": 75, "columns": 40, "depth": 80, "gather": "x"}),
    "both by a table": (SMALL, {"rows": 75, "columns": 40, "depth": 96, "gather": "both",
                                "kind": "requant_add", "out_dtype": "int16"}),
    "pieces of 14": (tile(64, 96, 128, 4, 1, 3), {
        "dtype": "uint8", "rows": 70, "columns": 96, "depth": 588, "gather": "x", "pieces": 42}),
    "odd depth": (SMALL, {"rows": 75, "columns": 40, "depth": 75}),
    "depth in words": (tile(128, 64, 128, 8, 1, 4), {"rows": 75, "columns": 40, "depth": 588}),
    "all -128": (SMALL, {"rows": 70, "columns": 64, "depth": 768, "kind": "acc",
                         "extreme": True}),
    "uint8, all ends": (SMALL, {"dtype": "uint8", "rows": 70, "columns": 64, "depth": 768,
                                "kind": "acc", "extreme": True}),
}


@pytest.fixture(scope="module")
def every() -> Iterator[tuple[dict[str, LinearCase], Emulator]]:
    cases = {name: linear_case(**options) for name, (_, options) in CASES.items()}
    yield cases, emulator({f"k{index}": scheduled(case, CASES[name][0])
                           for index, (name, case) in enumerate(cases.items())}, "sm_90a")


@pytest.mark.parametrize("name", CASES)
def test_equals_int64(name: str, every: tuple[dict[str, LinearCase], Emulator]) -> None:
    cases, ready = every
    check(ready, f"k{list(CASES).index(name)}", cases[name], 3)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(["int8", "uint8"]), st.integers(1, 280), st.integers(1, 300),
    st.integers(1, 400), st.sampled_from(["acc", "requant", "requant_add"]),
    st.sampled_from(["int8", "uint8", "int16"]), st.booleans(), st.integers(0, 999),
    st.sampled_from(warpgroup_tiles(SHARED)), st.sampled_from(["", "x"]),
)
def test_any_shape(
    dtype: str, rows: int, columns: int, depth: int, kind: str, out_dtype: str, extreme: bool,
    seed: int, cut: CudaTile, gather: str,
) -> None:
    case = linear_case(
        dtype, rows, columns, depth, kind, out_dtype, extreme=extreme, seed=seed, gather=gather,
        shifts=(20 + seed % 20, 55), res=(2**30 + seed % 2, 20 + seed % 20))
    check(emulator({"k": scheduled(case, cut)}, "sm_90a"), "k", case, 1)


@pytest.mark.parametrize("left_out,error", [
    ("vitq_fence_async", "without a fence"), ("vitq_wgmma_fence", "without a fence"),
    ("vitq_copy_wait1", "without a fence"), ("vitq_wgmma_wait0", ""), ("vitq_wgmma_wait1", ""),
    ("__syncthreads", "without a fence")])
def test_what_is_left_out_shows(left_out: str, error: str) -> None:
    """By a complaint of the emulator or, for a wait, by wrong results."""
    case = linear_case(rows=130, columns=100, depth=1024)
    source, kernels = lower({"k": scheduled(case, tile(128, 128, 64, 8, 1, 4))}, TARGET)
    assert source.count(f"  {left_out}();") == 1
    ready = Emulator.of_source(source.replace(f"  {left_out}();", ""), kernels, "sm_90a")

    def run(seed: int) -> bool:
        out = np.zeros_like(case.expected)
        ready.run("k", *case.inputs, out, seed=seed)
        return bool((out == case.expected).all())

    if error:
        with pytest.raises(EmulationError, match=error):
            [run(seed) for seed in range(8)]
    else:
        assert not all([run(seed) for seed in range(8)])


def test_warps_must_ask_for_the_same() -> None:
    def write(w: CudaWriter, x: Any) -> None:
        shared, sums = w.shared("shared", 16384, "int8"), w.registers("sums", 16)
        with w.loop("i", 16, "unrolled") as i:
            w.store(sums, const(0, "int32"), i)
        a, b = (w.value("vitq_descriptor", pointer(shared, w.warp * 1024 * i), 16, 1024, 1)
                for i in range(2))
        w.call("vitq_wgmma_fence")
        w.call("vitq_wgmma_s8_n32", pointer(sums, 0), a, b)

    ready = emulator({"k": kernel(write, [words("x", 4)], threads=128)}, "sm_90a")
    with pytest.raises(EmulationError, match="while others"):
        ready.run("k", np.zeros(4, "int32"))


def test_descriptor() -> None:
    """Fields as the PTX ISA places them: address, leading, stride in units of 16 bytes; form."""
    def write(w: CudaWriter, out: Any) -> None:
        shared = w.shared("shared", 1 << 16, "int8")
        w.store(out, w.value("vitq_descriptor", pointer(shared, 4096), 16, 1024, 1), 0)
        w.store(out, w.value("vitq_descriptor", pointer(shared, 512), 2048, 128, 0), 1)

    ready = emulator({"k": kernel(write, [words("out", 2, "uint64")], threads=1)}, "sm_90a")
    out = np.zeros(2, "uint64")
    ready.run("k", out)
    base = 1024  # where a block's own shared memory begins
    assert out.tolist() == [(base + 4096) // 16 | 1 << 16 | 64 << 32 | 1 << 62,
                            (base + 512) // 16 | 128 << 16 | 8 << 32]


def test_tile_must_fit() -> None:
    for wrong in ((64, 64, 64, 2, 1, 3), (64, 64, 256, 4, 1, 3), (64, 512, 64, 4, 1, 3),
                  (64, 64, 64, 4, 1, 2)):
        with pytest.raises(ValueError, match="is no tile"):
            tile(*wrong)
    with pytest.raises(ValueError, match="8 bits"):
        scheduled(linear_case("int16"), SMALL)


def test_default_rule() -> None:
    large = default_tile(64 * 197, [768], 3072, 1, result=4, shared=SHARED, wgmma=True)
    assert large.wgmma and large.bm * large.bn >= 128 * 256
    assert not default_tile(64 * 197, [768], 3072, 1, shared=SHARED).wgmma
    assert not default_tile(64 * 197, [768], 3072, 2, shared=SHARED, wgmma=True).wgmma
    tail = default_tile(64 * 197, [3072], 768, 1, True, 1, SHARED, True)
    assert tail.wgmma and tail.bm * tail.bn <= 64 * tail.threads
    with TARGET:  # by the current target
        assert "wgmma" in lower({"k": scheduled(linear_case(
            rows=16 * 197, columns=768, depth=768), None)}, TARGET)[0]


@needs_nvcc
@pytest.mark.parametrize("kind,out_dtype,gather", [
    ("requant", "int8", ""), ("requant_add", "int16", "both")])
def test_no_local_memory(kind: str, out_dtype: str, gather: str) -> None:
    case = linear_case("int8", 1001, 392, 384, kind, out_dtype, res=(2**30, 30), gather=gather)
    choices = list({(cut.bm, cut.bn, cut.bk): cut for cut in warpgroup_tiles(SHARED)}.values())
    assert len(choices) == 2 * len(WARPGROUP_CHOICES)
    kernels = {f"k{i}": scheduled(case, cut) for i, cut in enumerate(choices)}
    _, resources = compile_cuda(lower(kernels, TARGET)[0], "sm_90a")
    for i, cut in enumerate(choices):
        found = resources[f"k{i}_kernel"]
        assert not found.spills and not found.serialized, (cut, found)
        # As many blocks beside each other as the rule counts on.
        blocks = 65536 // (cut.registers(1) * cut.threads)
        assert max(blocks, 1) * cut.threads * found.registers <= 65536, (cut, found)


@needs_nvcc
def test_no_local_memory_behind_a_gelu() -> None:
    """Whose gains stand in registers beside sums and parameters; rows and columns past the end."""
    case = linear_case("int8", 1001, 392, 384, "requant", "int16")
    tail, _, _ = gelu_tail(case.expected, "poly", channels=True)
    choices = list({(cut.bm, cut.bn): cut for cut in warpgroup_tiles(SHARED)
                    if cut.bm * cut.bn <= MOST_OUTPUTS * cut.threads}.values())
    assert len(choices) >= 6
    kernels = {f"k{i}": linears([case.func], [tail], cut) for i, cut in enumerate(choices)}
    _, resources = compile_cuda(lower(kernels, TARGET)[0], "sm_90a")
    for i, cut in enumerate(choices):
        found = resources[f"k{i}_kernel"]
        assert not found.spills and not found.serialized, (cut, found)


@needs_nvcc
def test_ptx() -> None:
    case = linear_case(rows=256, columns=256, depth=1024)
    text = ptx(lower({"k": scheduled(case, tile(128, 128, 128, 8, 1, 3))}, TARGET)[0], "sm_90a")
    body = text["k_kernel"]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in body
    assert "cp.async.cg" in body and "fence.proxy.async" in body
    assert not re.search(r"\.f(16|32|64)\b", body) and ".local" not in body


@needs_nvdisasm
def test_inner_loop() -> None:
    """A step of 128 x 256 x 128: four products one after the other, one barrier, 12 copies."""
    case = linear_case("int8", 1024, 768, 768)
    code = sass(lower({"k": scheduled(case, tile(128, 256, 128, 8, 1, 4))}, TARGET)[0], "sm_90a")
    body = main_loop(code["k_kernel"], "IGMMA")
    assert body.count("IGMMA") == 4 and body.count("BAR") == 1 and body.count("LDGSTS") == 12
    # One wait, behind them all: nothing comes between products.
    assert body.count("WARPGROUP") == 2 and "WARPSYNC" not in body
    first = body.index("IGMMA")
    assert body[first:].index("WARPGROUP") > max(
        i for i, name in enumerate(body[first:]) if name == "IGMMA")
    assert len(body) <= 170


def test_members_side_by_side() -> None:
    """Q, k and v in one kernel, each with its own columns' parameters."""
    cases = [linear_case(rows=200, columns=96, depth=192)]
    cases += [linear_case(rows=200, columns=96, depth=192, share=cases[0].inputs[:1], seed=i)
              for i in (1, 2)]
    func = linears([case.func for case in cases], [None] * 3, tile(64, 96, 64, 4, 1, 4))
    inputs = [array for i, case in enumerate(cases) for array in case.inputs[bool(i):]]
    out = [np.zeros_like(case.expected) for case in cases]
    emulator({"k": func}, "sm_90a").run("k", *inputs, *out)
    for case, found in zip(cases, out, strict=True):
        np.testing.assert_array_equal(found, case.expected)
