"""Executes the decided network on all images and rounds weights and biases to what it really sees.

Unit by unit, linear by linear: the quantized input of a linear is gathered over all images, the
weight is rounded by output error, and the bias takes the mean error that is left, so that every
linear's mean output is the float network's. Rows count by their importance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from tvm_vitq.calibration.workers import spread
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.importance import Importance
from tvm_vitq.quantizers.observe import row_weights
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.shift_forms import shift_operators
from tvm_vitq.quantizers.structure import Linear, Structure
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.quantizers.weights import Windows, limit_codes, round_by_error, round_nearest

__all__ = ["Moments", "finish_unit"]

INT32 = 2**31 - 1
ROWS, DEPTHS = 4096, 8
"""Second moments of K channels are taken of ``ROWS + DEPTHS K`` rows, about."""
GRAM = 384
"""Columns of a matrix of moments that are computed at once."""
GROUPS = 4
"""Parts that moments are gathered in, each with matrices of its own."""
BROAD = 0.1
"""Weight that every row has besides its importance (1 on the mean)."""


@dataclass
class Moments:
    """Mean and second moments of the rows of an activation, weighted by importance.

    Attributes
    ----------
    mean : torch.Tensor
        float64 [K].
    second : torch.Tensor
        float64 [K, K], about the mean. A little of every row's moments is in it whatever the
        importance, so that a few important rows alone don't decide how weights are rounded.
    """

    mean: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, parts: list[torch.Tensor], importance: torch.Tensor | None) -> Moments:
        """Gather the moments of activations ``[n, ..., K]``."""
        size = parts[0].shape[-1]
        count = parts[0][0].numel() // size
        weights = row_weights(count, importance)
        broad = (weights + BROAD).float()
        images = sum(len(part) for part in parts)
        stride = max(1, round(images * count / (ROWS + DEPTHS * size)))
        while math.gcd(stride, count) > 1:  # or it would skip rows of every image
            stride += 1

        def sums(group: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
            total, scaled, weight = torch.zeros(size, dtype=torch.float64), [], []
            for before, part in group:
                rows, first = part.reshape(len(part), count, size), -before * count % stride
                total += weights @ rows.sum(0).double()
                weight.append(broad.repeat(len(part))[first::stride])
                scaled.append(rows.flatten(0, 1)[first::stride] * weight[-1].sqrt()[:, None])
            root, some = torch.cat(weight).sqrt(), torch.cat(scaled)
            return total, (root @ some).double(), _gram(some), root.square().double().sum()

        before = itertools.accumulate((len(part) for part in parts), initial=0)
        numbered = list(zip(before, parts, strict=False))
        done = spread(sums, [numbered[i::GROUPS] for i in range(min(GROUPS, len(parts)))])
        total, inner, square, spread_out = (sum(s) for s in zip(*done, strict=True))
        mean, centre = total / (float(weights.sum()) * images), inner / spread_out
        square = square.triu() + square.triu(1).T
        second = square.div_(spread_out).sub_(torch.outer(centre, centre))
        return cls(mean, second)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """Return ``x.T @ x`` in float64, right on and above the diagonal, in blocks of columns."""
    size = x.shape[1]
    out = torch.zeros(size, size, dtype=torch.float64)
    for start in range(0, size, GRAM):
        stop = min(start + GRAM, size)
        out[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
    return out


def finish_unit(
    draft: Draft,
    unit: Unit,
    x: torch.Tensor,
    importance: Importance,
    recipe: Recipe,
) -> torch.Tensor:
    """Round the weights of a unit; the draft is changed in place.

    Parameters
    ----------
    draft : Draft
        With every quantizer of the unit decided.
    x : torch.Tensor
        Lifted, quantized input of the unit for all images.

    Returns
    -------
    torch.Tensor
        Quantized output of the unit.
    """
    program, structure = draft.program, draft.structure
    linears = {
        linear.step: linear for linear in structure.linears if unit.start <= linear.step < unit.stop
    }
    operators = shift_operators(recipe)
    envs = [{unit.source: part} for part in x.split(draft.chunk)]
    keep = frozenset({unit.result})
    seen: dict[int, Moments] = {}
    at = unit.start

    def advance(stop: int) -> None:
        values = draft.values()

        def step(env: dict[int, torch.Tensor]) -> None:
            program.execute(
                env, start=at, stop=stop, keep=keep, hook=draft.hook, constants=values,
                operators=operators,
            )

        spread(step, envs)

    for index in sorted(linears):
        linear = linears[index]
        advance(index)
        at = index
        if linear.x not in seen:
            parts = [env[linear.x] for env in envs]
            seen[linear.x] = Moments.of(parts, importance.rows.get(linear.x))
        finish_linear(draft, linear, seen[linear.x], recipe)
    advance(unit.stop)
    parts = [env[unit.result] for env in envs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def finish_linear(
    draft: Draft,
    linear: Linear,
    moments: Moments,
    recipe: Recipe,
) -> None:
    """Round one weight and correct its bias."""
    structure: Structure = draft.structure
    weight = draft.constant(linear.weight)
    if not linear.given:
        draft.weights.pop(linear.weight, None)
        second = moments.second
        if not recipe.bias_correction:
            second = second + torch.outer(moments.mean, moments.mean)
        quantizer = draft.quantizer(linear.source) if linear.source in structure.sites else None
        windows = None
        if recipe.int16_groups and (quantizer is None or quantizer.dtype == "int8"):
            windows = Windows.of(len(weight), recipe.int16_groups)
        if recipe.rounding == "error":
            codes = round_by_error(weight, second, windows)
        else:
            codes = round_nearest(weight, second.diagonal().float(), windows)
        if quantizer is not None and quantizer.dtype == "int16":
            codes = limit_codes(
                weight, codes, _largest_sum(draft, linear, codes.scale, quantizer.scale)
            )
        draft.weights[linear.weight] = codes
    mean = draft.means.get(linear.x)
    if recipe.bias_correction and mean is not None and not linear.given:
        real = draft.weights[linear.weight].real.double()
        wanted = mean.double() @ weight.double()
        draft.set_bias(linear, (draft.bias(linear) + (wanted - moments.mean @ real)).float())


def _largest_sum(draft: Draft, linear: Linear, steps: torch.Tensor, scale: float) -> int:
    """Largest ``sum |code|`` of a column for which int16 inputs cannot overflow int32."""
    bias = draft.bias(linear).abs() / (steps * scale)
    return int((INT32 - 1.5 * float(bias.max()) - 1e6) / 32767.0)
