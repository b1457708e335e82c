"""Packed forms of constant weights: what a matmul kernel loads.

``pack`` cuts an int8 matrix [K, N] into column blocks of ``nt`` and groups of ``kv`` channels:
``packed[b, g, j, v] = w[g*kv + v, b*nt + j]``, zeros where K and N are padded. ``plan`` chooses the
dot sequence and the block for an instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .gemm import Tile, default_tile
from .isa import ISA
from .x86.intrinsics import DOTS, Dot

__all__ = ["LinearPlan", "narrow_form", "pack", "pad_columns", "plan_linear", "unpack"]


@dataclass(frozen=True)
class LinearPlan:
    """The chosen form of one weight matmul."""

    dot: Dot
    tile: Tile
    offset: int

    @property
    def nt(self) -> int:
        """Columns of a block."""
        return self.dot.lanes * self.tile.vectors


def plan_linear(isa: ISA, dtype: str, rows: int, depth: int, columns: int) -> LinearPlan | None:
    """Choose dot sequence and tile for ``[rows, depth] x [depth, columns]``.

    Parameters
    ----------
    isa
        Instruction set of the target.
    dtype
        dtype of the activations: int8, uint8 or int16.

    Returns
    -------
    LinearPlan or None
        None where the instruction set has no kernels.
    """
    if not isa.has_kernels:
        return None
    dot = DOTS[isa.dot16 if dtype == "int16" else isa.dot8]
    offset = 128 if dtype == "int8" and dot.operand == "uint8" else 0
    del depth
    return LinearPlan(dot, default_tile(isa, rows, columns), offset)


def pack(w: np.ndarray, nt: int, kv: int) -> np.ndarray:
    """Pack int8 [K, N] to int8 [ceil(N/nt), ceil(K/kv), nt, kv]."""
    depth, columns = w.shape
    groups, blocks = -(-depth // kv), -(-columns // nt)
    padded = np.zeros((groups * kv, blocks * nt), dtype=np.int8)
    padded[:depth, :columns] = w
    return np.ascontiguousarray(padded.reshape(groups, kv, blocks, nt).transpose(2, 0, 3, 1))


def unpack(packed: np.ndarray, depth: int, columns: int) -> np.ndarray:
    """Undo :func:`pack`."""
    blocks, groups, nt, kv = packed.shape
    flat = packed.transpose(1, 3, 0, 2).reshape(groups * kv, blocks * nt)
    return np.ascontiguousarray(flat[:depth, :columns])


def pad_columns(values: np.ndarray, nt: int, fill: int) -> np.ndarray:
    """Pad int32 [N] to whole column blocks with ``fill``."""
    padded = np.full(-(-len(values) // nt) * nt, fill, dtype=np.int32)
    padded[: len(values)] = values
    return padded


def narrow_form(
    mult: np.ndarray, shift: np.ndarray, accumulator: int, zero_point: int
) -> tuple[np.ndarray, np.ndarray, dict[str, bool | int]]:
    """Bring requantisation parameters to the fast form, if they allow it.

    A column whose accumulator always rounds to 0 gets ``(0, 32)``, which says the same.

    Parameters
    ----------
    mult, shift
        int32 [N], the contract's m and e.
    accumulator
        Proved bound of the accumulator's magnitude.
    zero_point
        Of the output.

    Returns
    -------
    mult, shift, flags
        ``flags`` are the fields ``narrow``, ``lift`` and ``fold_zero`` of an Epilogue: narrow if
        there is a lift t >= 0 with e + t in [32, 62] for all e and accumulator * 2^t < 2^31.
    """
    mult, shift = mult.astype(np.int64), shift.astype(np.int64)
    product = np.abs(mult) * accumulator
    nothing = product < np.left_shift(np.int64(1), shift - 1)
    mult, shift = np.where(nothing, 0, mult), np.where(nothing, 32, shift)
    lift = max(0, 32 - int(shift.min(initial=32)))
    most = int(shift.max(initial=32)) + lift
    narrow = accumulator << lift < 2**31 and most <= 62 and abs(zero_point) < 2**29
    fold = narrow and (2 * abs(zero_point) + 1) << (most - 1) < 2**62
    flags = {"narrow": narrow, "lift": lift if narrow else 0, "fold_zero": fold}
    return mult.astype(np.int32), shift.astype(np.int32), flags
