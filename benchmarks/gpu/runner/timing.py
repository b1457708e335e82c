"""Times: device events around many runs, peers in turn, medians of paired ratios.

A *turn* is one untimed run, which brings the runner's weights back into the caches, and then
``repeat`` timed ones over the input sets in rotation. A round gives each runner one turn; the ratio
of a peer to ours is taken round by round, so that what else the device does meets both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Clock", "interleave", "repeats", "summarise"]

Run = Callable[[int], Any]
_TURN_SECONDS = 0.004


class Clock:
    """Seconds of a turn: CUDA events on a GPU, the processor's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, run: Run, repeat: int, sets: int) -> float:
        """Return the mean seconds of ``repeat`` runs after one untimed run."""
        run(0)
        if not self.cuda:
            start = time.perf_counter()
            for i in range(repeat):
                run(i % sets)
            return (time.perf_counter() - start) / repeat
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for i in range(repeat):
            run(i % sets)
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeat


def repeats(once: float, sets: int) -> int:
    """Return how many runs of ``once`` seconds make a turn: whole rotations of the input sets."""
    rotations = round(_TURN_SECONDS / max(once, 1e-7) / sets)
    return sets * max(1, rotations)


def interleave(
    runners: Mapping[str, Run], rounds: int, sets: int, clock: Clock
) -> dict[str, list[float]]:
    """Time runners in turn.

    Returns
    -------
    dict
        Mean seconds of a run, ``[rounds]`` for each runner.
    """
    often: dict[str, int] = {}
    for name, run in runners.items():
        clock.seconds(run, sets, sets)  # the first runs allocate, record graphs, raise the clocks
        often[name] = repeats(clock.seconds(run, sets, sets), sets)
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            found[name].append(clock.seconds(run, often[name], sets))
    return found


def summarise(seconds: list[float], ours: list[float]) -> dict[str, float]:
    """Return median and spread of a runner's times, and of its ratios to ours.

    Returns
    -------
    dict
        ``median_us``, ``p10_us``, ``p90_us``, ``min_us``, ``ratio`` (its time over ours, median of
        the rounds), ``ratio_p10``, ``ratio_p90``, ``rounds``.
    """
    ratios = [one / other for one, other in zip(seconds, ours, strict=True)]
    return {
        **{f"{name}_us": round(1e6 * value, 3) for name, value in _spread(seconds).items()},
        "min_us": round(1e6 * min(seconds), 3),
        **{("ratio" if name == "median" else f"ratio_{name}"): round(value, 4)
           for name, value in _spread(ratios).items()},
        "rounds": len(seconds),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}
