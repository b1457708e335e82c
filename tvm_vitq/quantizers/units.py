"""Cuts a program at its residual adds: the units between which errors are measured.

A unit is a run of steps that reads one activation and hands on one activation, so that it can be
executed alone. In a pre-norm transformer the units are the halves of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.quantizers.structure import Structure

__all__ = ["Unit", "cut"]


@dataclass(frozen=True)
class Unit:
    """Steps ``start`` to ``stop`` (exclusive), from slot ``source`` to slot ``result``."""

    start: int
    stop: int
    source: int
    result: int


def cut(structure: Structure) -> list[Unit]:
    """Return the units of a program in the order of execution."""
    program = structure.program
    units: list[Unit] = []
    start, source, live = 0, program.input_slot, {program.input_slot}
    ends = {"residual", "embed"}
    for index, step in enumerate(program.steps):
        live.add(step.out)
        live = {slot for slot in live if program.last_use.get(slot, -1) > index}
        site = structure.sites.get(step.out)
        last = index == len(program.steps) - 1
        if last or (live == {step.out} and site is not None and site.kind in ends):
            units.append(Unit(start, index + 1, source, step.out))
            start, source = index + 1, step.out
    return units
