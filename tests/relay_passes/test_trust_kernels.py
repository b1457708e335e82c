"""Kernels that see the module's own tensors only lose the checks of their arguments."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, te

from relay_passes.trust_kernels import TrustKernels
from schedules.calling import PIPELINE, TRUSTED


def negated(x):
    return te.compute(x.shape, lambda *i: 0 - x(*i), name="negated")


def doubled(x):
    return te.compute(x.shape, lambda *i: x(*i) * 2, name="doubled")


def module(view: bool, again: bool = False) -> tvm.IRModule:
    """``doubled(negated(view(x)))``, and ``doubled`` of the input too if ``again``."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 6), "int32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            h = bb.emit(relax.op.reshape(x, (3, 4))) if view else x
            h = bb.emit_te(doubled, bb.emit_te(negated, h))
            if again:
                other = relax.op.reshape(x, (3, 4))
                h = bb.emit(relax.op.add(h, bb.emit_te(doubled, bb.emit(other))))
            out = bb.emit_output(h)
        bb.emit_func_output(out)
    return bb.get()


def marked(mod: tvm.IRModule) -> dict[str, bool]:
    return {gvar.name_hint: bool(func.attrs.get(TRUSTED, False))
            for gvar, func in TrustKernels()(mod).functions_items()
            if isinstance(func, tvm.tirx.PrimFunc)}


def test_before_and_expected():
    before = module(view=False)
    expected = before.clone()
    gvar = before.get_global_var("doubled")
    expected.update_func(gvar, before[gvar].with_attr(TRUSTED, True))
    tvm.ir.assert_structural_equal(TrustKernels()(before), expected)


def test_a_view_of_the_input_is_from_outside():
    assert marked(module(view=True)) == {"negated": False, "doubled": True}


def test_one_call_from_outside_is_enough():
    mod = module(view=True, again=True)
    assert marked(mod) == {"negated": False, "doubled": False}


def built(trusted: bool) -> tvm.runtime.Module:
    mod = module(view=False)
    mod = TrustKernels()(mod) if trusted else mod
    mod = tvm.transform.Sequential([
        relax.transform.LegalizeOps(), relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite(),
        relax.transform.LowerAllocTensor(), relax.transform.LowerRuntimeBuiltin(),
        relax.transform.VMShapeLower(), relax.transform.AttachGlobalSymbol(),
    ])(mod)
    return relax.build(mod, "llvm", relax_pipeline=None, tir_pipeline=PIPELINE)


def test_input_is_still_checked_and_the_rest_is_short():
    machine = relax.VirtualMachine(built(trusted=True), tvm.cpu())
    x = np.arange(12, dtype=np.int32).reshape(2, 6)
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    assert np.array_equal(got, -2 * x)
    # A transposed tensor has the right shape and dtype, but other strides.
    memory = np.empty(12 + 16, dtype=np.int32)
    first = -memory.ctypes.data % 64 // 4
    view = memory[first : first + 12].reshape(6, 2).T
    strided = tvm_ffi.from_dlpack(view, require_contiguous=False)
    assert tuple(strided.shape) == (2, 6)
    with pytest.raises(Exception, match="stride"):
        machine["main"](strided)
    few, many = (
        built(trusted).mod.imports[0].inspect_source("ll").count("\n") for trusted in (True, False)
    )
    assert 0 < few < 0.75 * many
