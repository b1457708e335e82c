"""What is remembered of an activation over the calibration images.

Extremes and means are exact, for every channel; the distribution is represented by a random sample
of rows. A rescaling of channels applies to statistics as it does to the activation, so nothing
needs to be measured again after one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

__all__ = ["ChannelStatistics", "Recorder"]

ROWS = 4096
"""Rows of the sample, at most."""

HELD_ROWS = 1024
"""Rows of images held out, at most."""

FEW = 32
"""Rows below which the extremes of single channels mean nothing."""

MARGIN = 0.125
"""What is added to either end of a range from so few rows, as a share of it."""

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
    held : torch.Tensor
        float32 [H, C], rows of images that are in none of the above, to test ranges on.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    mean: torch.Tensor
    sample: torch.Tensor
    held: torch.Tensor

    def moved(self, factor: torch.Tensor, shift: torch.Tensor | float = 0.0) -> ChannelStatistics:
        """Return the statistics of ``(x - shift) * factor``, factor positive."""
        return ChannelStatistics(
            (self.lo - shift) * factor,
            (self.hi - shift) * factor,
            (self.mean - shift) * factor,
            (self.sample - shift) * factor,
            (self.held - shift) * factor,
        )

    def reordered(self, order: torch.Tensor) -> ChannelStatistics:
        """Return the statistics with channels in another order."""
        parts = (self.lo, self.hi, self.mean, self.sample, self.held)
        return ChannelStatistics(*(part[..., order] for part in parts))

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

    @cached_property
    def quantiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """0.1 % and 99.9 % quantile of each channel; the extremes if the sample is small."""
        if len(self.sample) < 1000:
            return self.lo, self.hi
        cut, channels = max(1, len(self.sample) // 1000), self.sample.T.contiguous()
        least = channels.topk(cut, largest=False).values[:, -1]
        return least, channels.topk(cut).values[:, -1]

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value over all channels."""
        return float(self.lo.min()), float(self.hi.max())


class Recorder:
    """Gathers :class:`ChannelStatistics` chunk by chunk.

    Parameters
    ----------
    rows : int
        Rows of the sample to take from each chunk.
    seed : int
        Seed of the choice of rows.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.share = max(rows, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.lo: torch.Tensor | None = None
        self.hi: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        self.count = 0
        self.rows: list[torch.Tensor] = []
        self.held: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        """Add an activation ``[n, ..., C]`` to the statistics.

        Parameters
        ----------
        x : torch.Tensor
        importance : torch.Tensor, optional
            ``[rows of one chunk]``: rows of no importance don't count, others are sampled by it.
        """
        rows = x.reshape(-1, x.shape[-1])
        if importance is not None and bool((importance <= 0).any()):
            rows = x.reshape(x.shape[0], -1, x.shape[-1])[:, importance > 0].flatten(0, 1)
            importance = importance[importance > 0]
        lo, hi = rows.amin(0), rows.amax(0)  # aminmax takes thirty times as long
        total = rows.sum(0).double()
        if self.lo is None or self.hi is None or self.sum is None:
            self.lo, self.hi, self.sum = lo, hi, total
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            self.sum += total
        self.count += len(rows)
        self.rows.append(self._sampled(rows, x.shape[0], importance))

    def merge(self, other: Recorder) -> None:
        """Add what another recorder gathered."""
        if other.lo is not None and other.hi is not None and other.sum is not None:
            if self.lo is None or self.hi is None or self.sum is None:
                self.lo, self.hi, self.sum = other.lo, other.hi, other.sum
            else:
                self.lo = torch.minimum(self.lo, other.lo)
                self.hi = torch.maximum(self.hi, other.hi)
                self.sum = self.sum + other.sum
        self.count += other.count
        self.rows += other.rows
        self.held += other.held

    def hold(self, x: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        """Keep rows of an activation for tests; they don't enter the statistics."""
        rows = x.reshape(-1, x.shape[-1])
        self.held.append(self._sampled(rows, x.shape[0], importance))

    def _sampled(
        self, rows: torch.Tensor, chunks: int, importance: torch.Tensor | None
    ) -> torch.Tensor:
        if len(rows) <= self.share:
            return rows.clone()
        if importance is None:
            return rows[torch.randint(len(rows), (self.share,), generator=self.generator)]
        weights = importance.repeat(chunks)
        chosen = torch.multinomial(weights, self.share, True, generator=self.generator)
        return rows[chosen]

    def result(self) -> ChannelStatistics:
        """Return what was gathered."""
        assert self.lo is not None and self.hi is not None and self.sum is not None
        mean, sample = (self.sum / max(self.count, 1)).float(), torch.cat(self.rows)
        held = torch.cat(self.held) if self.held else sample
        statistics = ChannelStatistics(self.lo, self.hi, mean, sample, held)
        if self.count >= FEW:
            return statistics
        # So few rows say little of a channel: every channel gets the range of all, and more.
        lo, hi = statistics.bounds
        more = (hi - lo) * MARGIN
        return statistics.widened(lo - more, hi + more)
