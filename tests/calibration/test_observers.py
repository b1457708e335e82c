"""Observers and the statistics that they read."""

from __future__ import annotations

import pytest
import torch

from tvm_vitq.calibration.mse import rounding_error
from tvm_vitq.calibration.observers import OBSERVERS
from tvm_vitq.calibration.statistics import ChannelStatistics, Recorder


def recorded(x: torch.Tensor, chunks: int = 4) -> ChannelStatistics:
    recorder = Recorder(rows=512)
    for part in x.chunk(chunks):
        recorder.add(part)
    return recorder.result()


def test_extremes_and_means_are_exact() -> None:
    x = torch.randn(8, 50, 6)
    statistics = recorded(x)
    rows = x.reshape(-1, 6)
    torch.testing.assert_close(statistics.lo, rows.amin(0))
    torch.testing.assert_close(statistics.hi, rows.amax(0))
    torch.testing.assert_close(statistics.mean, rows.mean(0))


def test_rows_without_importance_do_not_count() -> None:
    x = torch.randn(64, 5, 6)
    x[:, 1:] *= 100
    recorder = Recorder(rows=64)
    recorder.add(x, torch.tensor([1.0, 0, 0, 0, 0]))
    assert float(recorder.result().hi.max()) < 10


def test_merged_recorders_gathered_everything() -> None:
    x = torch.randn(8, 50, 6)
    first, second = Recorder(rows=64, seed=1), Recorder(rows=64, seed=2)
    first.add(x[:4])
    second.add(x[4:])
    second.hold(x[:2])
    first.merge(second)
    merged, whole = first.result(), recorded(x)
    for name in ("lo", "hi", "mean"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
    assert len(merged.sample) == 128 and len(merged.held) == 64


def test_quantiles_are_those_of_the_sample() -> None:
    statistics = recorded(torch.randn(64, 100, 3))
    ordered = statistics.sample.sort(0).values
    cut = len(ordered) // 1000
    torch.testing.assert_close(statistics.quantiles[0], ordered[cut - 1])
    torch.testing.assert_close(statistics.quantiles[1], ordered[-cut])
    few = recorded(torch.randn(8, 4, 3))
    assert few.quantiles == (few.lo, few.hi)


def test_statistics_move_with_the_activation() -> None:
    x = torch.randn(4, 20, 6)
    factor, shift = torch.rand(6) + 0.5, torch.randn(6)
    moved, again = recorded(x).moved(factor, shift), recorded((x - shift) * factor)
    for name in ("lo", "hi", "mean"):
        torch.testing.assert_close(getattr(moved, name), getattr(again, name))


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_holds_everything(symmetric: bool) -> None:
    statistics = recorded(torch.randn(8, 50, 6))
    assert OBSERVERS["minmax"](statistics, 255, symmetric) == statistics.bounds


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_outliers_are_clipped_where_that_loses_less(name: str, symmetric: bool) -> None:
    x = torch.randn(16, 400, 8)
    x[3, 7, 2] = 40.0
    statistics = recorded(x)
    levels = 14 if symmetric else 15
    lo, hi = OBSERVERS[name](statistics, levels, symmetric)
    assert hi < 40.0
    clipped = rounding_error(statistics.values, (lo, hi), levels, symmetric)
    assert clipped < rounding_error(statistics.values, statistics.bounds, levels, symmetric)


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_activation_is_no_problem(name: str, value: float) -> None:
    lo, hi = OBSERVERS[name](recorded(torch.full((2, 3, 4), value)), 255, False)
    assert lo <= value <= hi or lo == hi
