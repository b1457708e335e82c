"""Tuning for a GPU on a machine without one: spaces, exact points, the tuner on a fake driver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_vitq
from relay_passes.pipeline import lower
from schedules.cuda.attention_tile import MOST_SHARED_BYTES, AttentionTile
from schedules.cuda.emulate import Emulator
from schedules.cuda.target import ARCHITECTURES
from schedules.cuda.tile import MOST_REGISTERS, CudaTile
from schedules.isa import AVX2, cuda_isa, resolve_target
from schedules.records import Record, RecordFile
from schedules.space import space_of
from schedules.spaces.gpu_attention import gpu_attention_task
from schedules.spaces.gpu_linear import gpu_linear_task
from schedules.task import Task
from tests.helpers.cuda import needs_nvcc
from tests.helpers.fake_cuda import tune
from tvm_vitq.artifact.gpu import architecture_here
from tvm_vitq.artifact.load import Artifact
from tvm_vitq.saved import load_quantized
from tvm_vitq.tuning.extract import Job, extract, kernel_of

SM_90 = cuda_isa("sm_90")
PEAK = 4096 * 1024 * 1024e3
"""Multiply-accumulates a second of the fake driver's GPU: 1024 multiprocessors at 1024 kHz."""
TASKS = [
    gpu_linear_task("linear_requant", 197, [192] * 3, 192, "int8", "int8"),
    gpu_linear_task("linear_requant+gelu", 12608, [3072], 768, "int8", "int8"),
    gpu_linear_task("linear_requant_add", 1576, [768], 3072, "int16", "int16", 8, "x"),
    gpu_attention_task((96, 197, 197, 64), ["int8", "int8", "int16"], 0),
    gpu_attention_task((192, 49, 49, 32), ["int8"] * 3, 1),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spaces(task: Task, arch: str) -> None:
    space = space_of(task, cuda_isa(arch))
    assert space is not None and space_of(task, AVX2) is None
    points = list(space.points())
    assert space.default in points and len(points) >= 6
    if task.kind == "gpu_linear":  # a choice only where there is one
        assert ("wgmma" in space.default) == (arch == "sm_90a")
    size = 2 if "int16→" in task.fields["dtypes"] else 1
    for point in points:
        if task.kind == "gpu_attention":
            tile = AttentionTile(**point)
            assert tile.shared(task.shape[2]) <= MOST_SHARED_BYTES
            assert 32 * tile.rows * tile.split <= 512
            continue
        cut = CudaTile(**point)
        assert cut.shared_bytes(size) < ARCHITECTURES[arch]
        assert cut.threads <= (512 if cut.wgmma else 256)
        assert not cut.wgmma or (arch == "sm_90a" and size == 1)
        assert cut.registers(size) <= MOST_REGISTERS


@pytest.fixture(scope="module")
def jobs(tiny: Path) -> list[Job]:
    return extract(lower(load_quantized(tiny)), SM_90)


def test_tasks(jobs: list[Job]) -> None:
    """The tasks are what compile looks up; each has all that one launch computes."""
    kinds = {job.task.kind for job in jobs}
    assert kinds == {"gpu_linear", "gpu_attention"}
    assert all(job.macs > 0 and space_of(job.task, SM_90) is not None for job in jobs)
    assert "linear_requant+gelu" in {job.task.fields["op"] for job in jobs}
    assert [192 // 6] * 3 in [job.task.fields.get("columns") for job in jobs]  # q, k and v


@settings(deadline=None, max_examples=6)
@given(st.data())
def test_every_point_is_exact(jobs: list[Job], data: st.DataObject) -> None:
    job = data.draw(st.sampled_from(jobs), label="job")
    space = space_of(job.task, SM_90)
    assert space is not None
    point = data.draw(st.sampled_from(space.ranked()), label="point")
    func, arguments = kernel_of(job, point, SM_90)
    emulator = Emulator({"k": func}, resolve_target("sm_90"))
    for extreme in (False, True):
        inputs = job.inputs(data.draw(st.integers(0, 99)), extreme)
        expected = job.expected(inputs)
        given_ones = iter(inputs)
        values = [next(given_ones) if value is None else value for value in arguments]
        results = [np.full_like(value, 85) for value in expected]
        emulator.run("k", *values, *results)
        for result, value in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, value)


def _blocks(task: Task, point: dict[str, int]) -> int:
    """Return how many blocks a kernel is launched with."""
    if task.kind == "gpu_attention":
        entries, rows, *_ = task.shape
        return entries * -(-rows // (16 * point["rows"]))
    columns = sum(-(-count // point["bn"]) for count in task.fields["columns"])
    return columns * -(-task.shape[0] // point["bm"])


@needs_nvcc
@pytest.mark.skipif(bool(architecture_here()), reason="this machine has a GPU")
def test_tuning_on_a_fake_driver(tiny: Path, tmp_path: Path) -> None:
    """Launches recorded as a graph by TVM's own runtime and timed by events, records kept."""
    records = tmp_path / "records"
    records.mkdir()
    found = tune(tiny, records, tmp_path)
    assert found["trials"] == 3 and found["problems"] == [""] and found["notes"] == []
    held = RecordFile.of(records, SM_90).read("sm_90")
    trials = [record for record in held if record.what == "trial"]
    assert len(trials) == 3
    for record in trials:  # the driver's clock counts blocks
        space = space_of(record.of, SM_90)
        assert space is not None and record.share is not None
        macs = np.prod(record.of.shape) * (2 if record.of.kind == "gpu_attention" else 1)
        assert record.share == pytest.approx(macs / record.seconds / PEAK, rel=0.01, abs=1e-4)
        blocks = [_blocks(record.of, point) for point in (record.point, space.default)]
        assert record.ratio == pytest.approx(blocks[0] / blocks[1], abs=1e-3)


@needs_nvcc
def test_compile_uses_records(tiny: Path, tmp_path: Path, jobs: list[Job]) -> None:
    mod = load_quantized(tiny)
    job = next(job for job in jobs if job.task.kind == "gpu_linear")
    space = space_of(job.task, SM_90)
    assert space is not None
    usual = CudaTile(**space.default).threads
    other = next(point for point in space.ranked() if CudaTile(**point).threads != usual)
    (tmp_path / "r").mkdir()
    RecordFile.of(tmp_path / "r", SM_90).append(Record(
        "best", "sm_90", job.task.kind, job.task.fields, other, 1e-5, 0.9, None, 1, "", "2026"))
    made = {}
    for name, records in (("default", "none"), ("tuned", tmp_path / "r")):
        built = tvm_vitq.compile(mod, "sm_90", tmp_path / f"{name}.so", verify_with="emulator",
                                 records=records)  # fmt: skip
        assert built.verify()["equal"] is True
        made[name] = built.metadata
    assert made["default"]["schedules"] == {"hits": 0, "misses": len(jobs), "refused": []}
    assert made["tuned"]["schedules"] == {"hits": 1, "misses": len(jobs) - 1, "refused": []}
    launches = [
        Artifact(tmp_path / f"{name}.so", describe_only=True)._compressed("vitq_kernels")
        for name in made]  # fmt: skip
    threads = [sorted(one["threads"] for one in each["launches"].values()) for each in launches]
    assert threads[0] != threads[1]
