"""Weight matmuls with packed weights: what ``relay_passes.pack`` turns ``vitq.linear*`` into.

The same arithmetic as ``vitq.linear*`` (see there), over weights laid out for one instruction set:
``w`` is int8 [N/nt, K/kv, nt, kv], zeros where padded, and ``bias``, ``mult``, ``shift`` are padded
to N/nt * nt. Attributes besides those of the unpacked operator:

=========  ======================================================================================
columns    N without padding
dot        the dot sequence that the layout is made for
lanes      its 32-bit lanes
offset     added to every activation code (128 where int8 codes are taken as unsigned); ``bias``
           has the matching ``-offset * sum_k w[k, n]``
chains     groups of K that each column block may add in int16, 0 for blocks that take ``fallback``
fallback   the dot sequence of such blocks
narrow     whether requantisation fits the fast form, shifting the accumulator left by ``lift``
fold_zero  whether the zero point then fits the rounding constants
gather     "x", "residual" or "both", if a last argument ``rows``, int32 [M], says of which row of
           ``x``, of ``res`` or of both, then matrices, each row of the result is made; int32 [M, P]
           with "x": of which P rows, side by side
tile       a record's tile as JSON; without it the default rules hold
=========  ======================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tvm import relax, te

from schedules.gemm import Epilogue, Tile
from schedules.matmul import packed_linear_te

from .checking import ACTIVATION_DTYPES, dtype_interval, fail, output_interval, tensor_of
from .registry import Claim, Interval, register

__all__: list[str] = []


def _shape(node: relax.Call) -> list[int]:
    x, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    w, _ = tensor_of(node, 1, ["int8"], "w")
    bias, _ = tensor_of(node, 2, ["int32"], "bias")
    columns = int(node.attrs["columns"])
    blocks, groups, nt, kv = w
    if x[-1] * _pieces(node) > groups * kv or bias != [blocks * nt] or columns > blocks * nt:
        raise fail(node, f"x {x}, packed w {w}, bias {bias} do not fit {columns} columns")
    if not _gather(node.attrs):
        return [*x[:-1], columns]
    rows, _ = tensor_of(node, len(node.args) - 1, ["int32"], "rows")
    if len(x) != 2 or len(rows) not in (1, 2):
        raise fail(node, f"x {x} and rows {rows} are no matrix and no table of its rows")
    return [rows[0], columns]


def _pieces(node: relax.Call) -> int:
    """Return how many rows of ``x`` make one row of the operand."""
    if _gather(node.attrs) not in ("x", "both"):
        return 1
    rows, _ = tensor_of(node, len(node.args) - 1, ["int32"], "rows")
    return rows[1] if len(rows) == 2 else 1


def _gather(attrs: Any) -> str:
    return str(attrs["gather"]) if "gather" in attrs else ""


def _infer(node: relax.Call) -> relax.TensorType:
    shape = _shape(node)
    if node.op.name == "vitq.packed_linear":
        return relax.TensorType(shape, "int32")
    output_interval(node)
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _epilogue(attrs: Any, inputs: int) -> Epilogue:
    if inputs == 3:
        return Epilogue()
    return Epilogue(
        kind="requant_add" if inputs == 6 else "requant",
        zero_point=int(attrs["zero_point"]),
        qmin=int(attrs["qmin"]),
        qmax=int(attrs["qmax"]),
        out_dtype=str(attrs["out_dtype"]),
        res_mult=int(attrs["res_mult"]) if inputs == 6 else 0,
        res_shift=int(attrs["res_shift"]) if inputs == 6 else 0,
        narrow=bool(attrs["narrow"]),
        lift=int(attrs["lift"]),
        fold_zero=bool(attrs["fold_zero"]),
    )


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x, w, bias, *rest = tensors
    gather = _gather(attrs)
    rows = rest.pop() if gather else None
    mult, shift, residual = [*rest, None, None, None][:3]
    return packed_linear_te(
        x,
        w,
        bias,
        columns=int(attrs["columns"]),
        epilogue=_epilogue(attrs, 3 + len(rest)),
        dot=str(attrs["dot"]),
        lanes=int(attrs["lanes"]),
        offset=int(attrs["offset"]),
        chains=[int(chain) for chain in attrs["chains"]],
        fallback=str(attrs["fallback"]),
        mult=mult,
        shift=shift,
        residual=residual,
        rows=rows,
        gather=gather,
        tile=Tile(**json.loads(attrs["tile"])) if "tile" in attrs else None,
    )


def _bounds(node: relax.Call, _args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    """Ranges are proved before packing; only the codes are known here."""
    if node.op.name == "vitq.packed_linear":
        return dtype_interval("int32"), []
    return output_interval(node), []


_ARGUMENTS = ["x", "w", "bias", "mult", "shift", "res"]
for _suffix, _count in (("", 3), ("_requant", 5), ("_requant_add", 6)):
    register(
        f"packed_linear{_suffix}",
        _ARGUMENTS[:_count],
        f"linear{_suffix} with weights packed for one instruction set.",
        infer=_infer,
        compute=_compute,
        bounds=_bounds,
    )
