"""The float interpreter against TVM's own execution and against itself for other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax import op as R

from relay_passes.errors import VitqError
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.reference.float_interpreter import Program, run_float


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_equals_tvm(pool: str) -> None:
    mod = tiny_vit_module(dim=16, depth=1, pool=pool)
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype("float32")
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    expected = vm["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(run_float(mod, torch.from_numpy(x)).numpy(), expected, atol=1e-5)


def test_batch_of_the_module_does_not_matter() -> None:
    x = torch.randn(5, 3, 16, 16)
    one, three = (run_float(tiny_vit_module(batch=b), x) for b in (1, 3))
    each = torch.cat([run_float(tiny_vit_module(), image[None]) for image in x])
    torch.testing.assert_close(one, each, atol=1e-5, rtol=1e-5)
    assert three.shape == (5, 10)


def test_observer_sees_every_binding() -> None:
    mod = tiny_vit_module()
    seen = {}
    run_float(mod, torch.randn(4, 3, 16, 16), lambda var, t: seen.__setitem__(var.name, t.shape))
    assert len(seen) == len(Program(mod).steps) + 1
    assert all(shape[0] == 4 for shape in seen.values())


def test_quantize_rounds_half_up_and_clips() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 6), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            scale, zero = relax.const(np.float32(0.5)), relax.const(np.int8(0))
            codes = bb.emit(R.quantize(x, scale, zero, axis=-1, out_dtype="int8"))
            out = bb.emit_output(R.dequantize(codes, scale, zero, axis=-1))
        bb.emit_func_output(out)
    values = torch.tensor([[0.25, -0.25, 0.24, -0.26, 100.0, -100.0]])
    expected = torch.tensor([[0.5, 0.0, 0.0, -0.5, 63.5, -63.5]])
    torch.testing.assert_close(run_float(bb.get(), values), expected)


def test_wrong_shape_is_one_line() -> None:
    with pytest.raises(VitqError, match="expects"):
        run_float(tiny_vit_module(), torch.randn(1, 3, 8, 8))
