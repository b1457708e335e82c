"""Kernels of many points at once, each built in a worker process with a time-out."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from schedules.task import Point

from .child import Child, ChildFault
from .extract import Job

__all__ = ["Builder", "Builders"]


class Builder(Protocol):
    """Makes kernels of points."""

    def build(self, job: Job, points: Sequence[Point], folder: Path) -> list[Path | str]:
        """Return for each point the folder of its kernel, or why there is none."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class Builders:
    """A pool of worker processes that build; safe to use from several threads.

    Parameters
    ----------
    target
        Name of the target.
    count
        Number of processes.
    timeout
        Seconds that one kernel may take.
    """

    def __init__(self, target: str, count: int = 2, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._children = [Child("build", target) for _ in range(count)]
        self._free: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._children:
            self._free.put(child)
        self._threads = ThreadPoolExecutor(count)

    def build(self, job: Job, points: Sequence[Point], folder: Path) -> list[Path | str]:
        """Return for each point the folder of its kernel, or why there is none."""
        saved = str(job.save(folder / "job"))

        def one(number: int, point: Point) -> Path | str:
            child, out = self._free.get(), folder / f"kernel{number}"
            try:
                child.ask(self.timeout, job=saved, point=point, out=str(out))
                return out
            except ChildFault as why:
                return str(why)
            finally:
                self._free.put(child)

        return list(self._threads.map(one, range(len(points)), points))

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.close()
        self._threads.shutdown(cancel_futures=True)
