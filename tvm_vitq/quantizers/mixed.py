"""Spends the budget of 16-bit activations where it buys most.

A site may take int16 instead of int8 codes; the products that read it are then int16 times int8.
What that gains was measured as unit-output error; what it costs is the share of the network's
multiply-accumulates that read the site. Sites are taken by gain per cost until the budget is spent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_vitq.quantizers.search import Choice
from tvm_vitq.quantizers.structure import Structure

__all__ = ["Product", "choose_wide", "products", "wide_share"]


WORTHWHILE = 0.005
"""Share of the error that all offers together take away which an offer must take away itself."""


@dataclass(frozen=True)
class Product:
    """One matrix product: who makes its operands and how many multiply-accumulates it takes."""

    macs: float
    left: frozenset[int]
    right: frozenset[int]


def products(structure: Structure) -> list[Product]:
    """Return every matrix product of the network."""
    found = []
    for step in structure.program.steps:
        if step.op == "matmul":
            macs = math.prod(structure.program.shape(step.out))
            macs *= structure.program.shape(step.args[0])[-1]
            ends = [
                frozenset(structure.origins(slot)) if up else frozenset()
                for slot, up in zip(step.args, step.lifted, strict=True)
            ]
            found.append(Product(float(macs), *ends))
    return found


def _allowed(structure: Structure, product: Product, taken: set[int]) -> bool:
    """Whether int32 holds the sums: int16 times int16 only if the left rows sum to one."""
    both = taken & product.left and taken & product.right
    return not both or all(structure.sites[s].kind == "softmax" for s in product.left)


def wide_share(structure: Structure, sites: list[int]) -> float:
    """Share of all multiply-accumulates that have one of the sites as an operand."""
    every, chosen = products(structure), set(sites)
    total = sum(p.macs for p in every)
    return sum(p.macs for p in every if chosen & (p.left | p.right)) / max(total, 1.0)


def choose_wide(structure: Structure, choices: list[Choice], budget: float) -> list[int]:
    """Return the sites that take int16 codes, best first.

    Parameters
    ----------
    structure : Structure
    choices : list of Choice
        With errors for int8 and int16 codes.
    budget : float
        Share of all multiply-accumulates that may have one of the chosen sites as an operand.
    """
    every = products(structure)
    left = budget * sum(product.macs for product in every)
    reads = {
        choice.site: [p for p in every if choice.site in p.left | p.right] for choice in choices
    }
    offers = {
        choice.site: choice.error - choice.wide_error
        for choice in choices
        if choice.wide_error is not None and choice.error > choice.wide_error and reads[choice.site]
    }
    least = WORTHWHILE * sum(offers.values())
    offers = {site: gain for site, gain in offers.items() if gain >= least}
    taken: list[int] = []
    paid: set[Product] = set()

    def cost(site: int) -> float:
        return sum(p.macs for p in reads[site] if p not in paid)

    while offers:
        site = max(offers, key=lambda s: offers[s] / max(cost(s), 1.0))
        fits = all(_allowed(structure, p, {*taken, site}) for p in reads[site])
        if fits and cost(site) <= left:
            left -= cost(site)
            taken.append(site)
            paid.update(reads[site])
        del offers[site]
    return taken
