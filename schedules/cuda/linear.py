"""Packed weight matmuls on a GPU, one kernel for one or for several.

``out[i, n] = epilogue(sum_k x[i, k] * w[k, n] + bias[n])``, see :mod:`schedules.packed_linear`:
with tensor cores (:mod:`.tensor_core`), or for very few rows with dp4a (:mod:`.few_rows`).

Members (q, k and v, say) take the same rows and stand side by side: each block of columns is of
one member, which decides, for all threads alike, from where weights come and what epilogue follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx

from schedules.apply import gemm_spec
from schedules.gemm import GemmSpec
from schedules.records import Schedules
from schedules.spaces.gpu_linear import gpu_linear_task, gpu_linear_tile

from .few_rows import few_rows, takes_few_rows
from .member import Member
from .tail import Tail
from .tensor_core import TensorCoreLinears
from .tile import CudaTile
from .warpgroup import WarpgroupLinears

__all__ = ["linears", "packed_linear"]

_OPS = {"acc": "linear", "requant": "linear_requant", "requant_add": "linear_requant_add"}


def packed_linear(
    params: Sequence[Any], spec: GemmSpec, attrs: Mapping[str, Any], tile: CudaTile | None = None,
    schedules: Schedules | None = None,
) -> tirx.PrimFunc:  # fmt: skip
    """Build the kernel of a packed weight matmul.

    Parameters
    ----------
    params
        The PrimFunc's buffers: x, weights, bias, [mult, shift], [residual], [table of rows], out;
        weights for ``mma8`` or ``mma16``, bias, mult and shift padded to groups of 32 columns.
    spec
        What to compute.
    attrs
        Attributes of the new PrimFunc.
    tile
        How it is cut; None: as the records say, else by the default rule, by which a matmul of up
        to four rows takes no tensor cores.
    schedules
        Records of tuning, and the GPU whose shared memory the default rule looks at; None for that
        of the current target, if there is one.
    """
    return _build([Member(params, spec)], params, attrs, tile, schedules)


def linears(
    funcs: Sequence[tirx.PrimFunc], tails: Sequence[tirx.PrimFunc | None],
    tile: CudaTile | None = None, schedules: Schedules | None = None,
) -> tirx.PrimFunc:
    """Build one kernel of several weight matmuls of the same rows.

    Parameters
    ----------
    funcs
        Unscheduled PrimFuncs of packed weight matmuls without residual; the first parameter and,
        if there is one, the table of rows are the same tensors.
    tails
        For each of them an unscheduled elementwise PrimFunc, whose first parameter is its result
        and the others small tensors, or None.
    tile, schedules
        As of :func:`packed_linear`.

    Returns
    -------
    tirx.PrimFunc
        Parameters: the first member's and its tail's, then the other members' without x and table
        and their tails', then the results in order.
    """
    inputs: list[Any] = []
    outputs: list[Any] = []
    members: list[Member] = []

    def fresh(buffer: Any, name: str) -> Any:
        shape = [int(extent) for extent in buffer.shape]
        return tirx.decl_buffer(shape, str(buffer.dtype), name)

    for index, (func, tail) in enumerate(zip(funcs, tails, strict=True)):
        spec = gemm_spec(func)
        if spec is None or spec.epilogue.kind == "requant_add":
            raise ValueError("a member is a packed weight matmul without a residual")
        own = [fresh(buffer, f"{buffer.name}_{index}") for buffer in func.params]
        if members:
            own[0] = members[0].params[0]
            if spec.gather:
                own[-2] = members[0].params[-2]
        inputs += own[:-1] if not members else own[1 : -2 if spec.gather else -1]
        if tail is None:
            members.append(Member(own, spec))
            outputs.append(own[-1])
            continue
        buffers = {buffer: fresh(buffer, f"{buffer.name}_{index}_tail")
                   for buffer in tail.params[1:]}
        inputs += list(buffers.values())[:-1]
        outputs.append(buffers[tail.params[-1]])
        interval = spec.epilogue.qmin, spec.epilogue.qmax
        members.append(Member(own, spec, Tail(tail, buffers, interval), outputs[-1]))
    return _build(members, [*inputs, *outputs], {"tirx.noalias": True}, tile, schedules)


def _build(
    members: Sequence[Member], params: Sequence[Any], attrs: Mapping[str, Any],
    tile: CudaTile | None, schedules: Schedules | None,
) -> tirx.PrimFunc:
    if tile is None and takes_few_rows(members):
        return few_rows(members, params, attrs)
    tile = tile or _tile(members, schedules)
    kernel = WarpgroupLinears if tile.wgmma else TensorCoreLinears
    return kernel(members, tile).build(params, attrs)


def _operator(func: tirx.PrimFunc) -> str:
    return str(func.attrs.get("vitq.op", "map")).removeprefix("vitq.")


def _tile(members: Sequence[Member], schedules: Schedules | None) -> CudaTile:
    """Return how a kernel is cut where the caller does not say."""
    first = members[0]
    tails = {_operator(member.tail.func) for member in members if member.tail is not None}
    op = "+".join([_OPS[first.spec.epilogue.kind], *sorted(tails)])
    task = gpu_linear_task(
        op, first.rows, [member.columns for member in members], int(first.weights.shape[1]) * 16,
        str(first.x.dtype), str(members[-1].last.dtype), first.unit, first.spec.gather)
    if schedules is not None:
        point = schedules.point(task)
        return CudaTile(**point) if point else gpu_linear_tile(task, schedules.isa.name)
    target = tvm.target.Target.current(allow_none=True)
    arch = target.attrs.get("arch", "") if target is not None else ""
    return gpu_linear_tile(task, str(arch))
