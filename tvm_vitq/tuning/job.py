"""One ``tvm-vitq tune``: a quantized module's tasks tuned on a machine, or on many boards."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_passes.errors import VitqError
from schedules.isa import ISA, isa_for
from schedules.records import RecordFile

from .build import Builders
from .extract import extract
from .runner import LocalRunner, Runner
from .tune import Limits, Tuning

if TYPE_CHECKING:
    import tvm

    from tvm_vitq.remote.session import Session

__all__ = ["TuneJob", "describe", "processor"]


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass
class TuneJob:
    """What to tune, for what, where, how long.

    Parameters
    ----------
    mod
        Quantized module.
    target
        Name of the target.
    records
        Folder of the records; made if need be.
    limits
        When to stop.
    threads
        Of the kernels.
    open_session
        Opens a session with a board; None tunes on this machine.
    boards
        How many boards to use at once.
    transfer
        Whether to try first what is best for similar tasks.
    build_timeout, run_timeout
        Seconds that building a kernel, and a comparison on this machine, may take.
    """

    mod: tvm.IRModule
    target: str
    records: Path
    limits: Limits
    threads: int = 1
    open_session: Callable[[], Session] | None = None
    boards: int = 1
    transfer: bool = True
    build_timeout: float = 60.0
    run_timeout: float = 30.0

    def prepare(self, report: Callable[[], None] = lambda: None) -> Tuning:
        """Extract the tasks and read the records.

        Raises
        ------
        VitqError
            If the target has nothing to tune or is not this machine's, or the folder cannot be
            written.
        """
        import tvm

        from relay_passes.pipeline import lower
        from schedules.cuda.nvcc import find_nvcc
        from tvm_vitq.artifact.metadata import describe_target
        from tvm_vitq.compiler import foreign, resolve

        name, target = resolve(self.target)
        isa: ISA = isa_for(target)
        if str(self.records) == "none":
            raise VitqError("--records none means no records, to compile; name a folder to tune")
        if not isa.has_kernels:
            raise VitqError(f"kernels for {name} are not tuned: leave tune out, compile has rules "
                            "for them")  # fmt: skip
        if isa.gpu and self.open_session is not None:
            raise VitqError("a GPU's kernels are tuned on the machine that it is in: leave out "
                            "--rpc and --tracker")  # fmt: skip
        if isa.gpu and self.threads > 1:
            raise VitqError("--threads is for processors, and the target is a GPU")
        elsewhere = foreign(describe_target(name, target))
        if self.open_session is None and elsewhere:
            mend = "tune on the machine that it is in" if isa.gpu else "use --rpc or --tracker"
            raise VitqError(f"cannot tune for {name} here: {elsewhere}; {mend}")
        if isa.gpu:
            try:
                find_nvcc()
            except ValueError as why:
                raise VitqError(str(why)) from why
        try:
            self.records.mkdir(parents=True, exist_ok=True)
        except OSError as why:
            what = "it is a file; name a folder" if self.records.is_file() else why.strerror
            raise VitqError(f"cannot keep records in {self.records}: {what}") from why
        file = RecordFile.of(self.records, isa)
        if not os.access(file.path if file.path.exists() else self.records, os.W_OK):
            raise VitqError(f"cannot write {file.path}: Permission denied")
        builders = Builders(name, min(len(os.sched_getaffinity(0)), 8), self.build_timeout)
        host = processor() if self.open_session is None else "board"
        if isa.gpu:
            host = str(tvm.cuda(0).device_name)
        return Tuning(extract(lower(self.mod), isa), isa, file, builders, self.limits,
                      self.threads, host, report, self.transfer)

    def run(self, tuning: Tuning) -> None:
        """Tune; Ctrl-C ends it and keeps all that was measured.

        Raises
        ------
        VitqError
            If there is no board, or not one trial could be made.
        """
        try:
            if self.open_session is not None:
                self.open_session().close()  # to say at once that there is no board
            tuning.run(self._runners(tuning))
        finally:
            tuning.builder.close()
        if tuning.starved:
            raise VitqError(f"nothing was measured: {tuning.failures[-1]}")
        if not tuning.trials and not tuning.over_all:
            tuning.notes.append("the time was up before the first trial: it takes some seconds to "
                                "begin, so give more --minutes")  # fmt: skip

    def _runners(self, tuning: Tuning) -> list[Callable[[], Runner]]:
        if self.open_session is None:
            from tvm_vitq.bench.worker import cores

            pinned = cores(self.threads)
            return [lambda: LocalRunner(self.target, self.threads, pinned, self.run_timeout)]
        from .board import Boards

        boards = Boards(self.open_session, self.threads)
        tuning.left_out = lambda: boards.left_out
        return [boards.runner] * self.boards


def describe(tuning: Tuning) -> dict[str, Any]:
    """Return what a run found, as JSON.

    Returns
    -------
    dict
        ``isa, trials, known`` (trials that the records held before), ``seconds, gain`` (default
        time of all tasks over the best), ``tasks``
        (``task, calls, trials, rejected, ratio, us, share, point, default``), ``notes``,
        ``left_out``.
    """
    tasks = []
    for state in tuning.states:
        tasks.append({
            "task": str(state.job.task), "key": state.job.task.key, "calls": state.job.calls,
            "trials": state.trials, "rejected": len(state.rejected),
            "ratio": round(state.ratio, 4),
            "us": None if state.seconds is None else round(state.seconds * 1e6, 2),
            "share": None if state.share is None else round(state.share, 4),
            "point": state.point, "default": state.point == state.space.default,
            "tuned": state.settled,
        })  # fmt: skip
    return {"isa": tuning.isa.name, "records": str(tuning.records.path), "trials": tuning.trials,
            "known": tuning.known, "seconds": round(tuning.elapsed, 1),
            "gain": round(tuning.gain, 4), "tasks": tasks, "notes": tuning.notes,
            "left_out": tuning.left_out()}  # fmt: skip
