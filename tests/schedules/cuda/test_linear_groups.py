"""Several weight matmuls of the same rows as one kernel, with elementwise operators behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx

from schedules.cuda.expression import Expressions, loads_of, stages_of, substitute
from schedules.cuda.linear import linears
from schedules.cuda.lower import lower
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.tile import CudaTile
from tests.helpers.cuda import emulator
from tests.helpers.cuda_linear import LinearCase, gelu_tail, linear_case

SMALL = CudaTile(32, 32, 64, 2, 1, 3)


def run_group(
    cases: list[LinearCase], tails: list[tuple[Any, list[np.ndarray], np.ndarray] | None],
    tile: CudaTile | None, gathered: bool = False,
) -> None:
    """Run members and their tails (PrimFunc, constants, result) as one kernel; compare."""
    func = linears([case.func for case in cases],
                   [tail[0] if tail else None for tail in tails], tile)
    inputs: list[np.ndarray] = []
    expected = []
    for index, (case, tail) in enumerate(zip(cases, tails, strict=True)):
        own = case.inputs if index == 0 else case.inputs[1 : -1 if gathered else None]
        inputs += [*own, *(tail[1] if tail else [])]
        expected.append(tail[2] if tail else case.expected)
    ready = emulator({"k": func}, "sm_90")
    for seed in range(2):
        outputs = [np.full_like(value, 77) for value in expected]
        ready.run("k", *inputs, *outputs, seed=seed)
        for output, value in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output, value)


@pytest.mark.parametrize("dtype,gather,pieces,tile", [
    ("int8", "", 1, SMALL), ("int16", "", 1, SMALL), ("int8", "x", 1, SMALL),
    ("uint8", "x", 3, SMALL), ("int8", "", 1, CudaTile(64, 64, 64, 2, 2, 4)),
    ("int16", "", 1, None)])
def test_members_side_by_side(
    dtype: str, gather: str, pieces: int, tile: CudaTile | None
) -> None:
    """Other widths, other dtypes of results, one of them through the 64-bit form."""
    options: dict[str, Any] = {"gather": gather, "pieces": pieces}
    first = linear_case(dtype, 37, 64, 96, "requant", "int16", **options)
    rows = [linear_case(dtype, 37, 64, 96, "requant", "int16", **options).inputs[0].reshape(
        37, 96)]
    share = [*rows, *([first.inputs[-1]] if gather else [])]
    cases = [first,
             linear_case(dtype, 37, 40, 96, "requant", "int8", share=share, seed=1, **options),
             linear_case(dtype, 37, 100, 96, "requant", "uint8", share=share, seed=2,
                         shifts=(5, 60), **options)]
    run_group(cases, [None] * 3, tile, bool(gather))


@pytest.mark.parametrize("rows", [1, 3])
def test_members_of_few_rows(rows: int) -> None:
    first = linear_case("int16", rows, 64, 96, "requant", "int16")
    other = linear_case("int16", rows, 33, 96, "requant", "int8", share=first.inputs[:1], seed=1)
    run_group([first, other], [None, None], None)


@pytest.mark.parametrize("method", ["poly", "shift", "table"])
@pytest.mark.parametrize("dtype", ["int16", "int8"])
@pytest.mark.parametrize("channels", [False, True])
def test_gelu_behind_a_matmul(method: str, dtype: str, channels: bool) -> None:
    case = linear_case("int8", 21, 68, 96, "requant", dtype, shifts=(34, 44))
    tail = gelu_tail(case.expected, method, channels=channels)
    run_group([case], [tail], SMALL)


@pytest.mark.parametrize("tile", [CudaTile(16, 32, 256, 1, 1, 2, 4),
                                  CudaTile(32, 64, 128, 1, 1, 2, 2)], ids=str)
def test_parts_of_k_finish_with_a_tail(tile: CudaTile) -> None:
    first = linear_case("int16", 21, 68, 300, "requant", "int16", shifts=(34, 44))
    other = linear_case("int16", 21, 40, 300, "requant", "int8", share=first.inputs[:1], seed=4)
    run_group([first, other], [gelu_tail(first.expected, "poly", channels=True), None], tile)


def test_tail_takes_short_forms() -> None:
    """Of magnitude and ramp; packing alone limits the result to its dtype."""
    case = linear_case("int8", 21, 64, 96, "requant", "int16", shifts=(34, 44))
    target = resolve_cuda_target("sm_90")

    def source(out_dtype: str, clamp: tuple[int, int] | None = None) -> str:
        tail = gelu_tail(case.expected, "poly", out_dtype, channels=True, clamp=clamp)
        run_group([case], [tail], SMALL)
        return lower({"k": linears([case.func], [tail[0]], SMALL)}, target)[0]

    whole = source("int8")
    assert "vitq_abs(" in whole and "vitq_ramp(" in whole and "-128" not in whole
    assert "-100" in source("int8", (-100, 127)) and "(-7" not in source("uint8")


def test_tail_of_a_classifier() -> None:
    case = linear_case("int8", 2, 70, 96, "requant", "int16", shifts=(34, 44))
    run_group([case], [gelu_tail(case.expected, "poly", channels=True)], None)


def test_tail_of_several_stages_with_other_axes() -> None:
    """Members of a group may have tails of their own; a tail may see rows as more axes."""
    case = linear_case("int8", 24, 64, 32, "requant", "int8")
    other = linear_case("int8", 24, 32, 32, "requant", "int16", share=case.inputs[:1], seed=3)
    rng = np.random.default_rng(5)
    table = rng.integers(-100, 100, 256).astype("int8")
    gain = rng.integers(-9, 9, 64).astype("int32")
    by_row = rng.integers(-1000, 1000, (2, 12)).astype("int16")
    x = te.placeholder((2, 12, 64), "int8", name="x")
    looked = te.placeholder((256,), "int8", name="table")
    gains = te.placeholder((64,), "int32", name="gain")
    rows = te.placeholder((2, 12), "int16", name="by_row")
    stage = te.compute(x.shape, lambda *i: looked(x(*i).astype("int32") + 128).astype("int32"))
    out = te.compute(x.shape, lambda b, i, n: (
        stage(b, i, n) * gains(n) + rows(b, i).astype("int32")).astype("int16"), name="out")
    func = te.create_prim_func([x, looked, gains, rows, out])
    codes = case.expected.reshape(2, 12, 64).astype(int)
    expected = (table[codes + 128].astype(int) * gain + by_row[..., None]).astype("int16")
    run_group([case, other], [(func, [table, gain, by_row], expected), None], SMALL)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 80), st.integers(1, 140),
       st.sampled_from(["int8", "uint8", "int16"]), st.booleans(), st.integers(0, 99))
def test_any_group(rows: int, columns: int, others: int, depth: int, dtype: str, extreme: bool,
                   seed: int) -> None:
    first = linear_case(dtype, rows, columns, depth, "requant", "int16", extreme=extreme,
                        seed=seed)
    other = linear_case(dtype, rows, others, depth, "requant", "int8", share=first.inputs[:1],
                        extreme=extreme, seed=seed + 1)
    run_group([first, other], [None, None], None)


def test_expressions() -> None:
    x = te.placeholder((5, 7), "int8", name="x")
    table = te.placeholder((256,), "int8", name="t")
    k = te.reduce_axis((0, 7), "k")
    top = te.compute((5,), lambda i: te.max(x(i, k), axis=k), name="top")

    def element(i: Any, j: Any) -> Any:
        value = table(x(i, j).astype("int32") + 128).astype("int32") - top(i).astype("int32")
        return tirx.Select(value > 3, value * value, tirx.if_then_else(value < 0, -1, 7))

    out = te.compute((5, 7), element, name="out")
    stages = stages_of(te.create_prim_func([x, table, out]))
    assert [(s.name, s.kind, len(s.axes), len(s.reduced)) for s in stages] == [
        ("top", "Max", 1, 1), ("out", "map", 2, 0)]
    assert {node.source.name for node in loads_of(stages[1].value)} == {"x", "t", "top"}
    row = tirx.Var("row", "int32")
    last = stages[1]
    value = substitute(last.value, {stages[0].buffer: lambda indices: indices[0]},
                       dict(zip(last.axes, (row, tirx.const(2, "int32")), strict=True)))
    assert "top" not in str(value) and "row" in str(value)
    read = Expressions(None, {row: tirx.const(1, "int32")}, lambda node, _: node)
    assert "row" not in str(read.code(row + 4))
