"""Rounding of weights."""

from __future__ import annotations

import pytest
import torch

from schedules.packing import chains_of, pack
from tvm_vitq.quantizers.weights import Windows, limit_codes, round_by_error, round_nearest


def correlated(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing + 1.0


def test_nearest_is_within_half_a_step() -> None:
    weight = torch.randn(64, 16)
    codes = round_nearest(weight)
    inside = codes.codes.abs() < 127
    assert ((codes.real - weight).abs() <= codes.scale * 0.5001)[inside].all()
    assert codes.codes.abs().max() <= 127


def test_rounding_by_error_beats_nearest_on_its_inputs() -> None:
    x, weight = correlated(2000, 48), torch.randn(48, 24)
    moments = (x.T @ x).double() / len(x)
    careful, nearest = round_by_error(weight, moments), round_nearest(weight)

    def error(codes):
        return (x @ (codes.real - weight)).square().mean()

    assert error(careful) < 0.7 * error(nearest)
    assert torch.equal(careful.codes, careful.codes.round())
    assert careful.codes.abs().max() <= 127


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_poor_moments_are_no_problem(rank: int, seed: int) -> None:
    # What few inputs don't span, they cannot judge: only the error that they see is bounded.
    torch.manual_seed(seed)
    x, weight = torch.randn(rank, 32), torch.randn(32, 8)
    codes = round_by_error(weight, (x.T @ x).double())
    nearest = round_nearest(weight)
    assert torch.isfinite(codes.real).all() and codes.codes.abs().max() <= 127
    if rank == 0:
        assert torch.equal(codes.codes, nearest.codes)
    else:
        assert (x @ (codes.real - weight)).norm() < (x @ (nearest.real - weight)).norm()


def test_empty_and_constant_columns() -> None:
    weight = torch.zeros(16, 3)
    weight[:, 1] = 0.5
    codes = round_by_error(weight, torch.eye(16, dtype=torch.float64))
    assert (codes.scale > 0).all()
    torch.testing.assert_close(codes.real, weight, atol=0.01, rtol=0)


def test_limited_codes_cannot_overflow() -> None:
    weight = torch.randn(512, 8).sign() * 0.9 + torch.randn(512, 8) * 0.05
    codes = limit_codes(weight, round_nearest(weight), 30000)
    assert codes.codes.abs().sum(0).max() <= 30000
    assert (codes.real - weight).abs().max() < 0.02


@pytest.mark.parametrize("careful", [True, False], ids=["by_error", "nearest"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("depth", [192, 50, 3])
def test_weights_of_a_window_stay_within_16_bits(depth: int, groups: int, careful: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(depth, 24) * torch.randn(depth, 1).exp()
    windows = Windows.of(depth, groups)
    if careful:
        codes = round_by_error(weight, torch.eye(depth, dtype=torch.float64), windows).codes
    else:
        codes = round_nearest(weight, None, windows).codes
    assert codes.abs().max() <= 127 and torch.equal(codes, codes.round())
    # Independently of how the windows are kept: the proof that kernels are chosen by.
    chains = chains_of(pack(codes.numpy().astype("int8"), 16, 4), 255)
    assert min(chains) >= groups
    free = round_nearest(weight).codes.numpy().astype("int8")
    assert min(chains_of(pack(free, 16, 4), 255)) < groups


def test_what_windows_cost() -> None:
    x, weight = correlated(2000, 64), torch.randn(64, 32)
    moments = (x.T @ x).double() / len(x)

    def error(groups: int) -> float:
        windows = Windows.of(64, groups) if groups else None
        codes = round_by_error(weight, moments, windows)
        return float((x @ (codes.real - weight)).square().mean())

    free = error(0)
    assert free < error(2) < 4.5 * free  # one bit would be 4
    assert error(2) < error(4)
