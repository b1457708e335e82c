"""Records of tuning: what was measured, and what is used because of it.

A folder of records has one file for each instruction set, ``avx2.jsonl`` and so on, with one JSON
object a line. A ``trial`` is one measured point of a task's space; a ``best`` says which point of a
task to use, after it was compared with the others turn about. Lines are only ever appended, and are
on disk before :meth:`RecordFile.append` returns, so that a process may end at any time; a last line
that was cut off counts for nothing.

Records that ship with the package (``schedules/shipped``) are used by default.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tvm

from .isa import ISA
from .space import space_of
from .task import Point, Task

__all__ = ["KERNELS", "BadRecord", "Record", "RecordFile", "Schedules", "latest", "versions"]

KERNELS = 1
"""Version of the kernels: raise it when a point of a space makes another kernel than before."""

_SHIPPED = Path(__file__).parent / "shipped"


class BadRecord(ValueError):
    """A line that cannot be used; the message says why."""


def versions() -> dict[str, Any]:
    """Return what a record's times depend on besides the machine."""
    return {"tvm": str(tvm.__version__), "kernels": KERNELS}


@dataclass(frozen=True)
class Record:
    """One line.

    Parameters
    ----------
    what
        ``"trial"`` or ``"best"``.
    isa
        Name of the instruction set.
    kind, task
        Kind and fields of the task.
    point
        The schedule: a point of the task's space.
    seconds
        Median time of a call.
    ratio
        Its time over that of the default schedule, measured turn about.
    share
        Share of the dot sequence's peak; None if it is not a matmul or the peak is not known.
    threads
        Threads that the kernel ran with.
    host, when
        Processor, and UTC time in ISO 8601.
    versions
        See :func:`versions`.
    audited
        Of a ``best``: whether it was compared with the default in other processes as well.
    """

    what: str
    isa: str
    kind: str
    task: Mapping[str, Any]
    point: Point
    seconds: float
    ratio: float
    share: float | None
    threads: int
    host: str
    when: str
    versions: Mapping[str, Any] = field(default_factory=versions)
    audited: bool = False

    @property
    def of(self) -> Task:
        """The task."""
        return Task.of(self.kind, **self.task)

    @property
    def key(self) -> tuple[str, str, int]:
        """What a ``best`` is the best of: instruction set, task, threads."""
        return self.isa, self.of.key, self.threads

    def to_json(self) -> str:
        """Return the line."""
        return json.dumps({**asdict(self), "key": self.of.key}, ensure_ascii=False, sort_keys=True)

    def _sound(self) -> bool:
        """Whether the values are of the sorts that they should be."""
        times = (self.seconds, self.ratio, 1.0 if self.share is None else self.share)
        return (
            all(isinstance(t, (int, float)) and math.isfinite(t) and t >= 0 for t in times)
            and self.seconds > 0 and self.ratio > 0
            and isinstance(self.point, dict) and isinstance(self.task, dict)
            and {"op", "shape", "dtypes"} <= set(self.task)
            and type(self.threads) is int and self.threads > 0
            and all(isinstance(text, str) for text in (self.isa, self.kind, self.host, self.when))
        )  # fmt: skip

    @staticmethod
    def from_json(line: str, isa: str | None = None) -> Record:
        """Read a line.

        Parameters
        ----------
        line
            What :meth:`to_json` wrote.
        isa
            Instruction set that it must be for; None for any.

        Raises
        ------
        BadRecord
            If it is damaged, or of other versions or another instruction set.
        """
        try:
            found = json.loads(line)
            found.pop("key")
            record = Record(**found)
            key, made = record.key, dict(record.versions)
        except (ValueError, TypeError, KeyError, AttributeError) as why:
            raise BadRecord("is damaged") from why
        if not record._sound():
            raise BadRecord("is damaged")
        current = versions()
        for name, text in (("tvm", "TVM"), ("kernels", "kernels")):
            if made.get(name) != current[name]:
                raise BadRecord(f"was made with {text} {made.get(name)}, not {current[name]}")
        if isa is not None and record.isa != isa:
            raise BadRecord(f"is for the instruction set {record.isa}, not {isa}")
        if record.what not in ("trial", "best") or not key:
            raise BadRecord(f"is of an unknown sort, {record.what!r}")
        return record


