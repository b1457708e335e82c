"""Packed forms of constant weights: what a matmul kernel loads.

``pack`` cuts an int8 matrix [K, N] into column blocks of ``nt`` and groups of ``kv`` channels:
``packed[b, g, j, v] = w[g*kv + v, b*nt + j]``, zeros where K and N are padded; a dot sequence may
want ``j`` and ``v`` in an order of its own (``column_slot``, ``channel_slot``). ``plan_linear``
chooses the dot sequence and the block for an instruction set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .arm.intrinsics import chains_of as smlal_chains
from .dot import Dot, dot_named
from .gemm import Tile, default_tile
from .isa import ISA
from .kernel import BITS
from .task import Point

__all__ = ["CHAINS", "LinearPlan", "chains_of", "narrow_form", "pack", "pad_columns",
           "plan_linear", "scalar_form", "short_limit", "short_windows", "unpack"]


CHAINS = (1, 2, 4)
"""Numbers of groups of K that kernels add in int16."""


@dataclass(frozen=True)
class LinearPlan:
    """The chosen form of one weight matmul; ``schedule`` is a record's tile as JSON, if any."""

    dot: Dot
    tile: Tile
    offset: int
    fallback: str = ""
    chains: tuple[int, ...] = ()
    schedule: str = ""

    @property
    def nt(self) -> int:
        """Columns of a block."""
        return self.dot.lanes * self.tile.vectors


def plan_linear(
    isa: ISA,
    dtype: str,
    rows: int,
    w: np.ndarray,
    codes: tuple[int, int] | None = None,
    choose: Callable[[int], Point | None] | None = None,
) -> LinearPlan | None:
    """Choose dot sequence and tile for a matmul of ``rows`` rows by the weights ``w``.

    The sequence that adds in int16 is chosen if it is exact for most of the column blocks; the
    others fall back. It takes codes from 0, so the lowest code becomes the offset.

    Parameters
    ----------
    isa
        Instruction set of the target.
    dtype
        dtype of the activations: int8, uint8 or int16.
    rows
        Rows of the activations.
    w
        int8 [K, N].
    codes
        Proved interval of the activations' codes; None: their dtype's.
    choose
        Returns a point of :mod:`schedules.spaces.linear`, or None for the default rules; it is told
        how many groups of K most column blocks may add in int16.

    Returns
    -------
    LinearPlan or None
        None where the instruction set has no kernels.
    """
    if not isa.has_kernels:
        return None
    plan = _default_plan(isa, dtype, rows, w, codes)
    if choose is None:
        return plan
    point = choose(Counter(plan.chains).most_common(1)[0][0] if plan.chains else 0)
    return plan if point is None else _plan_at(point, plan, isa, dtype, w, codes)


def _plan_at(
    point: Point, default: LinearPlan, isa: ISA, dtype: str, w: np.ndarray,
    codes: tuple[int, int] | None,
) -> LinearPlan:
    """Return the plan of a point, whatever its sequence is exact for."""
    tile = Tile.of(point)
    low, high = codes or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if point["dot"] == default.dot.name:
        plan = replace(default, tile=tile)
    else:
        dot = dot_named(isa.dot(dtype))
        plan = LinearPlan(dot, tile, dot.offset(dtype))
    packed = pack(w, plan.nt, plan.dot.kv) if plan.chains else None
    if packed is not None and plan.dot.name == "smlal8":
        found = smlal_chains(packed, low + plan.offset, high + plan.offset)
        plan = replace(plan, chains=tuple(found))
    elif packed is not None:
        found = chains_of(packed, high + plan.offset)
        most = point["chain"] or max(CHAINS)
        plan = replace(plan, chains=tuple(min(chain, most) for chain in found))
    return replace(plan, schedule=json.dumps(asdict(tile), sort_keys=True))


def _default_plan(
    isa: ISA, dtype: str, rows: int, w: np.ndarray, codes: tuple[int, int] | None
) -> LinearPlan:
    """Return the plan of the default rules."""
    dot = dot_named(isa.dot(dtype))
    tile = default_tile(isa, rows, w.shape[1], dot)
    plan = LinearPlan(dot, tile, dot.offset(dtype))
    if dot.name == "smlal8":
        low, high = codes or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        shifted = low + plan.offset, high + plan.offset
        return replace(plan, chains=tuple(smlal_chains(pack(w, plan.nt, dot.kv), *shifted)))
    if dtype == "int16" or not isa.proved8 or rows < 8:
        return plan
    low, high = codes or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    low = min(low, 0) if dtype == "int8" else 0
    faster = dot_named(isa.proved8)
    chains = chains_of(pack(w, plan.nt, faster.kv), high - low)
    proved = [chain for chain in chains if chain]
    if len(proved) < 0.75 * len(chains):
        return plan
    return LinearPlan(faster, tile, -low, isa.dot8, tuple(chains))


def short_windows(depth: int, chain: int) -> np.ndarray:
    """Return int64 [K]: which weights of a column share a 16-bit sum, in groups of ``chain``.

    The sequence adds codes 0, 1 and codes 2, 3 of a group of four in different lanes.
    """
    k = np.arange(depth)
    return k // (4 * chain) * 2 + k % 4 // 2


def short_limit(largest: int) -> int:
    """Return what the weights of one sign in a window may sum to, for codes 0 to ``largest``."""
    return (2**15 - 1) // largest


