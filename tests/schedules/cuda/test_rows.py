"""Kernels over rows and single elements: bit for bit the reference's, in registers, in integers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx

from relay_passes.dialect.add import add
from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.reduce import sum_
from relay_passes.dialect.requantize import requantize
from relay_passes.dialect.softmax import softmax
from schedules.apply import ApplySchedules, blocks_of
from schedules.cuda.compile import compile_cuda, cuda_source, ptx
from schedules.cuda.emulate import Emulator
from schedules.cuda.row_tile import RowTile, default_row_tile
from schedules.cuda.rows import lower_rows
from schedules.cuda.target import resolve_cuda_target
from schedules.isa import CUDA
from tests.helpers.cuda import emulator, needs_nvcc
from tests.helpers.dialect import extreme, module
from tvm_vitq.artifact.gpu_kernels import check_ptx
from tvm_vitq.reference.interpreter import Interpreter

ROWS, C = 5, 48
GAMMA = np.linspace(-1.5, 2.0, C)
TARGET = resolve_cuda_target("sm_80")

Case = tuple[tuple[tuple[int, ...], str], Callable[..., relax.Expr]]

CASES: dict[str, Case] = {
    "layer_norm": (((ROWS, C), "int16"), lambda x: layer_norm(
        x, 1e-3, GAMMA, GAMMA[::-1], 1e-6, 0.02, 3, -128, 127, "int8")),
    "layer_norm_odd": (((3, 37), "int8"), lambda x: layer_norm(
        x, 1e-2, GAMMA[:37], GAMMA[:37], 1e-6, 0.02, 0, -128, 127, "int8")),
    "layer_norm_long": (((2, 2112), "int16"), lambda x: layer_norm(
        x, 1e-3, np.ones(2112), np.zeros(2112), 1e-6, 0.02, 0, -128, 127, "int8")),
    **{f"softmax_{method}": (((ROWS, 50), "int16"), lambda x, m=method: softmax(
        x, 0.001, 2.0**-15, 2**15 - 1, "int16", m)) for method in ("shift", "poly", "table")},
    "softmax_long": (((2, 2100), "int8"), lambda x: softmax(
        x, 0.05, 2.0**-8, 255, "uint8", "poly")),
    "add": (((2, ROWS, C), "int16"), lambda x: add(
        x, relax.const(np.arange(ROWS * C, dtype="int16").reshape(1, ROWS, C)), 0.7, 1.3, 0, 0, 5,
        -32767, 32767)),
    "requantize": (((ROWS, C), "int32"), lambda x: requantize(
        x, np.full(C, 1e-5), 0, 1, -127, 127, "int8")),
    "sum": (((2, 7, C), "int16"), lambda x: sum_(x, 1)),
    **{f"gelu_{method}": (((ROWS, C), "int16"), lambda x, m=method: gelu(
        x, 0.001, 0, 0.02, -20, -128, 127, "int8", m)) for method in ("shift", "poly", "table")},
}


@cache
def built(name: str) -> tuple[tvm.IRModule, tirx.PrimFunc, list[np.ndarray], Emulator]:
    """Return a case's module, its kernel, the constants after the first argument, an emulator."""
    (shape, dtype), body = CASES[name]
    mod = module([np.zeros(shape, dtype)], body)
    legal = relax.transform.LegalizeOps()(mod)
    done = ApplySchedules(CUDA)(legal)
    (func,) = (f for _, f in done.functions_items() if isinstance(f, tirx.PrimFunc))
    call = legal["main"].body.blocks[0].bindings[0].value
    constants = [arg.value.numpy() for arg in list(call.args[1].fields)[1:]]
    return mod, func, constants, Emulator({"kernel": func}, TARGET)


def check(name: str, x: np.ndarray, seed: int = 0) -> None:
    mod, func, constants, emulator = built(name)
    expected = Interpreter(mod).evaluate(x)
    out = np.full([int(e) for e in func.params[-1].shape], 77, str(func.params[-1].dtype))
    emulator.run("kernel", np.ascontiguousarray(x), *constants, out, seed=seed)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equal_to_the_reference(name: str, data: Any) -> None:
    (shape, dtype), _ = CASES[name]
    if int(np.prod(shape)) > 1000:
        seed = data.draw(st.integers(0, 2**32 - 1))
        info = np.iinfo(dtype)
        x = np.random.default_rng(seed).integers(info.min, info.max, shape, dtype, True)
    else:
        x = data.draw(extreme(shape, dtype))
    check(name, x, data.draw(st.integers(0, 3)))


@needs_nvcc
def test_in_registers_and_without_floats() -> None:
    funcs = {name: built(name)[1] for name in CASES}
    source = cuda_source(funcs, TARGET)
    _, resources = compile_cuda(source, "sm_80")
    assert not [name for name, taken in resources.items() if taken.spills]
    assert check_ptx(ptx(source, "sm_80")) == {}


@pytest.mark.parametrize("wide", [2050, 2049, 2056])
def test_parts_of_longer_rows_are_aligned(wide: int) -> None:
    x = te.placeholder((256, wide), "int8", name="x")
    out = te.compute((256, 2048), lambda i, j: x[i, j], name="out")
    func = te.create_prim_func([x, out])
    blocks = [block for block in blocks_of(func.body) if block.iter_vars]
    kernel = lower_rows(func, blocks, {"tirx.noalias": True})
    assert kernel is not None
    given = np.random.default_rng(0).integers(-128, 128, (256, wide), "int8")
    found = np.zeros((256, 2048), "int8")
    emulator({"kernel": kernel}).run("kernel", given, found)
    np.testing.assert_array_equal(found, given[:, :2048])


def test_default_tiles() -> None:
    one = default_row_tile(197, 192, 2, 2)
    assert one == RowTile(lanes=32, width=2, warps=1)  # few rows: all lanes of a warp for each
    many = default_row_tile(197 * 64, 192, 2, 2)
    assert many.lanes < 32 and 192 % (many.lanes * many.width) == 0
    odd = default_row_tile(197 * 64, 197, 2, 2)
    assert odd.width == 1
