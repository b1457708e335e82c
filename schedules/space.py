"""The space of schedules of a task: parameters, their choices, and which go together.

Every kind of kernel has its own file, ``schedules.spaces.*``, which says what its parameters are
and what the default rules choose; the default is a point of the space, so a search can only find
better. A point changes how a kernel is cut, never what it computes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .isa import ISA
from .task import Point, Task

__all__ = ["Space", "space_of"]


def _any(_point: Point) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """The points of one task.

    Parameters
    ----------
    parameters
        Choices of each parameter.
    default
        What is used where no record says better.
    allowed
        Whether a combination of choices is a point; others are left out because they would be
        another name of a point, or could not be built.
    cost
        Predicted time, in any unit: the order in which points are tried.
    """

    parameters: Mapping[str, Sequence[Any]]
    default: Point
    allowed: Callable[[Point], bool] = field(default=_any)
    cost: Callable[[Point], float] = field(default=lambda _point: 0.0)

    def __contains__(self, point: object) -> bool:
        """Whether ``point`` is one of the space's."""
        return (
            isinstance(point, dict)
            and point.keys() == self.parameters.keys()
            and all(point[name] in choices for name, choices in self.parameters.items())
            and self.allowed(point)
        )

    def points(self) -> Iterator[Point]:
        """Yield every point."""
        for values in itertools.product(*self.parameters.values()):
            point = dict(zip(self.parameters, values, strict=True))
            if self.allowed(point):
                yield point

    def ranked(self) -> list[Point]:
        """Return every point, the default first and then by predicted time."""
        others = [point for point in self.points() if point != self.default]
        return [self.default, *sorted(others, key=self.cost)]

    def neighbour(self, point: Point, rng: random.Random) -> Point:
        """Return a point that differs from ``point`` in one or two parameters, if there is one."""
        names = [name for name, choices in self.parameters.items() if len(choices) > 1]
        for _ in range(50):
            changed = dict(point)
            for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
                changed[name] = rng.choice(list(self.parameters[name]))
            if changed != point and self.allowed(changed):
                return changed
        return point

    def nearest(self, point: Mapping[str, Any]) -> Point | None:
        """Return the point that has most of another task's point; None if nothing is in common.

        Numbers that are no choice here become the nearest one that is; what then is no point of
        this space is given up.
        """
        if point.keys() != self.parameters.keys():
            return None
        found: Point = {}
        for name, choices in self.parameters.items():
            value = point[name]
            if value in choices:
                found[name] = value
            elif isinstance(value, bool) or not isinstance(value, int):
                found[name] = self.default[name]
            else:
                numbers = [c for c in choices if isinstance(c, int)]
                found[name] = min(numbers, key=lambda c: abs(c - value))
        return found if found in self else None


def space_of(task: Task, isa: ISA) -> Space | None:
    """Return the space of a task on an instruction set, None if it has none there."""
    from .spaces import SPACES

    make = SPACES.get(task.kind)
    if make is None or not isa.has_kernels or task.gpu != isa.gpu:
        return None
    return make(task, isa)
