"""int8 codes of weights, symmetric, one step per output channel.

``nearest`` rounds each weight by itself. ``error`` rounds input channel by input channel and lets
the channels not yet rounded make up for the output error so far (optimal brain quantization in the
order and blocking of GPTQ): with H the second moments of the quantized inputs and U the upper
Cholesky factor of ``H^-1``, the error ``e = (w_k - q_k) / U_kk`` is taken off all later rows,
``W_j -= U_kj e``.

Both can keep the weights of a *window* of input channels so small that the products may be added in
16 bits (:class:`Windows`): the step of a column is then chosen with that in mind, codes that pass
the limit are reduced, and rounding by error makes up for the reduction like for any other error.
The idea is accumulator-aware quantization (A2Q), here for the short sums inside a dot sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schedules.packing import short_limit, short_windows
from tvm_vitq.quantizers.draft import WeightCodes

__all__ = [
    "Windows", "column_steps", "limit_codes", "round_by_error", "round_nearest", "round_quickly",
]  # fmt: skip

SHRINK = tuple(1.0 - 0.03 * i for i in range(14))
WIDEN = tuple(0.65 * 1.1**i for i in range(20))
"""Steps that are tried, as multiples of the one that just holds the largest weight; in windows."""
BLOCK = 64
DAMPING = 0.01


@dataclass(frozen=True)
class Windows:
    """Input channels whose products are added in 16 bits.

    Attributes
    ----------
    index : torch.Tensor
        int64 [K], the window of each channel.
    limit : int
        The codes of one sign in a window may sum to this magnitude.
    """

    index: torch.Tensor
    limit: int

    @classmethod
    def of(cls, depth: int, groups: int, largest: int = 255) -> Windows:
        """Windows of ``groups`` groups of four channels; activation codes 0 to ``largest``."""
        return cls(torch.from_numpy(short_windows(depth, groups)), short_limit(largest))

    def sums(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of positive codes and of negated negative codes, each [windows, N]."""
        shape = (int(self.index[-1].item()) + 2, codes.shape[1])
        positive = torch.zeros(shape).index_add_(0, self.index, codes.clamp(min=0))
        negative = torch.zeros(shape).index_add_(0, self.index, codes.clamp(max=0))
        return positive, negative.neg_()

    def reduced(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the codes with those of full windows reduced, one by one from the largest."""
        codes = codes.clone()
        for window, column in torch.stack(self.sums(codes)).amax(0).gt(self.limit).nonzero():
            rows = (self.index == window).nonzero()[:, 0]
            for sign in (1.0, -1.0):
                part = codes[rows, column] * sign
                while float(part.clamp(min=0).sum()) > self.limit:
                    part[int(part.argmax())] -= 1
                codes[rows, column] = part * sign
        return codes


def column_steps(
    weight: torch.Tensor,
    importance: torch.Tensor | None = None,
    windows: Windows | None = None,
) -> torch.Tensor:
    """Return the step of each column that loses least, ``sum_k importance_k (w_k - q_k)^2``.

    Parameters
    ----------
    weight : torch.Tensor
        float32 [K, N].
    importance : torch.Tensor, optional
        [K], mean square of the input channels.
    windows : Windows, optional
        What the codes must keep to: a sum that passes its limit by e is reduced by e in all, which
        loses about e^2 step^2 over the number of codes that share it.
    """
    peak = weight.abs().amax(0)
    peak = torch.where(peak > 1e-20, peak, torch.ones_like(peak)) / 127.0
    factor = 1.0 if importance is None else importance[:, None]
    best, least = peak, torch.full_like(peak, float("inf"))
    for shrink in SHRINK if windows is None else WIDEN:
        step = peak * shrink
        codes = _codes(weight, step)
        error = ((codes * step - weight).square_() * factor).sum(0)
        if windows is not None:
            over = torch.stack(windows.sums(codes)).sub_(windows.limit).clamp_(min=0)
            share = over.square_().sum((0, 1)) / max(1, len(weight) // over.shape[1])
            mean = 1.0 if importance is None else importance.mean()
            error += share * step.square() * mean
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def _codes(weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (weight / step).add_(0.5).floor_().clamp_(-127, 127)


def round_nearest(
    weight: torch.Tensor,
    importance: torch.Tensor | None = None,
    windows: Windows | None = None,
) -> WeightCodes:
    """Round every weight to the nearest code of its column's step."""
    step = column_steps(weight, importance, windows)
    codes = _codes(weight, step)
    return WeightCodes(codes if windows is None else windows.reduced(codes), step)


def round_quickly(weight: torch.Tensor, bits: int = 8) -> WeightCodes:
    """Round to nearest with the step of the largest weight, for rough comparisons."""
    peak = weight.abs().amax(0)
    step = torch.where(peak > 1e-20, peak, torch.ones_like(peak)) / (2.0 ** (bits - 1) - 1)
    return WeightCodes((weight / step).round_(), step)


def round_by_error(
    weight: torch.Tensor, moments: torch.Tensor, windows: Windows | None = None
) -> WeightCodes:
    """Round weights so that the error of ``X W`` is least.

    Parameters
    ----------
    weight : torch.Tensor
        float32 [K, N].
    moments : torch.Tensor
        float64 [K, K], second moments of the inputs (about their mean, where the bias is corrected
        afterwards).
    windows : Windows, optional
        What the codes must keep to.
    """
    rows = weight.shape[0]
    diagonal = moments.diagonal()
    floor = float(diagonal.mean())
    if not floor > 0.0:
        return round_nearest(weight, None, windows)
    step = column_steps(weight, diagonal.float(), windows)
    order = diagonal.argsort(descending=True)
    upper = _inverse_root(moments[order][:, order], DAMPING * floor)
    left = weight[order].clone()
    codes = torch.empty_like(left)
    place, room = [], torch.empty(0)
    if windows is not None:
        place = windows.index[order].tolist()
        room = torch.full((max(place) + 1, 2, weight.shape[1]), float(windows.limit))
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        block, errors = left[start:stop], torch.empty(stop - start, weight.shape[1])
        inner = upper[start:stop, start:stop]
        for i in range(stop - start):
            code = _codes(block[i], step)
            if windows is not None:
                free = room[place[start + i]]
                code = torch.minimum(torch.maximum(code, -free[1]), free[0])
                free[0] -= code.clamp(min=0)
                free[1] += code.clamp(max=0)
            codes[start + i] = code
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
