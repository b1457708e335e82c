"""MSE: the range whose quantizer has the least mean square error on the sample."""

from __future__ import annotations

import torch

from tvm_vitq.calibration.statistics import ChannelStatistics

__all__ = ["mse_range", "rounding_error"]

SHRINK = tuple(1.0 - 0.06 * i for i in range(12))


def rounding_error(
    values: torch.Tensor, bounds: tuple[float, float], levels: int, symmetric: bool
) -> float:
    """Return the mean square error of quantizing ``values`` with a range."""
    lo, hi = bounds
    if symmetric:
        hi = max(abs(lo), abs(hi))
        lo = -hi
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    step = max((hi - lo) / levels, 1e-20)
    codes = (values / step).add_(0.5).floor_()
    low = round(lo / step)
    codes.clamp_(low, low + levels)
    return float((codes.mul_(step).sub_(values)).square_().mean())


def mse_range(statistics: ChannelStatistics, levels: int, symmetric: bool) -> tuple[float, float]:
    """Return the range of least square error among shrunken ones, each end by itself.

    Parameters
    ----------
    statistics : ChannelStatistics
    levels : int
        Number of codes less one.
    symmetric : bool
        Whether the codes are symmetric about zero.
    """
    values = statistics.values
    lo, hi = statistics.bounds

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        errors = [rounding_error(values, pair, levels, symmetric) for pair in candidates]
        return candidates[errors.index(min(errors))]

    lo, hi = best([(lo * f, hi * f) for f in SHRINK])
    if symmetric:
        return lo, hi
    lo, hi = best([(lo * f, hi) for f in SHRINK[:6]])
    return best([(lo, hi * f) for f in SHRINK[:6]])
