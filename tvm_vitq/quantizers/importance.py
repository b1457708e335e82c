"""How much the logits depend on activations: by element of a unit's output, by row of a site.

With J the Jacobian of the logits and r a random direction among them, ``(J^T r)^2`` averages to the
diagonal of ``J^T J``: the square error that an error of that element makes in the logits. Errors of
different units weighted so are comparable, and a token that no later layer looks at weighs nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from tvm_vitq.calibration.workers import spread
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.reference.float_interpreter import Program, Step

__all__ = ["Importance", "measure_importance"]

CHUNK = 4
NEGLIGIBLE = 1e-9


@dataclass
class Importance:
    """Mean squared gradients of random directions among the logits.

    Attributes
    ----------
    outputs : dict of int to torch.Tensor
        Result slot of a unit -> ``[1, *static shape]``.
    rows : dict of int to torch.Tensor
        Watched slot -> ``[rows of one chunk]``, mean over the last axis; exactly 0 where
        negligible.
    """

    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


def measure_importance(
    program: Program,
    units: list[Unit],
    watched: Collection[int],
    x: torch.Tensor,
    seed: int = 0,
) -> Importance:
    """Measure importance on a few images.

    Parameters
    ----------
    program : Program
        The float program.
    units : list of Unit
    watched : collection of int
        Slots whose rows are weighed.
    x : torch.Tensor
        Lifted images ``[n, B, ...]``.
    seed : int
        Seed of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    out = Importance()
    ends = {unit.result for unit in units}
    directions = torch.randn(
        (len(x), *program.shape(program.output_slot)), generator=generator
    )
    directions -= directions.mean(-1, keepdim=True)

    def squares(item: tuple[torch.Tensor, torch.Tensor]) -> dict[int, torch.Tensor]:
        part, direction = item
        seen: dict[int, torch.Tensor] = {}

        def watch(step: Step, result: torch.Tensor) -> torch.Tensor:
            if step.out in watched or step.out in ends:
                result = result if result.requires_grad else result.requires_grad_()
                seen[step.out] = result
            return result

        with torch.enable_grad():
            env = program.execute(
                {program.input_slot: part}, keep=frozenset({program.output_slot}), hook=watch
            )
            found = torch.autograd.grad(
                (env[program.output_slot] * direction).sum(), list(seen.values()), allow_unused=True
            )
        return {
            slot: gradient.square_().sum(0, keepdim=True) / x.shape[0]
            for slot, gradient in zip(seen, found, strict=True)
            if gradient is not None
        }

    parts = zip(x.split(CHUNK), directions.split(CHUNK), strict=True)
    for found in spread(squares, parts):
        for slot, square in found.items():
            if slot in ends:
                out.outputs[slot] = out.outputs.get(slot, 0.0) + square
            rows = square.reshape(-1, square.shape[-1]).mean(-1)
            out.rows[slot] = out.rows.get(slot, 0.0) + rows
    for slot, rows in out.rows.items():
        peak = float(rows.max())
        usable = rows > NEGLIGIBLE * peak if peak > 0 else torch.ones_like(rows, dtype=torch.bool)
        out.rows[slot] = torch.where(usable, rows.clamp_min(1e-30), torch.zeros_like(rows))
    return out
