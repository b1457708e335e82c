"""What a dot sequence is: how a matmul kernel multiplies, whatever the architecture.

A sequence adds to each 32-bit lane the dot product of ``kv`` activation codes (the same for every
lane) and ``kv`` weight codes (one group per lane). The sequences themselves are described in
``schedules.{x86,arm,cuda}.intrinsics``; :func:`dot_named` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["Dot", "dot_named"]

BITS = {"int8": 8, "uint8": 8, "int16": 16}


@dataclass(frozen=True)
class Dot:
    """One dot sequence.

    Parameters
    ----------
    name
        Key in its architecture's ``DOTS``.
    lanes
        32-bit lanes of the accumulator.
    kv
        Channels of K that one step takes.
    operand
        dtype that activations have in memory.
    weight
        dtype that weights have in registers; int8 in memory either way.
    intrinsic
        LLVM's name of the multiplying instruction.
    mnemonic
        What a disassembly shows.
    """

    name: str
    lanes: int
    kv: int
    operand: str
    weight: str
    intrinsic: str
    mnemonic: str

    @property
    def arithmetic(self) -> ModuleType:
        """The module with the architecture's fast requantisation: see ``schedules.requant``."""
        raise NotImplementedError

    @property
    def word(self) -> str:
        """Integer dtype as wide as the ``kv`` codes of one group."""
        return f"int{self.kv * BITS[self.operand]}"

    @property
    def span(self) -> int:
        """Groups of K of one row that are loaded as one vector; 1 if each is broadcast alone."""
        return 1

    @property
    def rows(self) -> int:
        """Rows of activations that one step takes."""
        return 1

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Register tiles (vectors, rows), the best first; empty where the ISA's rule decides."""
        return ()

    @property
    def halves(self) -> tuple[Dot, Dot] | None:
        """Sequences of the high and the low bytes, if 16-bit codes are taken in two passes."""
        return None

    def offset(self, dtype: str) -> int:
        """Return what is added to codes of ``dtype`` to bring them to :attr:`operand`."""
        if self.halves is not None:
            return self.halves[1].offset("uint8")
        return {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((dtype, self.operand), 0)

    @property
    def least_shift(self) -> int:
        """The least shift of the fast form of requantisation."""
        return 32

    def column_slot(self, column: Any) -> Any:
        """Return where a column of a block of the packed weights stands in it."""
        return column

    def channel_slot(self, channel: Any) -> Any:
        """Return where a channel of a group of the packed weights stands in it."""
        return channel

    def spread(self, word: Any) -> Any:
        """Return one group, an integer of dtype :attr:`word`, in register form for every lane."""
        raise NotImplementedError

    def lane(self, codes: Any, index: int) -> Any:
        """Return group ``index`` of ``span * kv`` loaded codes in register form for every lane."""
        raise NotImplementedError

    def step(self, acc: Any, groups: Sequence[Any], weights: Sequence[Any]) -> Any:
        """Return ``acc + sum_i groups[i] . weights[i]``.

        Parameters
        ----------
        acc
            int32 x lanes.
        groups
            Activation codes in register form.
        weights
            Each ``weight`` dtype x (lanes * kv).
        """
        raise NotImplementedError


def dot_named(name: str) -> Dot:
    """Return the sequence called ``name``, of any architecture."""
    from .arm import intrinsics as arm
    from .cuda import intrinsics as cuda
    from .x86 import intrinsics as x86

    every: dict[str, Dot] = {**x86.DOTS, **arm.DOTS, **cuda.DOTS}
    return every[name]
