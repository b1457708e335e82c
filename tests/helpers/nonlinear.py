"""Rows of codes that try the ends of a range, and looks into the TIR of one operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from relay_passes.check_integer_only import float_nodes
from relay_passes.dialect.registry import SPECS, Claim, Interval

__all__ = ["DIVISIONS", "claims_of", "hard_rows", "operator_call", "prim_func_facts"]

DIVISIONS = (tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)


def hard_rows(length: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Return [16, length] codes: equal, one-hot, two-valued, ramps, noise of several widths."""
    info = np.iinfo(dtype)
    lo, hi = int(info.min), int(info.max)
    rng = np.random.default_rng(seed)
    rows = [np.full(length, v) for v in (lo, hi, 0)]
    for low, high in ((lo, hi), (hi, lo), (0, 1), (hi - 1, hi)):
        row = np.full(length, low)
        row[rng.integers(length)] = high
        rows.append(row)
    rows.append(rng.choice([lo, hi], length))
    rows.append(rng.choice([-1, 0, 1], length) + max(lo, 0) + 1)
    rows.append(np.linspace(lo, hi, length).astype(np.int64))
    rows.append(rng.integers(lo, hi + 1, length))
    middle = (lo + hi + 1) // 2
    for width in (1, 4, 40, 400, 8000):
        noise = np.round(rng.standard_normal(length) * width) + middle
        rows.append(np.clip(noise, lo, hi).astype(np.int64))
    return np.stack(rows).astype(dtype)


def operator_call(mod: tvm.IRModule) -> relax.Call:
    """Return the operator call of a one-operator module."""
    return mod["main"].body.blocks[0].bindings[0].value


def claims_of(mod: tvm.IRModule, *intervals: Interval) -> tuple[Interval, list[Claim]]:
    """Return what the range proof says of a one-operator module."""
    node = operator_call(mod)
    return SPECS[node.op.name].bounds(node, list(intervals))


def prim_func_facts(mod: tvm.IRModule) -> tuple[dict[str, int], int]:
    """Return (divisions by block, number of float nodes) of the legalised operator."""
    divisions: dict[str, int] = {}
    floats = 0
    for func in relax.transform.LegalizeOps()(mod).functions.values():
        if not isinstance(func, tirx.PrimFunc):
            continue
        floats += sum(1 for _ in float_nodes(func))
        for block in _found(func, s_tir.SBlock):
            if block.name_hint != "root":
                count = len(_found(block.body, DIVISIONS))
                divisions.update({block.name_hint: count} if count else {})
    return divisions, floats


def _found(tree: Any, kinds: Any) -> list[Any]:
    nodes: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, kinds):
            nodes.append(node)

    tvm_ffi.structural_walk(tree, (object, visit))
    return nodes
