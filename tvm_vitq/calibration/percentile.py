"""Percentile: clip the rarest values, by the fraction that loses least (RepQ-ViT's choice)."""

from __future__ import annotations

from tvm_vitq.calibration.mse import rounding_error
from tvm_vitq.calibration.statistics import ChannelStatistics

__all__ = ["FRACTIONS", "percentile_range"]

FRACTIONS = (0.999, 0.9999, 0.99999)


def percentile_range(
    statistics: ChannelStatistics, levels: int, symmetric: bool
) -> tuple[float, float]:
    """Return the central range of one of :data:`FRACTIONS`, the one with the least square error.

    Parameters
    ----------
    statistics : ChannelStatistics
    levels : int
        Number of codes less one.
    symmetric : bool
        Whether the codes are symmetric about zero.
    """
    values = statistics.values
    cuts = [int((1.0 - fraction) * len(values)) for fraction in FRACTIONS]
    largest = values.topk(max(cuts) + 1).values
    smallest = values.topk(max(cuts) + 1, largest=False).values
    candidates = [(float(smallest[cut]), float(largest[cut])) for cut in cuts]
    errors = [rounding_error(values, pair, levels, symmetric) for pair in candidates]
    return candidates[errors.index(min(errors))]