class RecordFile:
    """A file of records.

    Parameters
    ----------
    path
        The file; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.refused: list[tuple[int, str]] = []

    @staticmethod
    def of(folder: str | Path, isa: ISA) -> RecordFile:
        """Return the file of an instruction set."""
        return RecordFile(Path(folder) / f"{isa.name}.jsonl")

    def read(self, isa: str | None = None) -> list[Record]:
        """Return the records; ``refused`` then has the numbers of other lines, and reasons.

        Parameters
        ----------
        isa
            Instruction set that they must be for.
        """
        self.refused = []
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines, found = text.split("\n"), []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append(Record.from_json(line, isa))
            except BadRecord as why:
                torn = number == len(lines)  # no line end: the writer was stopped
                if not torn:
                    self.refused.append((number, str(why)))
        return found

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        with self.path.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = handle.seek(0, os.SEEK_END)
            start = b""
            if size:
                handle.seek(size - 1)
                start = b"" if handle.read(1) == b"\n" else b"\n"
            handle.write(start + record.to_json().encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())


def latest(records: Iterable[Record]) -> dict[tuple[str, str, int], Record]:
    """Return the latest ``best`` of every task."""
    found: dict[tuple[str, str, int], Record] = {}
    for record in records:
        if record.what != "best":
            continue
        other = found.get(record.key)
        if other is None or record.when >= other.when:
            found[record.key] = record
    return found


@functools.cache
def _shipped(isa: str) -> tuple[Record, ...]:
    return tuple(RecordFile(_SHIPPED / f"{isa}.jsonl").read(isa))


class Schedules:
    """How each task is to be cut: what records say, else the default rules.

    Parameters
    ----------
    isa
        Instruction set.
    records
        Records for it; the later of two for the same task holds.
    threads
        Threads of the kernels: records of as many are preferred, then those of fewest.

    Attributes
    ----------
    hits, misses : dict
        Tasks that were looked up, and were or were not in the records, by key.
    refused : list of str
        Why records were not used.
    """

    def __init__(self, isa: ISA, records: Iterable[Record] = (), threads: int = 1) -> None:
        self.isa = isa
        self.threads = threads
        self.hits: dict[str, Task] = {}
        self.misses: dict[str, Task] = {}
        self.refused: list[str] = []
        self._best: dict[str, Record] = {}
        for record in latest(records).values():
            key, held = record.of.key, self._best.get(record.of.key)
            if held is None or self._order(record) < self._order(held):
                self._best[key] = record

    def _order(self, record: Record) -> tuple[bool, int]:
        return record.threads != self.threads, record.threads

    @staticmethod
    def shipped(isa: ISA, threads: int = 1) -> Schedules:
        """Return those of the records in the package."""
        return Schedules(isa, _shipped(isa.name), threads)

    @staticmethod
    def of_folder(isa: ISA, folder: str | Path, threads: int = 1) -> Schedules:
        """Return those of a folder of records, and for other tasks those in the package."""
        return Schedules(isa, [*_shipped(isa.name), *RecordFile.of(folder, isa).read(isa.name)],
                         threads)

    @staticmethod
    def fixed(isa: ISA, task: Task, point: Point) -> Schedules:
        """Return one point for one task, and the default rules for others."""
        return Schedules(isa, [Record("best", isa.name, task.kind, task.fields, point, 0.0, 1.0,
                                      None, 1, "", "")])

    def point(self, task: Task) -> Point | None:
        """Return the point of a task; None where the default rules hold.

        A point that the task's space does not have (any more) is no hit.
        """
        record, space = self._best.get(task.key), space_of(task, self.isa)
        if space is None:
            return None
        if record is not None and record.point not in space:
            why = f"{task}: a record whose schedule its kernel does not have"
            if why not in self.refused:
                self.refused.append(why)
            record = None
        if record is None:
            self.misses[task.key] = task
            return None
        self.hits[task.key] = task
        return record.point if record.point != space.default else None

    def nearest(self, task: Task) -> Iterator[Point]:
        """Yield the points of similar tasks that fit this one, the nearest first."""
        space = space_of(task, self.isa)
        if space is None:
            return
        others = [r for r in self._best.values() if task.distance(r.of) < float("inf")]
        for record in sorted(others, key=lambda r: task.distance(r.of)):
            point = space.nearest(record.point)
            if point is not None:
                yield point
