"""The tuning run on a machine whose times are known: what is found, kept, resumed and rejected."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from schedules.isa import AVX2
from schedules.records import Schedules
from schedules.task import Point
from tests.tuning.fakes import FakeBuilder, FakeRunner, fake_tuning, jobs, seconds
from tvm_vitq.tuning.runner import KernelFault, RunnerFault
from tvm_vitq.tuning.search import Search, name_of
from tvm_vitq.tuning.tune import Limits, Tuning


def _points(tuning: Tuning) -> list[tuple[str, str]]:
    return [(r.of.key, name_of(r.point)) for r in tuning.records.read() if r.what == "trial"]


def test_finds_the_valley_and_says_what_was_gained(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 360)
    tuning.run([FakeRunner])
    assert tuning.trials == 360 and not tuning.starved and tuning.known == 0
    best = Schedules.of_folder(AVX2, tmp_path)
    for state in tuning.states:
        fastest = min(seconds(point) for point in state.space.points())
        assert seconds(state.point) <= 1.02 * fastest
        assert state.ratio == pytest.approx(seconds(state.point) / seconds(state.space.default),
                                            rel=0.02)
        assert best.point(state.job.task) == state.point
        assert state.share is not None and state.curve[-1][2] == state.ratio
    assert 1.05 < tuning.gain < 1.5


def test_noise_alone_takes_nobody_s_place(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 150)
    tuning.run([lambda: FakeRunner(lambda _point: 1e-4, noise=0.05)])
    assert all(state.point == state.space.default and state.settled for state in tuning.states)
    assert tuning.gain == 1.0


def test_what_wins_in_one_process_only_goes(tmp_path: Path) -> None:
    """The process that searches sees kernels of 8 rows faster than the others do."""
    opened: list[FakeRunner] = []

    def open_runner() -> FakeRunner:
        def time(point: Point) -> float:
            if point["rows"] != 8:
                return 1e-4
            return 0.9e-4 if runner is opened[0] else 1.02e-4

        runner = FakeRunner(time)
        opened.append(runner)
        return runner

    tuning = fake_tuning(tmp_path, 600)
    won: list[bool] = []
    tuning.report = lambda: won.append(any(s.point["rows"] == 8 for s in tuning.states))
    tuning.run([open_runner])
    assert any(won) and len(opened) == 3
    known = Schedules.of_folder(AVX2, tmp_path)
    for state in tuning.states:
        assert state.point == state.space.default and state.ratio == 1.0
        assert known.point(state.job.task) is None


def test_time_is_kept_for_the_last_look(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 10**6)
    tuning.limits = Limits(None, 100.0)
    assert not tuning.expired
    tuning._start -= 95
    assert not tuning.expired
    for state in tuning.states:
        state.point = state.space.ranked()[1]
    assert tuning.expired
    for state in tuning.states:
        state.audited = True
    assert not tuning.expired


def test_the_last_look_ends_in_time_and_is_made_later(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 200)
    tuning.limits = Limits(200, 1e6)

    def late() -> None:
        if tuning.trials == 200:
            tuning._start = time.monotonic() - 2e6

    tuning.report = late
    tuning.run([FakeRunner])
    assert any("no time left to compare" in note for note in tuning.notes)
    assert not any(record.audited for record in tuning.records.read())
    again = fake_tuning(tmp_path, 1)
    assert again.known == 200 and all(not state.audited for state in again.states)
    again.run([FakeRunner])
    best = [r for r in again.records.read() if r.what == "best" and r.audited]
    assert {r.of.key for r in best} == {state.job.task.key for state in again.states}
    assert all(state.audited for state in fake_tuning(tmp_path, 1).states)


def test_a_task_is_free_when_its_folder_is_gone(tmp_path: Path) -> None:
    """A job names the folder that it is saved in; another runner's batch has its own."""
    class Saving(FakeBuilder):
        def build(self, job: Any, points: Any, folder: Path) -> Any:
            if job._folder is None:
                job._folder = folder
            time.sleep(0.001)
            assert job._folder == folder
            return super().build(job, points, folder)

    tuning = fake_tuning(tmp_path, 200, (197, 192, 192), builder=Saving())
    tuning.run([FakeRunner, FakeRunner])
    assert tuning.trials == 200 and tuning.notes == []


def test_a_default_that_fails_costs_a_runner_not_the_run(tmp_path: Path) -> None:
    """A GPU that a kernel has spoilt rejects everything until the process is another."""
    class Spoilt(FakeRunner):
        spoilt = False

        def compare(self, *args: Any) -> Any:
            if self.spoilt or (len(opened) == 1 and len(self.measured) == 20):
                self.spoilt = True
                raise KernelFault("illegal memory access")
            return super().compare(*args)

    opened: list[Spoilt] = []

    def open_runner() -> Spoilt:
        opened.append(Spoilt())
        return opened[-1]

    tuning = fake_tuning(tmp_path, 100)
    tuning.run([open_runner])
    assert tuning.trials == 100 and len(opened) >= 2
    assert any("illegal memory access" in note for note in tuning.notes)


