"""One-operator modules of the integer dialect: build, compile, run, compare with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tvm
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tvm import relax

from relay_passes.dialect import registry
from relay_passes.pack import PackWeights
from schedules.apply import ApplySchedules
from schedules.isa import isa_for, resolve_target
from tvm_vitq.reference.interpreter import Interpreter

__all__ = ["compare", "compiled", "extreme", "module"]

Body = Callable[..., relax.Expr]


def module(arrays: Sequence[np.ndarray], body: Body) -> tvm.IRModule:
    """Build ``main(*arrays)`` from ``body(*vars) -> expr``; every intermediate call is bound."""
    bb = relax.BlockBuilder()
    types = [relax.TensorType(a.shape, str(a.dtype)) for a in arrays]
    params = [relax.Var(f"p{i}", ty) for i, ty in enumerate(types)]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(bb.emit(body(*params)))
        bb.emit_func_output(out)
    return bb.get()


def compiled(mod: tvm.IRModule, native: bool = False) -> Callable[..., np.ndarray]:
    """Compile plainly, or (``native``) with packed weights and the schedules of this machine."""
    target = resolve_target("native", threads=1)
    if native:
        isa = isa_for(target)
        passes = [PackWeights(isa), relax.transform.LegalizeOps(), ApplySchedules(isa)]
        mod = tvm.transform.Sequential(passes)(mod)
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    return lambda *arrays: vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()


def compare(arrays: Sequence[np.ndarray], body: Body, native: bool = False) -> np.ndarray:
    """Assert that compiled code equals the reference bit for bit; return the result."""
    mod = module(arrays, body)
    expected = Interpreter(mod).evaluate(*arrays)
    actual = compiled(mod, native)(*arrays)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)
    return expected


def extreme(shape: Sequence[int], dtype: str, lo: int | None = None, hi: int | None = None):
    """Strategy of integer arrays that favour the ends of the range and the values around 0."""
    info = np.iinfo(dtype)
    lo, hi = int(info.min) if lo is None else lo, int(info.max) if hi is None else hi
    corners = sorted({v for v in (lo, lo + 1, -1, 0, 1, hi - 1, hi) if lo <= v <= hi})
    elements = st.sampled_from(corners) | st.integers(lo, hi)
    return hnp.arrays(dtype, tuple(shape), elements=elements, fill=st.sampled_from(corners))


assert registry
