"""Rescaling of channels that leaves the function as it is and makes activations easy to quantize.

A channel's factor is ``f_c = (s_c / s)^alpha`` with s_c its spread, s the geometric mean of all and
alpha the strength; its shift is its centre. With alpha = 1 this is RepQ-ViT's reparameterisation
(gamma' = gamma / f, beta' = (beta - d) / f, W' = f * W, b' = b + W^T d).
"""

from __future__ import annotations

import torch

from tvm_vitq.calibration.statistics import ChannelStatistics
from tvm_vitq.quantizers.draft import Draft, WeightCodes
from tvm_vitq.quantizers.links import Affine, KeyLink, Link

__all__ = ["balance_keys", "channel_factors", "rescale"]

LARGEST = 64.0
"""No channel is scaled by more than this, or by less than its inverse."""


def channel_factors(
    statistics: ChannelStatistics, strength: float, robust: bool, centre: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors and shifts of channels, each float32 [C].

    Parameters
    ----------
    statistics : ChannelStatistics
        Of the activation whose channels are to be alike.
    strength : float
        alpha, 0 to 1.
    robust : bool
        Spread by the 99.9 % quantile of the sample, not by the extremes.
    centre : bool
        Whether shifts are wanted; they are zero otherwise.
    """
    lo, hi = statistics.quantiles if robust else (statistics.lo, statistics.hi)
    shift = (lo + hi) / 2 if centre else torch.zeros_like(lo)
    spread = torch.maximum((lo - shift).abs(), (hi - shift).abs())
    usable = spread > 1e-6 * float(spread.max())
    if not bool(usable.any()):
        return torch.ones_like(spread), shift
    middle = spread[usable].log().mean().exp()
    factor = torch.where(usable, spread / middle, torch.ones_like(spread)).pow(strength)
    return factor.clamp(1.0 / LARGEST, LARGEST), shift


def _move_source(draft: Draft, source: Affine, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Make the channels of a source ``(x - shift) / factor``."""
    scale = draft.constant(source.scale)
    draft.constants[source.scale] = scale / factor
    rounded = draft.weights.get(source.scale)
    if rounded is not None:  # a factor per output channel goes into its step
        draft.weights[source.scale] = WeightCodes(rounded.codes, rounded.scale / factor)
    if source.linear is not None:
        draft.set_bias(source.linear, (draft.bias(source.linear) - shift) / factor)
    else:
        shape = draft.constant(source.shift).shape
        moved = (draft.constant(source.shift).reshape(-1) - shift) / factor
        draft.constants[source.shift] = moved.reshape(shape)


def rescale(draft: Draft, link: Link, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Move factors and shifts across a link: source divided, readers multiplied."""
    if link.source is None:
        draft.factors[link.site] = draft.factors.get(link.site, 1.0) / factor
    else:
        _move_source(draft, link.source, factor, shift)
    for reader in link.readers:
        weight = draft.constant(reader.linear.weight)
        at_rows = shift[reader.rows]
        if bool(at_rows.any()):
            moved = at_rows.double() @ weight.double()
            draft.set_bias(reader.linear, (draft.bias(reader.linear).double() + moved).float())
        draft.constants[reader.linear.weight] = weight * factor[reader.rows, None]
        draft.weights.pop(reader.linear.weight, None)
    for slot, rows in {reader.linear.x: reader.rows for reader in link.readers}.items():
        if slot in draft.means:
            draft.means[slot] = (draft.means[slot] - shift[rows]) / factor[rows]


def balance_keys(
    draft: Draft, link: KeyLink, query: ChannelStatistics, key: ChannelStatistics
) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Centre K and balance Q against K, channel by channel; returns their new statistics.

    The factor of a pair is chosen from ``m_k^a / m_q^b`` by the noise of the scores that two int8
    quantizers of step ``max / 127`` cause: ``step_q^2 * sum k_c^2 + step_k^2 * sum q_c^2``.
    """
    of_q, of_k = link.pairs[:, 0], link.pairs[:, 1]
    shift = torch.zeros_like(key.mean)
    shift[of_k] = ((key.lo + key.hi) / 2)[of_k]
    key = key.moved(torch.ones_like(shift), shift)
    q_peak = torch.maximum(query.lo.abs(), query.hi.abs())[of_q].clamp_min(1e-12)
    k_peak = torch.maximum(key.lo.abs(), key.hi.abs())[of_k].clamp_min(1e-12)
    q_power = query.sample.square().mean(0)[of_q]
    k_power = key.sample.square().mean(0)[of_k]

    def noise(factor: torch.Tensor) -> float:
        step_q, step_k = (q_peak * factor).max(), (k_peak / factor).max()
        return float(
            step_q**2 * (k_power / factor**2).sum() + step_k**2 * (q_power * factor**2).sum()
        )

    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    factors = [k_peak.pow(a) / q_peak.pow(b) for a in grid for b in grid]
    factors = [f.clamp(f.median() / LARGEST, f.median() * LARGEST) for f in factors]
    best = min(factors, key=noise)
    for_q, for_k = torch.ones_like(query.mean), torch.ones_like(key.mean)
    for_q[of_q] = best / best.log().mean().exp()
    for_k[of_k] = 1.0 / for_q[of_q]
    _move_source(draft, link.key[1], 1.0 / for_k, shift)
    _move_source(draft, link.query[1], 1.0 / for_q, torch.zeros_like(for_q))
    return query.moved(for_q), key.moved(for_k)
