"""int8 codes of weights, symmetric, one step per output channel.

``nearest`` rounds each weight by itself. ``error`` rounds input channel by input channel and lets
the channels not yet rounded make up for the output error so far (optimal brain quantization in the
order and blocking of GPTQ): with H the second moments of the quantized inputs and U the upper
Cholesky factor of ``H^-1``, the error ``e = (w_k - q_k) / U_kk`` is taken off all later rows,
``W_j -= U_kj e``.
"""

from __future__ import annotations

import torch

from tvm_vitq.quantizers.draft import WeightCodes

__all__ = ["column_steps", "limit_codes", "round_by_error", "round_nearest", "round_quickly"]

SHRINK = tuple(1.0 - 0.03 * i for i in range(14))
BLOCK = 64
DAMPING = 0.01


def column_steps(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Return the step of each column that loses least, ``sum_k importance_k (w_k - q_k)^2``.

    Parameters
    ----------
    weight : torch.Tensor
        float32 [K, N].
    importance : torch.Tensor, optional
        [K], mean square of the input channels.
    """
    peak = weight.abs().amax(0)
    peak = torch.where(peak > 1e-20, peak, torch.ones_like(peak)) / 127.0
    factor = 1.0 if importance is None else importance[:, None]
    best, least = peak, torch.full_like(peak, float("inf"))
    for shrink in SHRINK:
        step = peak * shrink
        error = ((_codes(weight, step) * step - weight).square_() * factor).sum(0)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def _codes(weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (weight / step).add_(0.5).floor_().clamp_(-127, 127)


def round_nearest(weight: torch.Tensor, importance: torch.Tensor | None = None) -> WeightCodes:
    """Round every weight to the nearest code of its column's step."""
    step = column_steps(weight, importance)
    return WeightCodes(_codes(weight, step), step)


def round_quickly(weight: torch.Tensor) -> WeightCodes:
    """Round to nearest with the step of the largest weight, for rough comparisons."""
    peak = weight.abs().amax(0)
    step = torch.where(peak > 1e-20, peak, torch.ones_like(peak)) / 127.0
    return WeightCodes((weight / step).round_(), step)


def round_by_error(weight: torch.Tensor, moments: torch.Tensor) -> WeightCodes:
    """Round weights so that the error of ``X W`` is least.

    Parameters
    ----------
    weight : torch.Tensor
        float32 [K, N].
    moments : torch.Tensor
        float64 [K, K], second moments of the inputs (about their mean, where the bias is corrected
        afterwards).
    """
    rows = weight.shape[0]
    diagonal = moments.diagonal()
    floor = float(diagonal.mean())
    if not floor > 0.0:
        return round_nearest(weight)
    step = column_steps(weight, diagonal.float())
    order = diagonal.argsort(descending=True)
    upper = _inverse_root(moments[order][:, order], DAMPING * floor)
    left = weight[order].clone()
    codes = torch.empty_like(left)
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        block, errors = left[start:stop], torch.empty(stop - start, weight.shape[1])
        inner = upper[start:stop, start:stop]
        for i in range(stop - start):
            codes[start + i] = code = _codes(block[i], step)
            errors[i] = error = (block[i] - code * step) / inner[i, i]
            block[i + 1 :].addr_(inner[i, i + 1 :], error, alpha=-1.0)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    back = torch.empty_like(codes)
    back[order] = codes
    return WeightCodes(back, step)


def _inverse_root(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse, with as much damping as it takes."""
    identity = torch.eye(len(moments), dtype=moments.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex(moments + identity * damping)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper.float()
        damping *= 10.0


def limit_codes(weight: torch.Tensor, codes: WeightCodes, largest: int) -> WeightCodes:
    """Widen the steps of columns whose ``sum_k |code|`` passes ``largest``, and round them again.

    With activation codes of magnitude a, ``a * sum |code|`` bounds the int32 accumulator.
    """
    total = codes.codes.abs().sum(0)
    if not bool((total > largest).any()):
        return codes
    step = codes.scale
    for _ in range(20):
        total = _codes(weight, step).abs().sum(0)
        if not bool((total > largest).any()):
            break
        step = torch.where(total > largest, step * (total / largest * 1.002), step)
    wide = codes.codes.abs().sum(0) > largest
    again = _codes(weight, step)
    return WeightCodes(torch.where(wide, again, codes.codes), torch.where(wide, step, codes.scale))
