"""Who takes whose place: a candidate against the incumbent, and at the end each winner once more.

Where a process finds its memory and its code decides a few hundredths of a small kernel's time, and
that is the same for every comparison in it. So what won in one process is compared with the default
in others, and goes if it is slower in any of them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .build import Builder
from .extract import Job
from .runner import Comparison, KernelFault, Runner, RunnerFault
from .state import TaskState

__all__ = ["LEAST_GAIN", "SECONDS", "audit", "contest", "wins"]

LEAST_GAIN = 0.005
"""A candidate that gains less than this does not replace the incumbent."""
SECONDS = 2.0
"""Roughly what one task takes in the end."""
_MORE_ROUNDS = 40
_PROCESSES = 2


def wins(comparison: Comparison) -> bool:
    """Whether the other is faster by more than the noise, and by enough to matter."""
    return 1 - comparison.ratio > max(LEAST_GAIN, 4 * comparison.noise)


def contest(job: Job, runner: Runner, held: Path, kernel: Path) -> Comparison:
    """Time a candidate against the incumbent until it wins, or is not likely to."""
    base, other = np.empty(0), np.empty(0)
    for _ in range(4):
        more = runner.compare(job, held, kernel, _MORE_ROUNDS)
        base, other = np.append(base, more.base), np.append(other, more.other)
        found = Comparison(base, other)
        if wins(found) or 1 - found.ratio < max(LEAST_GAIN / 2, found.noise):
            break
    return found


def audit(
    states: Sequence[TaskState], builder: Builder, open_runner: Callable[[], Runner],
    judge: Callable[[TaskState, float], None], note: Callable[[str], None],
    end: float | None = None,
) -> None:  # fmt: skip
    """Compare each state's point with the default in processes that have not seen either.

    Parameters
    ----------
    states
        Tasks whose best is another than the default.
    builder
        Makes kernels.
    open_runner
        Opens a runner that has not run anything.
    judge
        Called with each state that was compared, and the largest of the ratios of its point's time
        to the default's; infinite if it failed.
    note
        Called with what goes wrong; the rest is then left as it is.
    end
        When to stop, as ``time.monotonic()`` says it; None: when all are compared.
    """
    left = dict(enumerate(states))
    with tempfile.TemporaryDirectory(prefix="tvm-vitq-tune-") as name:
        kernels: dict[int, tuple[Path, Path]] = {}
        ratios: dict[int, float] = {}
        try:
            for number in range(_PROCESSES):
                runner = open_runner()
                try:
                    for i, state in list(left.items()):
                        if end is not None and time.monotonic() > end:
                            note(f"no time left to compare {len(left)} of the winners again: "
                                 "that is done when tune goes on")  # fmt: skip
                            return
                        if i not in kernels:
                            kernels[i] = _built(state, builder, Path(name) / str(i))
                        ratios[i] = max(ratios.get(i, 0.0), _ratio(state, runner, *kernels[i]))
                        if number == _PROCESSES - 1 or ratios[i] > 1.0:
                            del left[i]
                            judge(state, ratios[i])
                finally:
                    runner.close()
        except RunnerFault as why:
            note(f"winners were not compared again: {why}")
        finally:
            for state in states:
                state.job._folder = None


def _built(state: TaskState, builder: Builder, folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    base, best = builder.build(state.job, [state.space.default, state.point], folder)
    if isinstance(base, str) or isinstance(best, str):
        raise RunnerFault(f"{state.job.task}: a kernel that was built is not built again")
    return base, best


def _ratio(state: TaskState, runner: Runner, base: Path, best: Path) -> float:
    """Return the best's time over the default's."""
    try:
        return runner.compare(state.job, base, best, _MORE_ROUNDS).ratio
    except KernelFault as why:
        state.rejected.append(str(why))
        return math.inf
