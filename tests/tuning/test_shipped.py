"""Records that ship: which tasks they are made of, and that compile takes them by default."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tvm import relax

from benchmarks.shipped import full_range, widened
from relay_passes.dialect.linear import linear_requant
from schedules.isa import AVX2
from schedules.records import RecordFile, Schedules, versions
from schedules.space import space_of
from tvm_vitq.tuning.extract import Job, job_of, kernel_of

SHIPPED = Path(__file__).parents[2] / "schedules" / "shipped"


def _job(rows: int, depth: int, columns: int, most: int = 20) -> Job:
    rng = np.random.default_rng(0)
    w = rng.integers(-most, most, (depth, columns)).astype("int8")
    x = relax.Var("x", relax.TensorType((1, rows, depth), "int8"))
    call = linear_requant(x, w, np.arange(columns, dtype="int32"),
                          np.full(columns, 1 << 30, "int32"), np.full(columns, 40, "int32"),
                          0, -127, 127, "int8")  # fmt: skip
    job = job_of(call, [x], [(-127, 127, None)], AVX2, 3)
    assert job is not None
    return job


@pytest.mark.parametrize(("shape", "wide"), [
    ((197, 192, 192), (197, 384, 384)), ((197, 192, 768), (197, 1536, 384)),
    ((1, 192, 1000), (1, 1000, 384)), ((196, 768, 192), (196, 384, 768))])  # fmt: skip
def test_widened(shape: tuple[int, int, int], wide: tuple[int, ...]) -> None:
    """``shape`` is M, K, N; a task's is M, N, K."""
    made = widened(_job(*shape), AVX2, 2)
    assert made is not None and made.task.shape == wide and made.calls == 3
    space = space_of(made.task, AVX2)
    assert space is not None
    kernel_of(made, space.default, AVX2)
    (result,) = made.expected(made.inputs(0, True))
    assert result.shape == (1, *wide[:2])


def test_full_range() -> None:
    job = _job(197, 192, 192)
    assert job.task.fields["chain"] > 0
    made = full_range(job, AVX2)
    assert made is not None and made.task.fields == {**job.task.fields, "chain": 0}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_what_ships_can_be_used(path: Path) -> None:
    """Of this TVM and these kernels, points of their spaces, one best a task, none slower."""
    file = RecordFile(path)
    records = file.read(path.stem)
    assert file.refused == [] and records
    isa = {"avx2": AVX2}[path.stem]
    for record in records:
        space = space_of(record.of, isa)
        assert record.what == "best" and space is not None and record.point in space
        assert record.ratio <= 1.0 and record.threads == 1 and record.versions == versions()
    keys = [record.of.key for record in records]
    assert len(set(keys)) == len(keys)
    assert all(json.loads(line)["key"] in set(keys) for line in path.read_text().splitlines())


@pytest.mark.parametrize("width", [192, 384, 768])
def test_the_usual_models_are_known(width: int) -> None:
    known = Schedules.shipped(AVX2)
    for shape in ((197, width, width), (196, 768, width)):
        job = full_range(_job(*shape), AVX2)
        assert job is not None
        known.point(job.task)
    assert (197, width, width) in [task.shape for task in known.hits.values()]