def test_no_default_can_be_built(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 10, builder=FakeBuilder(lambda _point: True))
    tuning.run([FakeRunner])
    assert tuning.starved and "does not build" in tuning.failures[-1]


def test_one_wrong_output_is_enough_to_be_rejected(tmp_path: Path) -> None:
    def wrong(point: Point) -> bool:
        return point["rows"] == 4

    tuning = fake_tuning(tmp_path, 200)
    tuning.run([lambda: FakeRunner(wrong=wrong)])
    records = tuning.records.read()
    assert records and not any(wrong(record.point) for record in records)
    assert all("3 wrong outputs" in state.rejected for state in tuning.states)
    assert not any(wrong(state.point) for state in tuning.states)


def test_what_does_not_build_is_rejected_too(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 100, builder=FakeBuilder(lambda point: point["unroll"] == 2))
    tuning.run([FakeRunner])
    assert all(record.point["unroll"] == 1 for record in tuning.records.read())
    assert any("no answer within 60 s" in state.rejected for state in tuning.states)


def test_a_task_that_cannot_be_built_is_left_alone(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 40, builder=FakeBuilder(lambda point: True))
    tuning.run([FakeRunner])
    assert tuning.trials == 0 and len(tuning.notes) == len(tuning.states)
    assert "the default schedule does not build" in tuning.notes[0]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = fake_tuning(tmp_path, 100)
    first.run([FakeRunner])
    before = _points(first)
    second = fake_tuning(tmp_path, 120)
    assert [state.point for state in second.states] == [state.point for state in first.states]
    second.run([FakeRunner])
    after = _points(second)
    assert len(before) == 100 and after[:100] == before and len(after) == 220
    assert max(Counter(after).values()) == 1


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    tuning = fake_tuning(tmp_path, 10_000)

    def interrupt() -> None:
        if tuning.trials == 40:
            raise KeyboardInterrupt

    tuning.report = interrupt
    with pytest.raises(KeyboardInterrupt):
        tuning.run([FakeRunner])
    assert len(_points(tuning)) == 40


def test_a_failed_runner_loses_nothing(tmp_path: Path) -> None:
    opened: list[Any] = []

    class Failing(FakeRunner):
        where = f"board {len(opened)}"

        def compare(self, *args: Any) -> Any:
            if len(self.measured) == 11:
                raise RunnerFault("gone")
            return super().compare(*args)

    def open_runner() -> FakeRunner:
        opened.append(Failing() if len(opened) < 4 else FakeRunner())
        return opened[-1]

    tuning = fake_tuning(tmp_path, 150)
    tuning.run([open_runner, open_runner])
    assert len(_points(tuning)) == 150 and max(Counter(_points(tuning)).values()) == 1
    assert all(state.settled for state in tuning.states)
    failed = [one for one in opened if isinstance(one, Failing) and len(one.measured) == 11]
    assert len(opened) > 4 and len(failed) >= 3
    assert sum("gone" in note for note in tuning.notes) == len(failed)


def test_a_machine_that_only_fails_ends_the_run(tmp_path: Path) -> None:
    def broken() -> FakeRunner:
        raise RunnerFault("no board")

    tuning = fake_tuning(tmp_path, 50)
    tuning.run([broken])
    assert tuning.trials == 0 and tuning.notes.count("runner: no board") == 3
    assert tuning.starved


def test_similar_tasks_start_from_each_other(tmp_path: Path) -> None:
    fake = fake_tuning(tmp_path, 300, (197, 192, 192))
    fake.run([FakeRunner])
    runner = FakeRunner()
    more = fake_tuning(tmp_path, 8, (145, 192, 192))
    more.run([lambda: runner])
    assert runner.measured[0] == fake.states[0].point
    assert more.states[0].point == fake.states[0].point
    alone = fake_tuning(tmp_path, 1, (150, 192, 192), transfer=False)
    alone.run([FakeRunner])
    assert _points(alone)[-1][1] != name_of(fake.states[0].point)


def test_records_that_are_slower_here_are_not_kept(tmp_path: Path) -> None:
    fake_tuning(tmp_path, 100, (197, 192, 192)).run([FakeRunner])
    slow = fake_tuning(tmp_path, 30, (197, 192, 192))
    assert slow.states[0].point != slow.states[0].space.default
    slow.run([lambda: FakeRunner(lambda point: 1e-4 if point == slow.states[0].space.default
                                 else 2e-4)])
    assert slow.states[0].point == slow.states[0].space.default
    assert Schedules.of_folder(AVX2, tmp_path).point(slow.states[0].job.task) is None


def test_the_search_ends_when_a_space_is_whole(tmp_path: Path) -> None:
    (job,) = jobs((2, 24, 16))
    tuning = fake_tuning(tmp_path, 10_000, (2, 24, 16))
    tuning.run([FakeRunner])
    (state,) = tuning.states
    assert state.done and state.trials == len(list(state.space.points())) - 1
    search = Search(state.space)
    assert len(search.propose(10_000)) == state.trials and search.propose(1) == []
    assert job.task == state.job.task
