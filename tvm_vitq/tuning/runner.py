"""What times kernels: the protocol, its faults, and this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from .child import Child, ChildFault
from .extract import Job

__all__ = ["Comparison", "KernelFault", "LocalRunner", "Runner", "RunnerFault"]


_PAUSES = (0.5, 2.0, 8.0)
"""Seconds to wait for a machine that is too busy to time anything on."""


class KernelFault(Exception):
    """A candidate crashed, hung or gave a wrong output: it is rejected."""


class RunnerFault(Exception):
    """The machine that runs kernels failed: the candidate must be measured elsewhere."""


@dataclass(frozen=True)
class Comparison:
    """Two kernels timed turn about.

    Parameters
    ----------
    base, other
        Seconds a call, one for each round.
    """

    base: np.ndarray
    other: np.ndarray

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, the other's time over the base's."""
        return float(np.median(self.other / self.base))

    @property
    def noise(self) -> float:
        """Standard error of :attr:`ratio`, from the median absolute deviation."""
        ratios = self.other / self.base
        spread = 1.4826 * float(np.median(np.abs(ratios - np.median(ratios))))
        return float(1.2533 * spread / np.sqrt(len(ratios)))

    @property
    def seconds(self) -> float:
        """Median time of the other."""
        return float(np.median(self.other))


class Runner(Protocol):
    """Times kernels on one machine.

    Attributes
    ----------
    where
        Which machine, for reports.
    """

    where: str

    def compare(self, job: Job, base: Path, other: Path, rounds: int) -> Comparison:
        """Check both kernels' outputs and time them turn about.

        Raises
        ------
        KernelFault
            If ``other`` crashed, hung or gave a wrong output.
        RunnerFault
            If the machine failed.
        """
        ...

    def peak(self, dot: str, chain: int) -> float | None:
        """Return what a dot sequence can do at most, in GMAC/s; None if that is not known."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class LocalRunner:
    """The processor or the GPU of this machine.

    Parameters
    ----------
    target
        Name of the target.
    threads
        Of the kernels.
    cores
        Cores to keep to; none for all.
    timeout
        Seconds that a comparison may take.
    """

    where = "this machine"

    def __init__(
        self, target: str, threads: int = 1, cores: Sequence[int] = (), timeout: float = 30.0
    ) -> None:
        self.timeout = timeout
        self._child = Child("run", target, threads, cores)
        self._loaded: set[str] = set()
        self._peaks: dict[tuple[str, int], float | None] = {}

    def compare(self, job: Job, base: Path, other: Path, rounds: int) -> Comparison:
        """See :meth:`Runner.compare`."""
        self._load(job, base, RunnerFault)
        self._load(job, other, KernelFault)
        pairs: list[list[float]] = []
        for pause in (*_PAUSES, None):
            try:
                found = self._child.ask(self.timeout, do="compare", base=str(base),
                                        other=str(other), rounds=rounds)  # fmt: skip
            except ChildFault as why:
                raise KernelFault(str(why)) from None
            pairs += found["pairs"]
            if len(pairs) >= min(4, rounds):
                break
            if pause is None:
                raise RunnerFault("this machine is too busy: nearly all samples were disturbed")
            time.sleep(pause)
        if other != base:
            self._drop(other)
        times = np.array(pairs)
        return Comparison(times[:, 0], times[:, 1])

    def _load(self, job: Job, kernel: Path, fault: type[Exception]) -> None:
        if not self._child.alive:
            self._loaded.clear()
        if str(kernel) in self._loaded:
            return
        try:
            wrong = self._child.ask(self.timeout, do="load", job=str(job.save(kernel.parent)),
                                    kernel=str(kernel))
        except ChildFault as why:
            raise fault(str(why)) from None
        if wrong:
            raise KernelFault(f"{wrong} wrong outputs")
        self._loaded.add(str(kernel))

    def forget(self) -> None:
        """Drop all kernels that are loaded."""
        for kernel in list(self._loaded):
            self._drop(Path(kernel))

    def _drop(self, kernel: Path) -> None:
        self._loaded.discard(str(kernel))
        if self._child.alive:
            try:
                self._child.ask(self.timeout, do="drop", kernel=str(kernel))
            except ChildFault:
                self._loaded.clear()

    def peak(self, dot: str, chain: int) -> float | None:
        """See :meth:`Runner.peak`; measured once."""
        if (dot, chain) not in self._peaks:
            try:
                rate = self._child.ask(self.timeout, do="peak", dot=dot, chain=chain)
            except ChildFault:
                rate = None
            self._peaks[dot, chain] = rate
        return self._peaks[dot, chain]

    def close(self) -> None:
        """End the process."""
        self._child.close()
