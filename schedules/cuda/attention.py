"""Attention as one kernel: ``softmax(Q K^T, masks) V``, bit for bit as its members do it apart.

A warp has 16 query rows of one batch entry (image or window, and head) and walks the keys in steps
of 32::

    scores          Q K^T of a step on tensor cores, requantised, bias and masks added; the codes go
                    to the warp's scratch as pairs, the rows' maxima stay in registers
    exponentials    of a step, from scratch to scratch; the rows' sums
    probabilities   of a step, from scratch to scratch, there as fragments of the next product
    P V             of 32 channels at a time

Each thread reads of the scratch (shared memory, 1 KiB a step) what it has written itself, so there
is no barrier, and a row may have as many keys as the scratch holds. Q, K and V come straight from
memory (:mod:`schedules.cuda.attention_operands`). Where that makes too few warps, several of one
block share the rows, each with its part of the keys; maxima, sums and products are then exchanged.

All arithmetic but the products is the members' own: the epilogues' from their ``GemmSpec``, the
masks' and the softmax's from their expressions, whatever family that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from schedules.apply import blocks_of, gemm_spec
from schedules.gemm import GemmSpec
from schedules.records import Schedules
from schedules.rows import Stage, stage_of
from schedules.spaces.gpu_attention import gpu_attention_task, gpu_attention_tile

from .attention_expression import NotTaken
from .attention_kernel import AttentionKernel
from .attention_tile import MOST_SHARED_BYTES, AttentionTile

__all__ = ["Problem", "attention", "problem_of"]


@dataclass(frozen=True)
class Problem:
    """What is computed: the members, checked.

    Parameters
    ----------
    scores, context
        The matmuls' specs, their parameters beside them.
    between
        Of each elementwise member: its parameters, the position of the scores, its one stage.
    stages
        The softmax's, in order.
    entries, rows, keys, depth, columns
        Batch entries (all leading axes), M, N, and the channels of Q K^T and of P V.
    """

    scores: GemmSpec
    scores_params: list[Any]
    between: list[tuple[list[Any], int, Stage]]
    softmax_params: list[Any]
    stages: list[Stage]
    context: GemmSpec
    context_params: list[Any]
    entries: int
    rows: int
    keys: int
    depth: int
    columns: int

    @property
    def registers(self) -> int | None:
        """What a thread may have where q, k or v is of 16 bits; else ptxas chooses well."""
        operands = (*self.scores_params[:2], self.context_params[1])
        return 128 if any(str(buffer.dtype) == "int16" for buffer in operands) else None


def _shape(buffer: Any, axes: Sequence[int] = ()) -> list[int]:
    shape = [int(extent) for extent in buffer.shape]
    return [shape[axis] for axis in axes] if axes else shape


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise NotTaken(what)


def _matmul(func: tirx.PrimFunc) -> tuple[GemmSpec, list[Any]]:
    spec = gemm_spec(func)
    if spec is None or spec.kind != "matmul":
        raise NotTaken("a product that is no matmul of activations")
    return spec, list(func.params)


def _blocks(func: tirx.PrimFunc) -> list[Any]:
    return [block for block in blocks_of(func.body) if block.iter_vars]


def _between(func: tirx.PrimFunc, position: int | None) -> tuple[list[Any], int, Stage]:
    """Return an elementwise member; the scores are its one operand of the result's size."""
    blocks, params = _blocks(func), list(func.params)
    stage = stage_of(blocks[0]) if len(blocks) == 1 else None
    whole = [i for i, param in enumerate(params[:-1]) if _shape(param) == _shape(params[-1])
             and position in (i, None)]
    if stage is None or stage.kind != "map" or len(whole) != 1:
        raise NotTaken("an operator between scores and softmax that is not one on elements")
    return params, whole[0], stage


def _softmax(func: tirx.PrimFunc) -> list[Stage]:
    stages: list[Stage] = []
    shape = _shape(func.params[-1])
    for block in _blocks(func):
        stage = stage_of(block)
        if stage is None:
            raise NotTaken("a stage of the softmax")
        if stage.kind == "map" and _shape(stage.buffer) == shape:
            *rows, column = stage.rows
            stage = Stage(stage.name, rows, column, stage.buffer, stage.value, "element")
        elif stage.kind == "map":
            stage = Stage(stage.name, stage.rows, None, stage.buffer, stage.value, "row")
        stages.append(stage)
    kinds = [stage.kind for stage in stages]
    _require(kinds[:3] == ["Max", "element", "Add"] and kinds[-1] == "element"
             and set(kinds[3:-1]) <= {"row"}, "a softmax of other stages")
    return stages


