"""The one list of observers: how a range is proposed from statistics."""

from __future__ import annotations

from collections.abc import Callable

from tvm_vitq.calibration.minmax import minmax_range
from tvm_vitq.calibration.mse import mse_range
from tvm_vitq.calibration.percentile import percentile_range
from tvm_vitq.calibration.statistics import ChannelStatistics

__all__ = ["OBSERVERS", "Observer"]

Observer = Callable[[ChannelStatistics, int, bool], tuple[float, float]]

OBSERVERS: dict[str, Observer] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
}
