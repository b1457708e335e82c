"""What is known of one task while it is tuned, and how much more there may be to gain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from schedules.isa import ISA
from schedules.records import Record
from schedules.space import Space, space_of
from schedules.task import Point

from .extract import Job
from .runner import Runner
from .search import Search, name_of

__all__ = ["Limits", "TaskState"]

_HOPE = 0.15
"""Share of its time that a task which was never tuned may be expected to lose."""


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many trials, or so many seconds; None for no limit."""

    trials: int | None = None
    seconds: float | None = None
    batch: int = 8


@dataclass
class TaskState:
    """One task's search, its best point so far, and what was measured.

    Parameters
    ----------
    job, isa
        The task, and what it is tuned for.
    space
        Its space.
    search
        Its search.
    point
        What is used now: the incumbent.
    ratio
        Its time over the default's.
    seconds
        Its time; None before it was measured.
    share
        Of the peak.
    settled
        Whether a record says that the incumbent is the best of what was tried.
    trials, rejected
        Points measured, and why some were not kept.
    barren
        Batches since the incumbent changed.
    audited
        Whether the incumbent was compared with the default in other processes, too.
    broken
        Whether not even the default's kernel can be built.
    busy
        Whether a runner has it.
    start
        Best ratio before the run.
    curve
        (seconds since the start, trials, best ratio) after every trial.
    """

    job: Job
    isa: ISA
    space: Space
    search: Search
    point: Point
    ratio: float = 1.0
    seconds: float | None = None
    share: float | None = None
    settled: bool = False
    trials: int = 0
    rejected: list[str] = field(default_factory=list)
    barren: int = 0
    audited: bool = False
    broken: bool = False
    busy: bool = False
    start: float = 1.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)

    @staticmethod
    def of(
        job: Job, isa: ISA, records: Iterable[Record], seeds: Iterable[Point], threads: int
    ) -> TaskState:
        """Start where the records stopped."""
        space = space_of(job.task, isa)
        assert space is not None
        state = TaskState(job, isa, space, Search(space, seeds), space.default)
        best: Record | None = None
        for record in records:
            if record.threads != threads or record.of != job.task or record.point not in space:
                continue
            if record.what == "best":
                if best is None or record.when >= best.when:
                    best = record
            elif name_of(record.point) != name_of(space.default):
                state.search.tell(record.point, record.ratio)
                state.trials += 1
        if best is not None:
            state.point, state.ratio, state.settled = best.point, best.ratio, True
            state.start = best.ratio
            state.seconds, state.share, state.audited = best.seconds, best.share, best.audited
        return state

    @property
    def held(self) -> float:
        """Best ratio so far: ``ratio`` is measured anew with every batch, and has its noise."""
        return self.curve[-1][2] if self.curve else self.start

    def mark(self, seconds: float, ratio: float) -> None:
        """Go on with the curve."""
        self.curve.append((seconds, self.trials, ratio))

    def share_at(
        self, runner: Runner, point: Point, seconds: float, threads: int
    ) -> float | None:
        """Return the share of the peak that a time means; None if it is no matmul, or unknown."""
        task = self.job.task
        if not self.job.macs:
            return None
        dot = str(point.get("dot") or "")
        if not dot:
            left, _, right = task.fields["dtypes"].partition("→")[0].partition("*")
            dot = self.isa.dot(left, right.partition("+")[0])
        chain = int(point.get("chain") or task.fields.get("chain", 0))
        peak = runner.peak(dot, max(1, chain) if dot == self.isa.proved8 else 1)
        return self.job.macs / seconds / 1e9 / peak / threads if peak else None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to try."""
        return self.broken or (self.search.exhausted and self.settled)

    @property
    def total(self) -> float:
        """Seconds of all calls of the model, measured or guessed."""
        if self.seconds is None:
            return self.job.guess
        return self.seconds * self.job.calls

    @property
    def hope(self) -> float:
        """Seconds of a model's run that more trials may be expected to save.

        It halves with every batch that brought nothing.
        """
        return self.total * _HOPE * (0.5 if self.settled else 1.0) * 0.5**self.barren
