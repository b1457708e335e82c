"""Moments of activations."""

from __future__ import annotations

import pytest
import torch

from tvm_vitq.quantizers.finish import BROAD, Moments


def parts(channels: int) -> list[torch.Tensor]:
    return list(torch.randn(12, 5, channels).add_(0.5).split(5))


@pytest.mark.parametrize("channels", [6, 400, 800])
def test_moments_are_those_of_all_rows(channels: int) -> None:
    chunks = parts(channels)
    rows = torch.cat(chunks).reshape(-1, channels).double()
    moments = Moments.of(chunks, None)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    second = centred.T @ centred / len(rows)
    torch.testing.assert_close(moments.second, second, rtol=1e-4, atol=1e-4)


def test_rows_count_by_importance() -> None:
    chunks, importance = parts(6), torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0])
    x = torch.cat(chunks).double()
    moments = Moments.of(chunks, importance)
    weights = importance.double()
    mean = (x.mean(0) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(moments.mean, mean, rtol=1e-5, atol=1e-5)
    broad = (weights / weights.mean() + BROAD)[:, None]
    rows = (x * broad).sum((0, 1)) / (broad.sum() * len(x))
    second = torch.einsum("nrk,nrl,r->kl", x, x, broad[:, 0]) / (broad.sum() * len(x))
    second -= torch.outer(rows, rows)
    torch.testing.assert_close(moments.second, second, rtol=1e-4, atol=1e-4)


def test_a_sample_of_many_rows_takes_every_position() -> None:
    x = torch.zeros(600, 30, 30)
    x[:, range(30), range(30)] = 1.0  # channel c is the position c
    diagonal = Moments.of(list(x.split(8)), None).second.diagonal()
    expected = torch.full_like(diagonal, 1 / 30 - 1 / 900)
    torch.testing.assert_close(diagonal, expected, rtol=0.1, atol=0)
