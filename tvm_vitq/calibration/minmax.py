"""Min-max: the range of everything that was seen."""

from __future__ import annotations

from tvm_vitq.calibration.statistics import ChannelStatistics

__all__ = ["minmax_range"]


def minmax_range(
    statistics: ChannelStatistics, levels: int, symmetric: bool
) -> tuple[float, float]:
    """Return (lo, hi), the exact extremes."""
    return statistics.bounds
