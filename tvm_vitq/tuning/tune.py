"""The tuning run: batches of points built, timed beside the default's kernel, recorded at once.

Each runner takes the task that promises most, a batch of its points, and times each point's kernel
turn about with the default schedule's. The fastest of a batch that looks faster than the incumbent
is timed against it again, longer; it takes its place only if it wins by more than the noise. So the
records are final at any time: the run may be stopped after any trial. A run that is not stopped
ends with a last look at the winners (:mod:`.contest`).
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from schedules.isa import ISA
from schedules.records import Record, RecordFile, Schedules
from schedules.task import Point

from .build import Builder
from .contest import LEAST_GAIN, SECONDS, audit, contest, wins
from .extract import Job
from .runner import Comparison, KernelFault, Runner, RunnerFault
from .search import name_of
from .state import Limits, TaskState

__all__ = ["Limits", "Tuning"]

ROUNDS = 10


@dataclass
class Tuning:
    """One run.

    Parameters
    ----------
    jobs
        The model's tasks.
    isa
        Instruction set.
    records
        Where to write, and what was measured before.
    builder
        Makes kernels.
    limits
        When to stop.
    threads
        Of the kernels.
    host
        Processor that the kernels run on.
    report
        Called after every trial.
    transfer
        Whether to try first what is best for similar tasks.
    """

    jobs: Sequence[Job]
    isa: ISA
    records: RecordFile
    builder: Builder
    limits: Limits
    threads: int = 1
    host: str = ""
    report: Callable[[], None] = lambda: None
    transfer: bool = True
    states: list[TaskState] = field(default_factory=list, init=False)
    trials: int = field(default=0, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    failures: list[str] = field(default_factory=list, init=False)
    left_out: Callable[[], list[str]] = field(default=list, init=False)

    def __post_init__(self) -> None:
        """Read the records, and start the searches from similar tasks' best points."""
        held = self.records.read(self.isa.name)
        refused = Counter(why for _, why in self.records.refused)
        self.notes += [f"{self.records.path.name}: {count} records refused: {why}"
                       for why, count in refused.items()]
        self._known = Schedules.of_folder(self.isa, self.records.path.parent, self.threads)
        self.states = [TaskState.of(job, self.isa, held, self._seeds(job), self.threads)
                       for job in self.jobs]
        self.known = sum(state.trials for state in self.states)
        self._lock = threading.Condition()
        self._stop = threading.Event()
        self._begun = 0
        self._start = time.monotonic()
        self._fault: BaseException | None = None

    def _seeds(self, job: Job) -> list[Point]:
        if not self.transfer:
            return []
        found = {name_of(point): point for point in self._known.nearest(job.task)}
        return list(found.values())[:8]

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds that are left, guessed from the trials so far; None if unknown."""
        if self.limits.seconds is not None:
            return max(0.0, self.limits.seconds - self.elapsed)
        if not self.trials or self.limits.trials is None:
            return None
        return (self.limits.trials - self.trials) * self.elapsed / self.trials

    @property
    def expired(self) -> bool:
        """Whether a limit is reached, or the run was stopped."""
        limits = self.limits
        return (
            self._stop.is_set()
            or (limits.trials is not None and self.trials >= limits.trials)
            or (limits.seconds is not None and self.elapsed >= limits.seconds - self._reserve)
        )

    @property
    def _reserve(self) -> float:
        """Seconds kept for the last comparison: at most a tenth."""
        if self.limits.seconds is None:
            return 0.0
        return min(0.1 * self.limits.seconds, SECONDS * len(self._winners))

    @property
    def _winners(self) -> list[TaskState]:
        """Tasks whose best has not met the default in other processes yet."""
        return [s for s in self.states if not s.audited and s.point != s.space.default]

    @property
    def over(self) -> bool:
        """Whether there is no time or nothing left to try."""
        return self.expired or self.over_all

    @property
    def over_all(self) -> bool:
        """Whether there is nothing left to try."""
        return all(state.done and not state.busy for state in self.states)

    @property
    def starved(self) -> bool:
        """Whether runners or builds failed, and no trial was made."""
        return not (self.trials or self._stop.is_set()) and bool(self.failures)

    @property
    def gain(self) -> float:
        """Time of the model's tasks with default schedules over that with the best ones."""
        best = sum(state.total for state in self.states)
        return sum(state.total / state.ratio for state in self.states) / best if best else 1.0

    def stop(self) -> None:
        """End the run after the trials that are under way."""
        self._stop.set()
        with self._lock:
            self._lock.notify_all()

    def run(self, runners: Sequence[Callable[[], Runner]]) -> None:
        """Tune until :attr:`over`; every runner is opened, used and closed by one thread.

        Parameters
        ----------
        runners
            Open a runner each; a runner that fails is opened again.
        """
        self._start = time.monotonic()
        workers = [threading.Thread(target=self._serve, args=(open_runner,), daemon=True)
                   for open_runner in runners]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
        except KeyboardInterrupt:
            self.stop()
            for worker in workers:
                worker.join(10)
            raise
        if self._fault is not None:
            raise self._fault
        if self._winners:
            left = self.limits.seconds
            end = None if left is None else self._start + left
            audit(self._winners, self.builder, runners[0], self._judge, self._note, end)
            self.report()

    # One runner's thread

    def _serve(self, open_runner: Callable[[], Runner]) -> None:
        runner: Runner | None = None
        faults = 0
        try:
            while (taken := self._take()) is not None:
                state, points = taken
                folder = Path(tempfile.mkdtemp(prefix="tvm-vitq-tune-"))
                try:
                    runner = runner or open_runner()
                    self._batch(state, points, runner, folder)
                    faults = 0
                except RunnerFault as why:
                    faults += 1
                    self._failed(f"{runner.where if runner else 'runner'}: {why}")
                    if runner is not None:
                        runner.close()
                    runner = None
                    if faults >= 3:
                        return
                finally:
                    # Before another runner may take the task: the job would name this folder.
                    state.job._folder = None
                    shutil.rmtree(folder, ignore_errors=True)
                    self._give_back(state, points)
        except BaseException as why:
            self._fault = why
            self.stop()
        finally:
            if runner is not None:
                runner.close()

    def _judge(self, state: TaskState, ratio: float) -> None:
        """Record that a winner is the best, or that the default is."""
        assert state.seconds is not None
        if ratio > 1.0:
            self._note(f"{state.job.task}: what won is no faster in another process")
            state.seconds /= state.ratio
            state.share = None if state.share is None else state.share * state.ratio
            state.point, ratio = state.space.default, 1.0
        state.ratio = ratio
        state.mark(self.elapsed, ratio)
        state.audited = True
        self._append("best", state, state.point, state.seconds, state.ratio, state.share)

    def _note(self, text: str) -> None:
        with self._lock:
            self.notes.append(text)

    def _failed(self, text: str) -> None:
        self.failures.append(text)
        self._note(text)

    def _take(self) -> tuple[TaskState, list[Point]] | None:
        """Wait for a task that no other runner has; None at the end."""
        with self._lock:
            while not self.over:
                free = [s for s in self.states if not s.busy and not s.done]
                if not free or self._begun == self.limits.trials:
                    self._lock.wait(0.2)
                    continue
                fresh = [s for s in free if not s.settled]
                state = max(fresh or free, key=lambda s: s.hope)
                count = self.limits.batch
                if self.limits.trials is not None:
                    count = min(count, self.limits.trials - self._begun)
                state.busy = True
                return state, state.search.propose(count)
        return None

    def _give_back(self, state: TaskState, points: list[Point]) -> None:
        """Free a task; what was not measured of a batch is proposed again."""
        with self._lock:
            state.busy = False
            for point in reversed(points):
                state.search.put_back(point)
            self._lock.notify_all()

    def _batch(
        self, state: TaskState, points: list[Point], runner: Runner, folder: Path
    ) -> None:
        """Measure points; those that were are taken off the list."""
        job, default = state.job, state.space.default
        incumbent = state.point
        wanted = [default, *([incumbent] if incumbent != default else []), *points]
        built = self.builder.build(job, wanted, folder)
        kernels = dict(zip(map(name_of, wanted), built, strict=True))
        base = kernels[name_of(default)]
        if isinstance(base, str):
            state.broken = True
            self._failed(f"{job.task}: the default schedule does not build: {base}")
            return
        self._measure_incumbent(state, runner, kernels)
        found: list[tuple[float, Point, Path]] = []
        for point in list(points):
            if not self._begin_trial():
                break
            kernel = kernels[name_of(point)]
            try:
                comparison = self._trial(state, runner, base, point, kernel)
            except RunnerFault:
                with self._lock:
                    self._begun -= 1
                raise
            points.remove(point)
            if comparison is not None and not isinstance(kernel, str):
                found.append((comparison.ratio, point, kernel))
        self._confirm(state, runner, kernels, sorted(found, key=lambda item: item[0])[:2])

    def _begin_trial(self) -> bool:
        """Count a trial that begins, if there may be another."""
        with self._lock:
            if self.expired or self._begun == self.limits.trials:
                return False
            self._begun += 1
            return True

    def _measure_incumbent(
        self, state: TaskState, runner: Runner, kernels: dict[str, Path | str]
    ) -> None:
        """Bring the incumbent's time up to date; one that is slower than the default goes."""
        base, held = kernels[name_of(state.space.default)], kernels[name_of(state.point)]
        assert isinstance(base, Path)
        if isinstance(held, str):
            state.point, held = state.space.default, base
        try:
            comparison = runner.compare(state.job, base, held, ROUNDS)
        except KernelFault as why:
            if held == base:
                raise RunnerFault(f"the default schedule fails: {why}") from None
            state.rejected.append(str(why))
            state.point, state.settled = state.space.default, False
            try:
                comparison = runner.compare(state.job, base, base, ROUNDS)
            except KernelFault as again:
                raise RunnerFault(f"the default schedule fails: {again}") from None
        if held != base and comparison.ratio - 3 * comparison.noise > 1.0:
            state.point, state.settled = state.space.default, False
        state.ratio = comparison.ratio if state.point != state.space.default else 1.0
        state.seconds = comparison.seconds
        state.share = state.share_at(runner, state.point, state.seconds, self.threads)

    def _trial(
        self, state: TaskState, runner: Runner, base: Path, point: Point, kernel: Path | str
    ) -> Comparison | None:
        """Measure and record one point; None if it is rejected."""
        comparison = None
        try:
            if isinstance(kernel, str):
                raise KernelFault(kernel)
            comparison = runner.compare(state.job, base, kernel, ROUNDS)
        except KernelFault as why:
            state.rejected.append(str(why))
        with self._lock:
            self.trials += 1
            state.trials += 1
            if comparison is not None:
                share = state.share_at(runner, point, comparison.seconds, self.threads)
                self._append("trial", state, point, comparison.seconds, comparison.ratio, share)
                state.search.tell(point, comparison.ratio)
            state.mark(self.elapsed, state.held)
        self.report()
        return comparison

    def _confirm(
        self, state: TaskState, runner: Runner, kernels: dict[str, Path | str],
        fastest: list[tuple[float, Point, Path]],
    ) -> None:
        """Let the fastest of a batch try to take the incumbent's place; record who holds it."""
        before = state.point
        for ratio, point, kernel in fastest:
            held = kernels[name_of(state.point)]
            if isinstance(held, str) or ratio > state.ratio * (1 - LEAST_GAIN):
                continue
            try:
                again = contest(state.job, runner, held, kernel)
            except KernelFault as why:
                state.rejected.append(str(why))
                continue
            if wins(again):
                state.ratio *= again.ratio
                state.point, state.seconds = point, again.seconds
                state.share = state.share_at(runner, point, again.seconds, self.threads)
        with self._lock:
            gained = state.point != before
            state.audited = state.audited and not gained
            state.barren = 0 if gained else state.barren + 1
            if gained or not state.settled:
                assert state.seconds is not None
                self._append("best", state, state.point, state.seconds, state.ratio, state.share)
            state.settled = True
            state.mark(self.elapsed, min(state.ratio, state.held) if gained else state.held)
        self.report()

    def _append(
        self, what: str, state: TaskState, point: Point, seconds: float, ratio: float,
        share: float | None,
    ) -> None:
        task = state.job.task
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.records.append(Record(
            what, self.isa.name, task.kind, task.fields, point, float(f"{seconds:.4g}"),
            round(ratio, 4), None if share is None else round(share, 4), self.threads, self.host,
            now, audited=what == "best" and state.audited))
