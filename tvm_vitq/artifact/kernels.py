"""What an artefact says of its kernels: operator, shape, and the dot sequences and why these.

A matmul's plan stands in its PrimFunc only until it is scheduled, so :class:`MatmulPlans` watches
for that moment; the kernels themselves are described when all passes have run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx

from schedules.activation_matmul import DOT
from schedules.dot import dot_named

__all__ = ["MatmulPlans", "describe_kernels"]

_LINEARS = ("vitq.linear", "vitq.packed_linear")
_MATMULS = (*_LINEARS, "vitq.matmul")


@tvm.instrument.pass_instrument
class MatmulPlans:
    """A pass instrument that keeps every PrimFunc's plan: ``plans`` maps symbols to GemmSpecs."""

    def __init__(self) -> None:
        self.plans: dict[str, Any] = {}

    def run_before_pass(self, mod: tvm.IRModule, info: Any) -> None:
        """Read the plans just before the kernels are made."""
        if info.name != "vitq.ApplySchedules":
            return
        from schedules.apply import gemm_spec

        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                spec = gemm_spec(func)
                if spec is not None:
                    self.plans[gvar.name_hint] = spec


def _sequences(func: tirx.PrimFunc, plan: Any) -> list[dict[str, Any]]:
    """Return the sequences of a kernel, with how many columns each has, widest first."""
    dtypes = [str(buffer.dtype) for buffer in func.params[:2]]
    plain = "16-bit codes" if "int16" in dtypes else "8-bit codes, exact for any"
    chains = tuple(getattr(plan, "chains", ()) or ())
    if not chains:
        planned = plan.dot if plan is not None and plan.dot else str(func.attrs.get(DOT, ""))
        return [{"dot": planned, "why": plain}] if planned else []
    columns, blocks = int(func.params[-1].shape[-1]), Counter(chains)
    found = []
    kv = dot_named(plan.dot).kv
    for chain, count in blocks.most_common():
        proved = f"sums of {kv * chain} products proved to fit int16"
        found.append({
            "dot": plan.dot if chain else plan.fallback,
            "chain": chain or 1,
            "columns": round(columns * count / len(chains)),
            "why": proved if chain else "sums of 4 products may not fit int16",
        })  # fmt: skip
    return found


def describe_kernels(mod: tvm.IRModule, plans: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Describe the kernels of a VM-ready module.

    Parameters
    ----------
    mod
        With scheduled PrimFuncs.
    plans
        Those that :class:`MatmulPlans` kept.

    Returns
    -------
    dict
        Symbol -> ``op``; for matmuls also ``shape`` (``[M, N, K]``, with the batch of an activation
        matmul in front), ``macs`` and ``dots``: for each sequence used ``dot``, ``why`` and, where
        columns differ, ``columns`` and ``chain`` (groups of K added in int16).
    """
    kernels = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        operator = str(func.attrs["vitq.op"]) if "vitq.op" in func.attrs else ""
        # Layout kernels have no tag; their symbol is their operator and a number.
        operator = operator or gvar.name_hint.rstrip("0123456789_")
        entry: dict[str, Any] = {"op": operator.replace("packed_", "")}
        parts = operator.split("+")  # of a kernel that does what several operators did
        attention = any(part.startswith("vitq.matmul") for part in parts[1:])
        if operator.startswith(_MATMULS) and not attention:
            # Linears of the same input, side by side: each has its own output.
            results = func.params[-max(1, sum(p.startswith(_LINEARS) for p in parts)) :]
            *outer, _ = (int(extent) for extent in func.params[-1].shape)
            columns = sum(int(result.shape[-1]) for result in results)
            depth = int(func.params[0].shape[-1])
            if getattr(plans.get(gvar.name_hint), "gather", "") and len(func.params[-2].shape) == 2:
                depth *= int(func.params[-2].shape[1])
            weights = not operator.startswith("vitq.matmul")
            stored = getattr(plans.get(gvar.name_hint), "out_axes", ())
            rows = 1 if weights else outer.pop(stored.index(len(outer) - 1) if stored else -1)
            batch = 1
            for extent in outer:
                batch *= extent
            entry |= {
                "shape": [batch, columns, depth] if weights else [batch, rows, columns, depth],
                "macs": batch * rows * columns * depth,
                "dots": _sequences(func, plans.get(gvar.name_hint)),
            }
        kernels[gvar.name_hint] = entry
    return kernels
