"""Kernels built and timed in processes of their own: faults stay there; kill -9 loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm

from schedules.isa import isa_for, resolve_target
from schedules.records import RecordFile
from schedules.space import space_of
from tvm_vitq.tuning.build import Builders
from tvm_vitq.tuning.extract import Job, extract
from tvm_vitq.tuning.runner import KernelFault, LocalRunner, RunnerFault

TARGET = "native"
ISA = isa_for(resolve_target(TARGET))


@pytest.fixture(scope="module")
def builders() -> Iterator[Builders]:
    made = Builders(TARGET, 1)
    yield made
    made.close()


@pytest.fixture
def runner() -> Iterator[LocalRunner]:
    made = LocalRunner(TARGET, timeout=20)
    yield made
    made.close()


@pytest.fixture
def job(integer: tvm.IRModule) -> Job:
    return next(j for j in extract(integer, ISA) if j.task.kind == "linear")


def _built(job: Job, builders: Builders, folder: Path) -> list[Path]:
    space = space_of(job.task, ISA)
    assert space is not None
    found = builders.build(job, space.ranked()[:2], folder)
    assert all(isinstance(made, Path) for made in found)
    return [Path(made) for made in found]


def test_two_kernels_are_timed_turn_about(
    job: Job, builders: Builders, runner: LocalRunner, tmp_path: Path
) -> None:
    base, other = _built(job, builders, tmp_path)
    found = runner.compare(job, base, other, 6)
    assert len(found.base) == len(found.other) == 6
    assert 0 < found.seconds < 0.1 and found.ratio > 0 and found.noise >= 0
    assert runner.compare(job, base, base, 6).ratio == pytest.approx(1, abs=0.5)
    if ISA.dot8.startswith("vp"):
        assert (runner.peak(ISA.dot8, 1) or 0) > 1
    assert runner.peak("abacus", 1) is None


def test_one_wrong_code_is_a_fault(
    job: Job, builders: Builders, runner: LocalRunner, tmp_path: Path
) -> None:
    base, other = _built(job, builders, tmp_path)
    with np.load(tmp_path / "job" / "expected1.npz") as held:
        (expected,) = (held[name].copy() for name in held.files)
    expected.flat[7] ^= 1
    np.savez(tmp_path / "job" / "expected1.npz", expected)
    with pytest.raises(KernelFault, match="1 wrong outputs"):
        runner.compare(job, base, other, 6)


def test_a_crash_and_a_hang_end_one_comparison_only(
    job: Job, builders: Builders, runner: LocalRunner, tmp_path: Path
) -> None:
    base, other = _built(job, builders, tmp_path)
    whole = (other / "kernel.so").read_bytes()
    (other / "kernel.so").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KernelFault):
        runner.compare(job, base, other, 6)
    (other / "kernel.so").write_bytes(whole)
    runner.compare(job, base, other, 6)
    process = runner._child._process
    assert process is not None
    runner.timeout = 1.0
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(KernelFault, match="no answer within 1 s"):
        runner.compare(job, base, other, 6)
    runner.timeout = 60.0
    runner.compare(job, base, other, 6)
    process = runner._child._process
    assert process is not None
    threading.Timer(0.2, process.kill).start()
    with pytest.raises((KernelFault, RunnerFault), match=r"SIGKILL|has ended"):
        for _ in range(1000):
            runner.compare(job, base, other, 200)


def test_a_builder_that_hangs_is_replaced(job: Job, tmp_path: Path) -> None:
    builders = Builders(TARGET, 1, timeout=60)
    try:
        base, _ = _built(job, builders, tmp_path / "a")
        process = builders._children[0]._process
        assert process is not None and base.exists()
        process.send_signal(signal.SIGSTOP)
        builders.timeout = 0.5
        space = space_of(job.task, ISA)
        assert space is not None
        job._folder = None
        assert builders.build(job, [space.default], tmp_path / "b") == ["no answer within 0.5 s"]
        builders.timeout = 60
        job._folder = None
        assert _built(job, builders, tmp_path / "c")
    finally:
        builders.close()


def _tune(tiny: Path, records: Path, trials: int) -> list[str]:
    return [sys.executable, "-c", "from tvm_vitq.cli import main; main()", "tune", str(tiny),
            "--target", TARGET, "--records", str(records), "--trials", str(trials), "--json"]


def test_kill_9_and_resume(tiny: Path, tmp_path: Path) -> None:
    file = RecordFile.of(tmp_path / "r", ISA)
    process = subprocess.Popen(_tune(tiny, tmp_path / "r", 1000), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 240
    while len(file.read()) < 12:
        assert process.poll() is None and time.monotonic() < end, process.stderr
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = file.read()
    done = subprocess.run(_tune(tiny, tmp_path / "r", 6), capture_output=True, text=True,
                          check=True)
    document = json.loads(done.stdout)
    after = file.read()
    trials = [(r.of.key, json.dumps(r.point, sort_keys=True)) for r in after if r.what == "trial"]
    assert after[: len(before)] == before and max(Counter(trials).values()) == 1
    fresh = len(trials) - sum(r.what == "trial" for r in before)
    assert fresh == document["trials"] - sum(task["rejected"] for task in document["tasks"])
    assert document["trials"] == 6 and not document["stopped"]


def test_a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner, slept = LocalRunner("native"), []
    replies = [{"pairs": []}, {"pairs": [[1.0, 2.0]]}, {"pairs": [[1.0, 2.0]] * 3}]
    monkeypatch.setattr(runner, "_load", lambda *_: None)
    monkeypatch.setattr(runner, "_child", SimpleNamespace(alive=False,
                                                          ask=lambda *_, **__: replies.pop(0)))
    monkeypatch.setattr("time.sleep", slept.append)
    found = runner.compare(None, tmp_path / "a", tmp_path / "b", 10)  # type: ignore[arg-type]
    assert found.ratio == 2.0 and len(found.base) == 4 and len(slept) == 2
    replies += [{"pairs": []}] * 4
    with pytest.raises(RunnerFault, match="too busy"):
        runner.compare(None, tmp_path / "a", tmp_path / "b", 10)  # type: ignore[arg-type]
