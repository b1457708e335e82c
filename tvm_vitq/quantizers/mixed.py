"""Spends the budget of 16-bit activations where it buys most.

A site may take int16 instead of int8 codes while the products that read them stay int8 times int16.
What that gains was measured as unit-output error; what it costs is the share of the network's
multiply-accumulates that read the site. Sites are taken by gain per cost until the budget is spent.
"""

from __future__ import annotations

import math

from tvm_vitq.quantizers.search import Choice
from tvm_vitq.quantizers.structure import Structure

__all__ = ["choose_wide", "product_costs"]

WORTHWHILE = 0.02
"""A site must take away this share of the summed error of all sites per full budget to be chosen."""


def product_costs(structure: Structure) -> tuple[dict[int, float], float]:
    """Return the multiply-accumulates that read each site, and those of the whole network."""
    costs: dict[int, float] = {}
    total = 0.0
    for step in structure.program.steps:
        if step.op != "matmul":
            continue
        out = math.prod(int(s) for s in step.call.ty.shape)
        macs = float(out * int(step.call.args[0].ty.shape[-1]))
        total += macs
        for site in structure.origins(step.args[0]):
            costs[site] = costs.get(site, 0.0) + macs
    return costs, total


def choose_wide(structure: Structure, choices: list[Choice], budget: float) -> list[int]:
    """Return the sites that take int16 codes, best first.

    Parameters
    ----------
    structure : Structure
    choices : list of Choice
        With errors for int8 and int16 codes.
    budget : float
        Share of all multiply-accumulates that may read int16 codes.
    """
    costs, total = product_costs(structure)
    offers = []
    for choice in choices:
        if choice.wide_error is None or choice.site not in costs:
            continue
        gain = choice.error - choice.wide_error
        if gain > 0:
            offers.append((gain / costs[choice.site], gain, choice.site))
    left, taken = budget * total, []
    for _, _, site in sorted(offers, reverse=True):
        if costs[site] <= left:
            left -= costs[site]
            taken.append(site)
    return taken
