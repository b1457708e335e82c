"""The default schedule is a point of every space, and no point changes a bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from schedules.gemm import Tile
from schedules.isa import AVX2, AVX512BW, AVX512VNNI, DOTPROD, GENERIC, I8MM, ISA, NEON
from schedules.space import Space, space_of
from schedules.spaces import SPACES
from schedules.spaces.linear import linear_task
from schedules.spaces.rows import CACHE_BYTES, default_rows
from schedules.task import Task
from tests.helpers.kernels import make_linear, make_matmul

SETS = [AVX2, AVX512BW, AVX512VNNI, NEON, DOTPROD, I8MM]


def _tasks(rows: int, columns: int, depth: int, isa: ISA) -> list[Task]:
    chain = 2 if isa.proved8 or isa is NEON else 0
    return [
        linear_task("linear_requant", (rows, columns, depth), "int8", "int8", "", chain),
        linear_task("linear_requant_add", (rows, columns, depth), "int16", "int16", "int16", 0),
        Task.of("matmul", op="matmul_nt", shape=[3, rows, columns, depth],
                dtypes="int8*int8→int16", strides=[True, True, False]),
        Task.of("rows", op="softmax", shape=[rows, columns], dtypes="int16→int16", local=4 * depth,
                loops="0"),
    ]  # fmt: skip


def _space(task: Task, isa: ISA) -> Space:
    space = space_of(task, isa)
    assert space is not None
    return space


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3200), st.integers(8, 3072), st.integers(1, 3072), st.integers(0, 2**31))
def test_spaces(isa: ISA, rows: int, columns: int, depth: int, seed: int) -> None:
    for task in _tasks(rows, columns, depth, isa):
        space, rng = _space(task, isa), random.Random(seed)
        ranked = space.ranked()
        assert space.default in space and ranked[0] == space.default
        assert len({str(sorted(point.items())) for point in ranked}) == len(ranked)
        assert all(point in space for point in ranked)
        assert space.neighbour(rng.choice(ranked), rng) in space
        other = _space(_tasks(rows + 7, columns, depth, isa)[0], isa)
        moved = space.nearest(other.default)
        assert moved is None or moved in space
        assert space.nearest({"no": 1}) is None


def test_every_kind_has_a_space_and_generic_targets_none() -> None:
    kinds = {task.kind for task in _tasks(10, 16, 16, AVX2)}
    assert kinds | {"gpu_linear", "gpu_attention"} == set(SPACES)
    assert all(space_of(task, GENERIC) is None for task in _tasks(10, 16, 16, GENERIC))
    assert space_of(Task.of("unknown", op="x", shape=[1], dtypes=""), AVX2) is None


@pytest.mark.parametrize("target,isa", [("x86-64-v3", AVX2), ("native", None)], ids=str)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_point_of_a_linear_is_exact(target: str, isa: ISA | None, data: st.DataObject) -> None:
    from schedules.isa import isa_for, resolve_target

    isa = isa or isa_for(resolve_target(target))
    rows, columns, depth = (data.draw(st.integers(1, most)) for most in (70, 100, 90))
    chain = 2 if isa.proved8 and rows >= 8 else 0
    task = linear_task("linear_requant_add", (rows, columns, depth), "int8", "int16", "int16",
                       chain)
    point = data.draw(st.sampled_from(_space(task, isa).ranked()))
    assume(point["dot"] != isa.proved8 or chain)
    kernel = make_linear(rows, columns, depth, target, "requant_add", out_dtype="int16",
                         extreme=data.draw(st.booleans()), largest_weight=30 if chain else 127,
                         point=point)
    assert kernel.plan.dot.name == point["dot"]
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", ["x86-64-v3", "native"])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_point_of_a_matmul_is_exact(target: str, data: st.DataObject) -> None:
    from schedules.isa import isa_for, resolve_target

    isa = isa_for(resolve_target(target))
    rows, columns, depth = (data.draw(st.integers(1, 80)) for _ in range(3))
    task = Task.of("matmul", op="matmul", shape=[2, rows, columns, depth],
                   dtypes="int8*int8→int16", strides=[False] * 3)
    point = data.draw(st.sampled_from(_space(task, isa).ranked()))
    kernel = make_matmul((2, rows, columns, depth), target, data.draw(st.booleans()),
                         extreme=data.draw(st.booleans()), tile=Tile.of(point))
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize(("isa", "columns", "width"), [
    (AVX512VNNI, 197, 32), (AVX512VNNI, 49, 32), (AVX512VNNI, 20, 16), (AVX2, 197, 16),
    (AVX2, 10, 8), (NEON, 197, 8)])  # fmt: skip
def test_vectors_of_rows_are_as_wide_as_may_be(isa: ISA, columns: int, width: int) -> None:
    assert default_rows(isa, 64, columns, 4 * columns) == {
        "block": min(8, CACHE_BYTES // (4 * columns)), "width": width}  # fmt: skip
