"""Kernels of a GPU alone: what one launch computes, as a module that builds like the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax

from .group_kernels import Groups, substitute

__all__ = ["kernel_slices"]


def kernel_slices(mod: tvm.IRModule, name: str) -> Iterator[tuple[tvm.IRModule, list[relax.Var]]]:
    """Yield every weight matmul, group of them and attention of a legalised function.

    Parameters
    ----------
    mod
        As :class:`~relay_passes.group_kernels.GroupKernels` takes it.
    name
        The function.

    Yields
    ------
    IRModule, list of Var
        A module whose function ``main`` has the kernel's activations as parameters, in the order of
        the kernel's own, and returns its results; the variables of the function that these
        parameters stand for.
    """
    found = Groups(mod, mod[name])
    grouped = {part.var for group in found.groups for part in group.parts if part is not None}
    for group in found.groups:
        members = [part.var for part in group.parts if part is not None]
        yield _slice(mod, found, members, [result.var for result in group.results])
    for kernel in found.kernels.values():
        if kernel.linear and kernel.var not in grouped:
            yield _slice(mod, found, [kernel.var], [kernel.var])


def _slice(
    mod: tvm.IRModule, found: Groups, members: list[relax.Var], results: list[relax.Var]
) -> tuple[tvm.IRModule, list[relax.Var]]:
    inside = set(members)
    bindings = {binding.var: binding for binding in found.bindings}

    def own(var: relax.Var) -> bool:
        return var in inside or (var in found.views and found.source(var) in inside)

    taken = [binding for binding in found.bindings if own(binding.var)]
    params: dict[relax.Var, relax.Var] = {}
    for var in members:
        for expr in _variables(bindings[var].value):
            if not own(expr) and expr not in params:
                params[expr] = relax.Var(f"x{len(params)}", expr.ty)
    values: dict[relax.Var, relax.Expr] = dict(params)
    functions: dict[tvm.ir.GlobalVar, Any] = {}
    bb = relax.BlockBuilder()
    with bb.function("main", list(params.values())):
        with bb.dataflow():
            for binding in taken:
                call = binding.value
                if call.op.name == "relax.call_tir":
                    functions[call.args[0]] = mod[call.args[0]]
                values[binding.var] = bb.emit(substitute(call, values), binding.var.name)
            made = [values[var] for var in results]
            out = bb.emit_output(relax.Tuple(made) if len(made) > 1 else made[0])
        bb.emit_func_output(out)
    alone = tvm.IRModule(functions)
    alone["main"] = bb.get()["main"]
    return alone, list(params)


def _variables(expr: relax.Expr) -> Iterator[relax.Var]:
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from _variables(arg)
    elif isinstance(expr, relax.Tuple):
        for part in expr.fields:
            yield from _variables(part)
