"""Explicit vectors for innermost loops of any length.

``for j in range(n)`` becomes ``for o in range(ceil(n / w)): for lane in vectorized(w)`` with
``j = min(o * w, n - w) + lane``: the last vector overlaps the one before it, so there is no scalar
remainder. That computes some elements twice, which is harmless where an iteration only writes its
own element; so only stages without a reduction, whose loop is their last axis, are rewritten.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.tirx.stmt import ForKind

__all__ = ["vectorize_overlapped"]


def vectorize_overlapped(func: tirx.PrimFunc, width: int) -> tirx.PrimFunc:
    """Vectorise the innermost loops of all elementwise stages of ``func``."""
    return func.with_body(_rewrite(func.body, width))


def _rewrite(statement: Any, width: int) -> Any:
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_rewrite(part, width) for part in statement.seq])
    if isinstance(statement, tirx.For):
        if _is_elementwise(statement):
            return _vectorized(statement, width)
        return tirx.For(statement.loop_var, statement.min, statement.extent, statement.kind,
                        _rewrite(statement.body, width), statement.thread_binding,
                        statement.annotations)
    if isinstance(statement, s_tir.SBlockRealize):
        block = statement.block
        if block.iter_vars:
            return statement
        inner = s_tir.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint,
            _rewrite(block.body, width), block.init, block.alloc_buffers, block.match_buffers,
            block.annotations)
        return s_tir.SBlockRealize(statement.iter_values, statement.predicate, inner)
    return statement


def _is_elementwise(loop: tirx.For) -> bool:
    """Whether the loop is the last axis of one block that stores an element an iteration."""
    realize = loop.body
    if int(loop.kind) != ForKind.SERIAL or not isinstance(realize, s_tir.SBlockRealize):
        return False
    block = realize.block
    if not block.iter_vars or not isinstance(block.body, tirx.BufferStore):
        return False
    last = realize.iter_values[-1]
    return (
        block.init is None
        and all(int(v.iter_type) == 0 for v in block.iter_vars)
        and last.same_as(loop.loop_var)
        and block.body.indices[-1].same_as(block.iter_vars[-1].var)
    )


def _vectorized(loop: tirx.For, width: int) -> Any:
    extent = int(loop.extent)
    while width > extent:
        width //= 2
    if width < 2:
        return loop
    realize = loop.body
    dtype = str(loop.loop_var.ty.dtype)
    whole = tirx.Var(f"{loop.loop_var.name}_v", dtype)
    lane = tirx.Var(f"{loop.loop_var.name}_lane", dtype)
    first = whole * width
    if extent % width:
        first = tirx.min(first, tirx.const(extent - width, dtype))
    values = [*realize.iter_values[:-1], first + lane]
    body = s_tir.SBlockRealize(values, realize.predicate, realize.block)
    zero = tirx.const(0, dtype)
    lanes = tirx.For(lane, zero, tirx.const(width, dtype), ForKind.VECTORIZED, body)
    count = tirx.const(-(-extent // width), dtype)
    return tirx.For(whole, zero, count, ForKind.SERIAL, lanes)