def problem_of(scores: tirx.PrimFunc, between: Sequence[tirx.PrimFunc], softmax: tirx.PrimFunc,
               context: tirx.PrimFunc, positions: Sequence[int] | None = None) -> Problem:
    """Check the members and return what they compute; see :func:`attention`.

    Raises
    ------
    NotTaken
        If the kernel has no form for them; the message says for what.
    """
    first, q_params = _matmul(scores)
    last, v_params = _matmul(context)
    *batch, rows, depth = _shape(q_params[0], first.a_axes)
    *_, keys, k_depth = _shape(q_params[1], first.b_axes)
    _require(first.transpose_b and k_depth == depth and not first.out_axes,
             "scores whose K does not lie by keys, or that are stored permuted")
    *_, v_keys, columns = _shape(v_params[1], last.b_axes)
    _require(not last.transpose_b and not last.a_axes and v_keys == keys
             and last.epilogue.kind != "requant_add", "a context of another form")
    entries = int(np.prod(batch, dtype=np.int64))
    places: Sequence[int | None] = positions or [None] * len(between)
    members = [_between(*pair) for pair in zip(between, places, strict=True)]
    for params in (q_params[-1:], *(p for p, _, _ in members), softmax.params[-1:], v_params[:1]):
        *outer, m, n = _shape(params[-1])
        _require((int(np.prod(outer, dtype=np.int64)), m, n) == (entries, rows, keys),
                 f"scores of shape {_shape(params[-1])}")
    dtypes = {str(buffer.dtype) for buffer in (q_params[0], q_params[1], v_params[0], v_params[1])}
    _require(dtypes <= {"int8", "uint8", "int16"}, f"operands of {', '.join(sorted(dtypes))}")
    _require(str(softmax.params[0].dtype) in ("int8", "uint8", "int16"), "wider scores")
    return Problem(first, q_params, members, list(softmax.params), _softmax(softmax), last,
                   v_params, entries, rows, keys, depth, columns)


def attention(scores: tirx.PrimFunc, between: Sequence[tirx.PrimFunc], softmax: tirx.PrimFunc,
              context: tirx.PrimFunc, tile: AttentionTile | None = None,
              positions: Sequence[int] | None = None,
              schedules: Schedules | None = None) -> tirx.PrimFunc | None:
    """Return one scheduled PrimFunc for the members of an attention.

    Parameters
    ----------
    scores
        Legalised activation matmul of q [..., M, D] and k [..., N, D], both int8, uint8 or int16
        and permuted as its ``GemmSpec`` says; its epilogue may add a residual (a position bias).
    between
        Legalised elementwise PrimFuncs that the scores go through, each with one operand of the
        scores' size; leading axes may be cut otherwise (a reshape is a view).
    softmax
        Legalised softmax of what comes out, of any family.
    context
        Legalised activation matmul of the probabilities and v [..., N, C].
    tile
        How the kernel is cut; None: as the records say, else by the default rule.
    positions
        Of each of ``between``: which operand the scores are. None: the one of their size, and there
        is no form for members that have several.
    schedules
        Records of tuning; None for the default rule alone.

    Returns
    -------
    PrimFunc or None
        Its parameters are those of each member in order, without the intermediates (each member's
        result and the operand of the next that takes it), then the context's result. So: q, k,
        [residual], [scalars], the other operands of ``between``, the softmax's constants, v,
        [scalars], out. None if there is no form for the members or too little shared memory for
        their rows (2000 keys): they then run apart.
    """
    try:
        problem = problem_of(scores, between, softmax, context, positions)
        if tile is None:
            tile = _tile(problem, schedules)
        if tile.shared(problem.keys) > MOST_SHARED_BYTES:
            return None
        return AttentionKernel(problem, tile.rows, tile.split).build()
    except NotTaken:
        return None


def _tile(problem: Problem, schedules: Schedules | None) -> AttentionTile:
    operands = [*problem.scores_params[:2], problem.context_params[1]]
    task = gpu_attention_task(
        (problem.entries, problem.rows, problem.keys, problem.depth),
        [str(buffer.dtype) for buffer in operands], len(problem.between))
    point = None if schedules is None else schedules.point(task)
    return AttentionTile(**point) if point else gpu_attention_tile(task)
