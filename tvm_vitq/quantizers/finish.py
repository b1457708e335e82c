"""Executes the decided network on all images and rounds weights and biases to what it really sees.

Unit by unit, linear by linear: the quantized input of a linear is gathered over all images, the
weight is rounded by output error, and the bias takes the mean error that is left, so that every
linear's mean output is the float network's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_vitq.quantizers.draft import CHUNK, Draft
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.structure import Linear, Structure
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.quantizers.weights import limit_codes, round_by_error, round_nearest

__all__ = ["Moments", "finish_unit"]

INT32 = 2**31 - 1
ROWS = 16384
"""Rows that moments are taken of, about."""


@dataclass
class Moments:
    """First and second moments of the rows of an activation.

    Attributes
    ----------
    count : int
    total : torch.Tensor
        float64 [K].
    square : torch.Tensor
        float64 [K, K].
    """

    count: int
    total: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, parts: list[torch.Tensor]) -> Moments:
        """Gather the moments of activations ``[..., K]``."""
        size = parts[0].shape[-1]
        total = torch.zeros(size, dtype=torch.float64)
        square = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        stride = max(1, sum(part.numel() // size for part in parts) // ROWS)
        for part in parts:
            rows = part.reshape(-1, size)[::stride]
            count += len(rows)
            total += rows.sum(0, dtype=torch.float64)
            square += (rows.T @ rows).double()
        return cls(count, total, square)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of every channel."""
        return self.total / self.count

    def second(self, centred: bool) -> torch.Tensor:
        """Second moments, about the mean if ``centred``."""
        moment = self.square / self.count
        return moment - torch.outer(self.mean, self.mean) if centred else moment


def finish_unit(
    draft: Draft,
    unit: Unit,
    x: torch.Tensor,
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
    linears = {l.step: l for l in structure.linears if unit.start <= l.step < unit.stop}
    envs = [{unit.source: part} for part in x.split(CHUNK)]
    keep = frozenset({unit.result})
    seen: dict[int, Moments] = {}
    at = unit.start

    def advance(stop: int) -> None:
        values = draft.values()
        for env in envs:
            program.execute(env, start=at, stop=stop, keep=keep, hook=draft.hook, constants=values)

    for index in sorted(linears):
        linear = linears[index]
        advance(index)
        at = index
        if linear.x not in seen:
            seen[linear.x] = Moments.of([env[linear.x] for env in envs])
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
        second = moments.second(centred=recipe.bias_correction)
        if recipe.rounding == "error":
            codes = round_by_error(weight, second)
        else:
            codes = round_nearest(weight, second.diagonal().float())
        quantizer = draft.quantizer(linear.source) if linear.source in structure.sites else None
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
