"""Executes the float network unit by unit on the calibration images and records statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tvm_vitq.calibration.statistics import HELD_ROWS, ROWS, ChannelStatistics, Recorder
from tvm_vitq.calibration.workers import spread
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.importance import Importance
from tvm_vitq.quantizers.links import Links
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.reference.float_interpreter import Step

__all__ = ["HeldOut", "observe_unit", "row_weights", "views_of"]


class HeldOut:
    """Which images test ranges that were found on the others.

    A range that fits the images it was made from says little about the next image: the channels of
    a late layer answer to classes, and most classes are not among the calibration images. So the
    candidates are compared on images that have no part in the statistics, where there are enough.

    Parameters
    ----------
    chunks : int
        Lifted chunks of images, in an order in which the last ones may be held out.
    wanted : int
        Chunks to hold out.
    """

    def __init__(self, chunks: int, wanted: int) -> None:
        few = chunks < 4
        count = chunks if few else max(1, min(wanted, chunks // 4))
        self.tests = slice(chunks - count, chunks)
        self.statistics = slice(0, chunks if few else chunks - count)


class Mean:
    """Mean of rows, weighted by importance."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.weight = 0.0

    def add(self, x: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Add an activation ``[n, ..., K]``."""
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        weights = row_weights(rows.shape[1], importance)
        self.total = self.total + weights @ rows.sum(0).double()
        self.weight += float(weights.sum()) * len(rows)

    def merge(self, other: Mean) -> None:
        """Add what another mean gathered."""
        self.total, self.weight = self.total + other.total, self.weight + other.weight

    @property
    def value(self) -> torch.Tensor:
        """float32 [K]."""
        return (self.total / self.weight).float()


def row_weights(rows: int, importance: torch.Tensor | None) -> torch.Tensor:
    """Return float64 weights of the rows of one chunk, 1 on the mean."""
    if importance is None or len(importance) != rows or not float(importance.sum()) > 0:
        return torch.ones(rows, dtype=torch.float64)
    weights = importance.double()
    return weights / weights.mean()


def views_of(links: Links) -> dict[int, int]:
    """Slot where a site's channels lie on the last axis -> the site.

    That is the site itself, or what a linear reads where a layout operator makes the channels:
    heads are joined, pixels become patches.
    """
    structure, program = links.structure, links.program
    views = {slot: slot for slot in structure.sites}
    for linear in structure.linears:
        site = structure.sites.get(linear.source)
        if site is None or site.kind in ("norm", "gelu", "mean"):
            continue
        if program.shape(site.slot)[-1] != program.shape(linear.x)[-1]:
            views.pop(site.slot, None)
            views[linear.x] = site.slot
    return views


@dataclass
class _Observed:
    """What one chunk of images showed."""

    recorders: dict[int, Recorder] = field(default_factory=dict)
    means: dict[int, Mean] = field(default_factory=dict)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def observe_unit(
    links: Links,
    draft: Draft,
    unit: Unit,
    x: torch.Tensor,
    held: HeldOut,
    importance: Importance,
    seed: int,
) -> tuple[torch.Tensor, dict[int, ChannelStatistics]]:
    """Execute a float unit on all images; returns its output and the statistics of its sites.

    The means of what linears read go into ``draft.means``.
    """
    structure, program, views = links.structure, links.program, views_of(links)
    read = {linear.x for linear in structure.linears}
    parts = [(p, False) for p in x[held.statistics].split(draft.chunk)]
    shared = held.tests.start < held.statistics.stop  # too few images to hold any out
    if not shared:
        parts += [(p, True) for p in x[held.tests].split(draft.chunk)]
    tests = sum(test for _, test in parts)
    share = ROWS // max(1, len(parts) - tests), HELD_ROWS // max(1, tests)

    def observe(item: tuple[int, tuple[torch.Tensor, bool]]) -> _Observed:
        index, (part, testing) = item
        seen = _Observed()

        def record(slot: int, value: torch.Tensor) -> None:
            site = views.get(slot)
            if site is not None and not structure.sites[site].given:
                recorder = seen.recorders.setdefault(site, Recorder(share[testing], seed + index))
                take = recorder.hold if testing else recorder.add
                take(value.float(), importance.rows.get(slot))
            if slot in read:
                seen.means.setdefault(slot, Mean()).add(value, importance.rows.get(slot))

        def watch(step: Step, result: torch.Tensor) -> torch.Tensor:
            record(step.out, result)
            return result

        if unit.source == program.input_slot:
            record(unit.source, part)
        env = program.execute(
            {unit.source: part},
            start=unit.start,
            stop=unit.stop,
            keep=frozenset({unit.result}),
            hook=watch,
        )
        seen.result = env[unit.result]
        return seen

    first, *others = done = spread(observe, enumerate(parts))
    for other in others:
        for site, recorder in first.recorders.items():
            recorder.merge(other.recorders[site])
        for slot, mean in first.means.items():
            mean.merge(other.means[slot])
    statistics = {site: recorder.result() for site, recorder in first.recorders.items()}
    for link in links.links:
        if link.kind == "value" and link.site in statistics:  # into the order of V's channels
            order = link.readers[0].rows.argsort()
            statistics[link.site] = statistics[link.site].reordered(order)
    draft.means.update({slot: mean.value for slot, mean in first.means.items()})
    return torch.cat([part.result for part in done]), statistics