def chains_of(packed: np.ndarray, largest: int) -> list[int]:
    """Return for each column block how many groups of K may be added in int16, proved exact.

    Parameters
    ----------
    packed
        int8 [blocks, groups, nt, 4]; codes of channels 0, 1 and of 2, 3 are added by vpmaddubsw.
    largest
        Largest activation code; the smallest is 0.

    Returns
    -------
    list of int
        The largest of :data:`CHAINS` for which ``largest`` times the positive weights of every
        window, and times the negative ones, fits int16; 0 if there is none.
    """
    blocks, groups, nt, _ = packed.shape
    pairs = packed.astype(np.int64).reshape(blocks, groups, nt, 2, 2)
    positive = np.maximum(pairs, 0).sum(axis=-1)
    negative = np.minimum(pairs, 0).sum(axis=-1)
    result = []
    for block in range(blocks):
        found = 0
        for chain in CHAINS:
            # Windows start at multiples of the chain; the last may be shorter.
            starts = np.arange(0, groups, chain)
            most = np.add.reduceat(positive[block], starts, axis=0).max() * largest
            least = np.add.reduceat(negative[block], starts, axis=0).min() * largest
            if most <= 2**15 - 1 and least >= -(2**15):
                found = chain
        result.append(found)
    return result


def pack(w: np.ndarray, nt: int, kv: int, dot: Dot | None = None) -> np.ndarray:
    """Pack int8 [K, N] to int8 [ceil(N/nt), ceil(K/kv), nt, kv], in the slots of ``dot``."""
    depth, columns = w.shape
    groups, blocks = -(-depth // kv), -(-columns // nt)
    padded = np.zeros((groups * kv, blocks * nt), dtype=np.int8)
    padded[:depth, :columns] = w
    packed = padded.reshape(groups, kv, blocks, nt).transpose(2, 0, 3, 1)
    if dot is not None:
        packed = packed[:, :, np.argsort(dot.column_slot(np.arange(nt)))]
        packed = packed[..., np.argsort(dot.channel_slot(np.arange(kv)))]
    return np.ascontiguousarray(packed)


def unpack(
    packed: np.ndarray, depth: int, columns: int, dot: Dot | None = None
) -> np.ndarray:
    """Undo :func:`pack`."""
    blocks, groups, nt, kv = packed.shape
    if dot is not None:
        packed = packed[:, :, dot.column_slot(np.arange(nt))]
        packed = packed[..., dot.channel_slot(np.arange(kv))]
    flat = packed.transpose(1, 3, 0, 2).reshape(groups * kv, blocks * nt)
    return np.ascontiguousarray(flat[:depth, :columns])


def pad_columns(values: np.ndarray, nt: int, fill: int) -> np.ndarray:
    """Pad int32 [N] to whole column blocks with ``fill``."""
    padded = np.full(-(-len(values) // nt) * nt, fill, dtype=np.int32)
    padded[: len(values)] = values
    return padded


def scalar_form(
    shift: int, zero_point: int, depth: int, dtypes: Sequence[str]
) -> dict[str, bool | int]:
    """Return the ``flags`` of :func:`narrow_form` for an activation matmul's one shift.

    Parameters
    ----------
    shift, zero_point
        The contract's e, and the output's zero point.
    depth, dtypes
        K, and the dtypes of both operands.
    """
    bound = depth
    for dtype in dtypes:
        bound <<= BITS[dtype] - 1
    lift = max(0, 32 - shift)
    total = shift + lift
    narrow = bound << lift < 2**31 and total <= 62 and abs(zero_point) < 2**29
    fold = narrow and (2 * abs(zero_point) + 1) << (total - 1) < 2**62
    return {"narrow": narrow, "lift": lift if narrow else 0, "fold_zero": fold}


def narrow_form(
    mult: np.ndarray, shift: np.ndarray, accumulator: int, zero_point: int, least: int = 32
) -> tuple[np.ndarray, np.ndarray, dict[str, bool | int]]:
    """Bring requantisation parameters to the fast form, if they allow it.

    A column whose accumulator always rounds to 0 gets ``(0, least)``, which says the same.

    Parameters
    ----------
    mult, shift
        int32 [N], the contract's m and e.
    accumulator
        Proved bound of the accumulator's magnitude.
    zero_point
        Of the output.
    least
        The least shift of the fast form (``Dot.least_shift``).

    Returns
    -------
    mult, shift, flags
        ``flags`` are the fields ``narrow``, ``lift`` and ``fold_zero`` of an Epilogue: narrow if
        there is a lift t >= 0 with e + t in [least, 62] for all e and accumulator * 2^t < 2^31.
    """
    mult, shift = mult.astype(np.int64), shift.astype(np.int64)
    product = np.abs(mult) * accumulator
    nothing = product < np.left_shift(np.int64(1), shift - 1)
    mult, shift = np.where(nothing, 0, mult), np.where(nothing, least, shift)
    lift = max(0, least - int(shift.min(initial=least)))
    most = int(shift.max(initial=least)) + lift
    narrow = accumulator << lift < 2**31 and most <= 62 and abs(zero_point) < 2**29
    fold = narrow and (2 * abs(zero_point) + 1) << (most - 1) < 2**62
    flags = {"narrow": narrow, "lift": lift if narrow else 0, "fold_zero": fold}
    return mult.astype(np.int32), shift.astype(np.int32), flags
