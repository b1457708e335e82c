"""How much the logits depend on every element of a unit's output.

With J the Jacobian of the logits and r a random unit direction among them, ``(J^T r)^2`` averages to
the diagonal of ``J^T J``: the square error that an error of that element makes in the logits. Errors
of different units weighted so are comparable, and a token that no later layer looks at weighs nothing.
"""

from __future__ import annotations

import torch

from tvm_vitq.quantizers.units import Unit
from tvm_vitq.reference.float_interpreter import Program

__all__ = ["output_importance"]

CHUNK = 4


def output_importance(
    program: Program, units: list[Unit], x: torch.Tensor, seed: int = 0
) -> dict[int, torch.Tensor]:
    """Return the weighting of every unit's output.

    Parameters
    ----------
    program : Program
        The float program.
    units : list of Unit
    x : torch.Tensor
        Lifted images ``[n, B, ...]``.
    seed : int
        Seed of the random directions.

    Returns
    -------
    dict of int to torch.Tensor
        Result slot -> ``[1, *static shape]``, mean over the images; the last unit's is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[int, torch.Tensor] = {}
    for part in x.split(CHUNK):
        with torch.enable_grad():
            values, ends = part.float() if part.dtype == torch.float32 else part, []
            for unit in units:
                env = {unit.source: values}
                env = program.execute(
                    env, start=unit.start, stop=unit.stop, keep=frozenset({unit.result})
                )
                values = env[unit.result]
                if not values.requires_grad:
                    values = values.detach().requires_grad_()
                ends.append(values)
            logits = ends[-1]
            direction = torch.randn(logits.shape, generator=generator)
            direction -= direction.mean(-1, keepdim=True)
            gradients = torch.autograd.grad((logits * direction).sum(), ends)
        for unit, gradient in zip(units, gradients, strict=True):
            square = gradient.square().sum(0, keepdim=True)
            total[unit.result] = total.get(unit.result, 0.0) + square
    return {slot: value / x.shape[0] for slot, value in total.items()}
