"""What is remembered of an activation over the calibration images.

Extremes and means are exact, for every channel; the distribution is represented by a random sample
of rows. A rescaling of channels applies to statistics as it does to the activation, so nothing needs
to be measured again after one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

__all__ = ["ChannelStatistics", "Recorder"]

ROWS = 4096
"""Rows of the sample, at most."""

VALUES = 1 << 16
"""Values that a range is searched on, at most."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of an activation with C channels on its last axis.

    Attributes
    ----------
    lo, hi, mean : torch.Tensor
        float32 [C], over all images and positions.
    sample : torch.Tensor
        float32 [R, C], random rows.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    mean: torch.Tensor
    sample: torch.Tensor

    def moved(self, factor: torch.Tensor, shift: torch.Tensor | float = 0.0) -> ChannelStatistics:
        """Return the statistics of ``(x - shift) * factor``, factor positive."""
        return ChannelStatistics(
            (self.lo - shift) * factor,
            (self.hi - shift) * factor,
            (self.mean - shift) * factor,
            (self.sample - shift) * factor,
        )

    def reordered(self, order: torch.Tensor) -> ChannelStatistics:
        """Return the statistics with channels in another order."""
        columns = self.sample[:, order]
        return ChannelStatistics(self.lo[order], self.hi[order], self.mean[order], columns)

    def widened(self, lo: float, hi: float) -> ChannelStatistics:
        """Return the statistics with every channel's extremes widened to hold [lo, hi]."""
        return replace(self, lo=self.lo.clamp_max(lo), hi=self.hi.clamp_min(hi))

    @cached_property
    def values(self) -> torch.Tensor:
        """Values of all channels for scalar ranges: part of the sample and both extremes."""
        values = self.sample.reshape(-1)
        if len(values) > VALUES:
            stride = len(values) // VALUES
            while math.gcd(stride, self.sample.shape[-1]) > 1:  # or it would skip channels
                stride += 1
            values = values[::stride]
        return torch.cat([values, torch.tensor(self.bounds)])

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value over all channels."""
        return float(self.lo.min()), float(self.hi.max())


class Recorder:
    """Gathers :class:`ChannelStatistics` chunk by chunk.

    Parameters
    ----------
    chunks : int
        Number of chunks that will be added; each gives its share of the sample.
    seed : int
        Seed of the choice of rows.
    """

    def __init__(self, chunks: int, seed: int = 0) -> None:
        self.share = max(1, ROWS // max(chunks, 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.lo: torch.Tensor | None = None
        self.hi: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        self.count = 0
        self.rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Add an activation ``[..., C]``."""
        rows = x.reshape(-1, x.shape[-1])
        lo, hi = torch.aminmax(rows, dim=0)
        total = rows.sum(0, dtype=torch.float64)
        if self.lo is None or self.hi is None or self.sum is None:
            self.lo, self.hi, self.sum = lo, hi, total
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            self.sum += total
        self.count += len(rows)
        if len(rows) > self.share:
            chosen = torch.randint(len(rows), (self.share,), generator=self.generator)
            rows = rows[chosen]
        self.rows.append(rows.clone())

    def result(self) -> ChannelStatistics:
        """Return what was gathered."""
        assert self.lo is not None and self.hi is not None and self.sum is not None
        mean = (self.sum / max(self.count, 1)).float()
        return ChannelStatistics(self.lo, self.hi, mean, torch.cat(self.rows))
