"""Runners on boards: one server of TVM's RPC, or whatever boards a tracker lends.

A board that fails (no answer, a lost connection) is left, and its candidate measured on another.
One that failed again and again is not used any more; since the tracker lends it like any other, it
is then kept, unused, until another one came.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tvm_vitq.remote.errors import RemoteError

from .extract import Job
from .runner import Comparison, KernelFault, RunnerFault
from .worker import CHECKS, read_arguments

if TYPE_CHECKING:
    from tvm_vitq.remote.session import Session

__all__ = ["BoardRunner", "Boards"]

FAULTS = 2
"""After so many faults a board is not used any more."""
_LEAST_MS = 1
_PATIENCE = 60.0


class Boards:
    """Opens sessions, and remembers which boards failed.

    Parameters
    ----------
    open_session
        Opens a session with some board.
    threads
        Of the kernels there.
    patience
        Seconds to go on asking while there is no board that may be used.
    """

    def __init__(
        self, open_session: Callable[[], Session], threads: int = 1, patience: float = _PATIENCE
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._open = open_session
        self._threads = threads
        self._patience = patience
        self._lock = threading.Lock()

    @property
    def left_out(self) -> list[str]:
        """Boards that are not used any more."""
        with self._lock:
            return sorted(where for where, count in self.faults.items() if count >= FAULTS)

    def fault(self, where: str) -> None:
        """Note that a board failed."""
        with self._lock:
            self.faults[where] += 1

    def runner(self) -> BoardRunner:
        """Open a session with a board that may be used.

        Raises
        ------
        RunnerFault
            If there is none.
        """
        end, refused = time.monotonic() + self._patience, []
        why = "no board"
        try:
            while time.monotonic() < end:
                try:
                    session = self._open()
                except RemoteError as said:
                    why = str(said)
                    time.sleep(0.2)
                    continue
                if session.where in self.left_out:
                    refused.append(session)
                    continue
                try:
                    session.set_threads(self._threads)
                except RemoteError as said:
                    self.fault(session.where)
                    session.close()
                    why = str(said)
                    continue
                return BoardRunner(session, self)
        finally:
            for session in refused:
                session.close()
        raise RunnerFault("; ".join([why, *(f"{where} failed {FAULTS} times, so it is left out"
                                            for where in self.left_out)]))


class BoardRunner:
    """One board.

    Parameters
    ----------
    session
        An open session.
    boards
        Is told of faults.
    """

    def __init__(self, session: Session, boards: Boards) -> None:
        self.where = session.where
        self._session = session
        self._boards = boards
        self._loaded: tuple[Path, tuple[object, list[object]]] | None = None

    def compare(self, job: Job, base: Path, other: Path, rounds: int) -> Comparison:
        """See :meth:`tvm_vitq.tuning.runner.Runner.compare`; timed by the board's clock."""
        try:
            if self._loaded is None or self._loaded[0] != base:
                self._loaded = base, self._load(job, base)
            first = self._loaded[1]
            second = first if other == base else self._load(job, other)
            times = []
            for number in range(rounds):
                order = (first, second) if number % 2 else (second, first)
                taken = [float(self._session.time(module, "main", arguments, repeat=1,
                                                  min_repeat_ms=_LEAST_MS)[0])
                         for module, arguments in order]  # fmt: skip
                times.append(taken if number % 2 else taken[::-1])
        except RemoteError as why:
            self._boards.fault(self.where)
            raise RunnerFault(str(why)) from None
        pairs = np.array(times)
        return Comparison(pairs[:, 0], pairs[:, 1])

    def _load(self, job: Job, kernel: Path) -> tuple[object, list[object]]:
        session = self._session
        module = session.load(kernel / "kernel.so")
        folder = job.save(kernel.parent / "job")
        for check in range(CHECKS):
            arguments, expected = read_arguments(folder, kernel, check)
            tensors = [session.tensor(value) for value in arguments]
            results = [session.tensor(np.full_like(value, 85)) for value in expected]
            with session.request("running a kernel"):
                module["main"](*tensors, *results)
            wrong = sum(int((session.fetch(result) != value).sum())
                        for result, value in zip(results, expected, strict=True))
            if wrong:
                raise KernelFault(f"{wrong} wrong outputs on {self.where}")
        return module, [*tensors, *results]

    def peak(self, _dot: str, _chain: int) -> float | None:
        """Return None: peaks are measured on this machine only."""
        return None

    def close(self) -> None:
        """End the session."""
        self._loaded = None
        self._session.close()
