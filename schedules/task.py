"""What is tuned: a task is all that a kernel's best schedule depends on, and nothing else.

Two layers with the same task share one schedule, whatever their weights. A task is plain data, so
that it can be stored in records and compared between models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Point", "Task"]

Point = dict[str, Any]
"""One point of a task's space: parameter -> JSON value."""


@dataclass(frozen=True)
class Task:
    """One kernel to be scheduled.

    Parameters
    ----------
    kind
        Name of the space: see :mod:`schedules.space`.
    text
        Canonical JSON object of the fields.
    """

    kind: str
    text: str

    @staticmethod
    def of(kind: str, **fields: Any) -> Task:
        """Make a task of its fields."""
        return Task(kind, json.dumps(fields, sort_keys=True, separators=(",", ":")))

    @property
    def gpu(self) -> bool:
        """Whether it is a launch of a GPU."""
        return self.kind.startswith("gpu_")

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """The fields; those common to all kinds are ``op`` and ``shape``."""
        found: Mapping[str, Any] = json.loads(self.text)
        return found

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that name the task."""
        return hashlib.sha256(f"{self.kind} {self.text}".encode()).hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents that say how large the task is: ``[M, N, K]`` of a matmul, and so on."""
        return tuple(self.fields["shape"])

    def __str__(self) -> str:
        """Return operator, shape and dtypes."""
        shape = "x".join(str(extent) for extent in self.shape)
        return f"{self.fields['op']} {shape} {self.fields['dtypes']}"

    def distance(self, other: Task) -> float:
        """Return how far the shapes of two tasks are apart; infinite if they are of two kinds.

        The sum of ``|log2|`` of the extents' ratios, and 1 for every other field that differs.
        """
        if self.kind != other.kind or len(self.shape) != len(other.shape):
            return math.inf
        if self.fields["op"] != other.fields["op"] and self.kind == "rows":
            return math.inf
        away = sum(abs(math.log2(a / b)) for a, b in zip(self.shape, other.shape, strict=True))
        keys = set(self.fields) | set(other.fields)
        differ = [k for k in keys - {"shape"} if self.fields.get(k) != other.fields.get(k)]
        return away + len(differ)
