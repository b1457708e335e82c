"""Tasks of a model are those that compile looks up; every point of their spaces is exact."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.pipeline import build_passes
from relay_passes.split_boundary import SplitBoundary
from schedules.calling import PIPELINE
from schedules.isa import ISA, isa_for, resolve_target
from schedules.records import Schedules
from schedules.space import space_of
from schedules.task import Point, Task
from tvm_vitq.reference.interpreter import Interpreter
from tvm_vitq.tuning.clock import ProcessorClock
from tvm_vitq.tuning.extract import Job, extract
from tvm_vitq.tuning.worker import Loaded, build

TARGETS = ["x86-64-v3", "native"]


class _Random(Schedules):
    """Any point for every task."""

    def __init__(self, isa: ISA, seed: int) -> None:
        super().__init__(isa)
        self.rng = random.Random(seed)
        self.chosen: dict[str, Point] = {}

    def point(self, task: Task) -> Point | None:
        space = space_of(task, self.isa)
        assert space is not None
        if task.key not in self.chosen:
            self.chosen[task.key] = self.rng.choice(space.ranked())
        return self.chosen[task.key]


@pytest.mark.parametrize("name", [*TARGETS, "aarch64", "aarch64+dotprod", "aarch64+i8mm"])
def test_tasks_are_what_compile_looks_up(integer: tvm.IRModule, name: str) -> None:
    target = resolve_target(name)
    schedules = Schedules(isa_for(target))
    with target:
        tvm.transform.Sequential(build_passes(schedules.isa, schedules))(integer)
    jobs = {job.task.key: job for job in extract(integer, schedules.isa)}
    assert jobs.keys() == schedules.misses.keys()
    assert {job.task.kind for job in jobs.values()} == {"linear", "matmul", "rows"}
    assert any(job.calls > 1 for job in jobs.values())
    assert all(job.macs > 0 for job in jobs.values() if job.task.kind != "rows")


def test_a_saved_job_is_the_same(integer: tvm.IRModule, tmp_path: Path) -> None:
    for job in extract(integer, isa_for(resolve_target("x86-64-v3"))):
        again = Job.load(job.save(tmp_path / job.task.key))
        assert again.task == job.task and again.intervals == job.intervals
        for extreme in (False, True):
            inputs = again.inputs(3, extreme)
            for one, other in zip(again.expected(inputs), job.expected(inputs), strict=True):
                np.testing.assert_array_equal(one, other)
            for value, (lo, hi, total) in zip(inputs, job.intervals, strict=True):
                assert value.min() >= min(lo, 0 if total else lo) and value.max() <= hi
                assert total is None or value.astype("int64").sum(-1).max() <= total


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_point_is_exact(
    integer: tvm.IRModule, name: str, tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    target = resolve_target(name)
    isa = isa_for(target)
    job = data.draw(st.sampled_from(extract(integer, isa)))
    space = space_of(job.task, isa)
    assert space is not None
    point = data.draw(st.sampled_from(space.ranked()))
    folder = tmp_path_factory.mktemp("kernel")
    build(job.save(folder / "job"), point, folder / "out", target)
    assert Loaded(folder / "job", folder / "out", ProcessorClock()).wrong == 0


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_the_same_with_any_schedules(
    integer: tvm.IRModule, name: str, seed: int
) -> None:
    target = resolve_target(name)
    schedules = _Random(isa_for(target), seed)
    split = tvm.transform.Sequential([SplitBoundary()])(integer)
    with target:
        kernels = tvm.transform.Sequential(build_passes(schedules.isa, schedules))(integer)
        built = relax.build(kernels, target, relax_pipeline=None, tir_pipeline=PIPELINE)
    assert schedules.chosen
    shape = [int(n) for n in split["main_codes"].params[0].ty.shape.values]
    rng = np.random.default_rng(seed)
    vm = relax.VirtualMachine(built, tvm.cpu())
    for x in (rng.integers(-128, 128, shape), rng.choice([-128, 127], shape)):
        codes = x.astype("int8")
        logits = vm["main_codes"](tvm.runtime.tensor(codes)).numpy()
        np.testing.assert_array_equal(logits, Interpreter(split, "main_codes")(codes))
