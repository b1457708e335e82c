"""Executes the decided network on all images and rounds weights and biases to what it really sees.

Unit by unit, linear by linear: the quantized input of a linear is gathered over all images, the
weight is rounded by output error, and the bias takes the mean error that is left, so that every
linear's mean output is the float network's. Rows count by their importance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
ROWS = 16384
"""Rows that moments are taken of, about."""
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
        total, weight = torch.zeros(size, dtype=torch.float64), 0.0
        inner, square = torch.zeros_like(total), torch.zeros(size, size, dtype=torch.float64)
        count, spread = parts[0][0].numel() // size, 0.0
        weights = row_weights(count, importance)
        broad = weights + BROAD
        root = broad.float().sqrt()[:, None]
        stride = max(1, sum(len(part) for part in parts) * count // ROWS)
        for part in parts:
            rows = part.reshape(len(part), -1, size)
            total += weights @ rows.sum(0, dtype=torch.float64)
            weight += float(weights.sum()) * len(part)
            some = rows[::stride]
            inner += broad @ some.sum(0, dtype=torch.float64)
            spread += float(broad.sum()) * len(some)
            scaled = (some * root).flatten(0, 1)
            square += (scaled.T @ scaled).double()
        mean, centre = total / weight, inner / spread
        second = square / spread - torch.outer(centre, centre)
        return cls(mean, second)


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
        for env in envs:
            program.execute(
                env, start=at, stop=stop, keep=keep, hook=draft.hook, constants=values,
                operators=operators,
            )

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
