"""The float nonlinearities of the quantize/dequantize form: inference, execution, round trip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from relay_passes.dialect.float_ops import METHODS, float_gelu, float_softmax
from tvm_vitq.reference.float_interpreter import run_float


def _module(op, method: str) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 7), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(op(x, method))
        bb.emit_func_output(out)
    return bb.get()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("op", [float_softmax, float_gelu])
def test_runs_as_the_exact_function_and_survives_json(op, method: str) -> None:
    mod = _module(op, method)
    again = tvm.ir.load_json(tvm.ir.save_json(mod))
    tvm.ir.assert_structural_equal(mod, again)
    x = np.random.default_rng(0).standard_normal((1, 3, 7)).astype("float32") * 3
    vm = relax.VirtualMachine(tvm.compile(again, "llvm"), tvm.cpu())
    compiled = vm["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(run_float(mod, torch.from_numpy(x)).numpy(), compiled, atol=1e-6)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(Exception, match="unknown"):
        _module(float_gelu, "magic")
