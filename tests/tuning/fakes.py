"""A machine whose kernels take the time that a formula says: tuning without a clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schedules.isa import AVX2
from schedules.records import RecordFile
from schedules.task import Point
from tests.helpers.dialect import module
from tvm_vitq.tuning.extract import Job
from tvm_vitq.tuning.runner import Comparison, KernelFault
from tvm_vitq.tuning.tune import Limits, Tuning

__all__ = ["FakeBuilder", "FakeRunner", "fake_tuning", "jobs", "seconds"]


def jobs(*shapes: tuple[int, int, int]) -> list[Job]:
    """Return jobs of weight matmuls; their modules are never built."""
    from schedules.spaces.linear import linear_task

    found = []
    for shape in shapes or ((197, 192, 192), (197, 768, 192), (49, 96, 384)):
        task = linear_task("linear_requant", shape, "int8", "int8", "", 2)
        found.append(Job(task, module, [], 3))  # type: ignore[arg-type]
    return found


def seconds(point: Point) -> float:
    """Return a time with one valley, at 4 x 2 in 4 parts."""
    far = abs(point["rows"] - 4) + 2 * abs(point["vectors"] - 2) + abs(point["chunks"] - 4) / 4
    return 1e-4 * (1 + 0.05 * far + 0.01 * point["by_rows"] + 0.02 * (point["unroll"] - 1))


class FakeBuilder:
    """Writes the point where the kernel would be; counts what was asked for."""

    def __init__(self, broken: Callable[[Point], bool] = lambda _: False) -> None:
        self.broken = broken
        self.asked: list[tuple[str, Point]] = []

    def build(self, job: Job, points: Sequence[Point], folder: Path) -> list[Path | str]:
        made: list[Path | str] = []
        for number, point in enumerate(points):
            self.asked.append((job.task.key, point))
            if self.broken(point):
                made.append("no answer within 60 s")
                continue
            out = folder / f"kernel{number}"
            out.mkdir()
            (out / "point.json").write_text(json.dumps(point))
            made.append(out)
        return made

    def close(self) -> None:
        pass


class FakeRunner:
    """Returns the formula's times with noise; rejects what ``wrong`` says."""

    where = "fake"

    def __init__(
        self, time: Callable[[Point], float] = seconds,
        wrong: Callable[[Point], bool] = lambda _: False, noise: float = 0.002, **more: Any,
    ) -> None:
        self.time, self.wrong, self.noise = time, wrong, noise
        self.rng = np.random.default_rng(0)
        self.measured: list[Point] = []
        self.hook: Callable[[], None] = more.get("hook", lambda: None)

    def compare(self, job: Job, base: Path, other: Path, rounds: int) -> Comparison:
        points = [json.loads((path / "point.json").read_text()) for path in (base, other)]
        self.hook()
        if self.wrong(points[1]):
            raise KernelFault("3 wrong outputs")
        if rounds == 10 and base != other:
            self.measured.append(points[1])
        drift = self.rng.uniform(1, 2, rounds)  # a busy machine: both are slower together
        times = [self.time(p) * drift * self.rng.normal(1, self.noise, rounds) for p in points]
        return Comparison(*times)

    def peak(self, _dot: str, _chain: int) -> float | None:
        return 100.0

    def close(self) -> None:
        pass


def fake_tuning(folder: Path, trials: int, *shapes: tuple[int, int, int],
                builder: FakeBuilder | None = None, **options: Any) -> Tuning:
    """Return a run on fakes."""
    return Tuning(jobs(*shapes), AVX2, RecordFile.of(folder, AVX2), builder or FakeBuilder(),
                  Limits(trials), host="fake", **options)
