"""Which points of a space to try next.

Small spaces are tried whole. Of large ones come first the points that are best for similar tasks,
then what is predicted to be fast, then neighbours of the fastest so far mixed with predictions. No
point is proposed twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping

from schedules.space import Space
from schedules.task import Point

__all__ = ["Search", "name_of"]

_SMALL = 64
_PREDICTED = 16
_PARENTS = 5


def name_of(point: Mapping[str, object]) -> str:
    """Return a point as a dictionary's key."""
    return json.dumps(point, sort_keys=True)


class Search:
    """The order of points of one task.

    Parameters
    ----------
    space
        The task's space.
    seeds
        Points to try first: similar tasks' best.
    seed
        Of the random choices.
    """

    def __init__(self, space: Space, seeds: Iterable[Point] = (), seed: int = 0) -> None:
        self.space = space
        ranked = space.ranked()[1:]
        self.size = len(ranked)
        self._rng = random.Random(seed)
        self._seen = {name_of(space.default)}
        self._times: dict[str, tuple[float, Point]] = {}
        wanted = [point for point in seeds if point in space]
        self._predicted = [*wanted, *ranked]
        self._first = min(self.size, len(wanted) + _PREDICTED)

    @property
    def tried(self) -> int:
        """Number of points proposed or told, without the default."""
        return len(self._seen) - 1

    @property
    def exhausted(self) -> bool:
        """Whether there is no other point."""
        return self.tried >= self.size

    def tell(self, point: Point, ratio: float) -> None:
        """Say what a point's time was, over the default's."""
        self._seen.add(name_of(point))
        self._times[name_of(point)] = ratio, point

    def put_back(self, point: Point) -> None:
        """Say that a proposed point was not measured."""
        self._seen.discard(name_of(point))
        self._predicted.insert(0, point)

    def propose(self, count: int) -> list[Point]:
        """Return up to ``count`` points that were not proposed before."""
        found: list[Point] = []
        while len(found) < count and not self.exhausted:
            point = self._next()
            if name_of(point) not in self._seen:
                self._seen.add(name_of(point))
                found.append(point)
        return found

    def _next(self) -> Point:
        guided = self.size > _SMALL and self.tried >= self._first and self._times
        if guided and self._rng.random() < 0.7:
            ordered = sorted(self._times.values(), key=lambda item: item[0])
            parents = [point for _, point in ordered[:_PARENTS]]
            for _ in range(20):
                point = self.space.neighbour(self._rng.choice(parents), self._rng)
                if name_of(point) not in self._seen:
                    return point
        while self._predicted:
            point = self._predicted.pop(0)
            if name_of(point) not in self._seen:
                return point
        return self._rng.choice(list(self.space.points()))
