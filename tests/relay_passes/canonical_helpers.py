"""Writes small Relax functions for Before/Expected tests of the canonicalisation rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from relay_passes.canonicalize.driver import simplify
from relay_passes.canonicalize.from_relax import from_relax
from relay_passes.canonicalize.to_relax import to_relax

__all__ = ["Emit", "array", "assert_canonical_form", "const", "function", "run", "simplified"]

Emit = Callable[[relax.Expr], relax.Var]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 values, the same for the same shape and seed."""
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype("float32")


def const(value: np.ndarray | float | int, dtype: str = "float32") -> relax.Expr:
    """Relax constant of the given type."""
    return relax.const(np.asarray(value, dtype).copy(order="C"), dtype)


def function(
    shape: tuple[int, ...], body: Callable[[Emit, relax.Var], relax.Expr], dtype: str = "float32"
) -> tvm.IRModule:
    """Make a module whose ``main(x)`` is ``body(emit, x)`` in one dataflow block."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x))
        builder.emit_func_output(out)
    return relax.transform.CanonicalizeBindings()(builder.get())


def simplified(mod: tvm.IRModule) -> tvm.IRModule:
    """Apply all rules, without the checks that only whole models pass."""
    graph = from_relax(mod)
    simplify(graph)
    return to_relax(graph)


def assert_canonical_form(before: tvm.IRModule, expected: tvm.IRModule) -> None:
    """Check that the rules turn ``before`` into ``expected`` and leave ``expected`` as it is."""
    tvm.ir.assert_structural_equal(simplified(before), expected)
    tvm.ir.assert_structural_equal(simplified(expected), expected)


def run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    """Execute a module with TVM."""
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()
