"""The whole pipeline on one layer: what is proved is what runs."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from relay_passes.errors import VitqError
from relay_passes.pipeline import build_passes, lower, vitq_pipeline
from relay_passes.split_boundary import SplitBoundary
from schedules.isa import isa_for, resolve_target
from tests.helpers.qdq import build, fake_quant, weight
from tvm_vitq.reference.interpreter import run_integer

RNG = np.random.default_rng(3)


def one_layer(limit: int) -> tvm.IRModule:
    codes = RNG.integers(-limit, limit + 1, (64, 32))

    def body(bb, x):
        y = relax.op.matmul(fake_quant(bb, x, 0.1), weight(bb, codes, np.full(32, 0.01)))
        return fake_quant(bb, bb.emit(y), 0.01, 0, "int16")

    return build((4, 64), body)


@pytest.mark.parametrize("limit", [30, 127])
@pytest.mark.parametrize("name", ["x86-64-v3", "native"])
def test_main_codes_takes_every_code_of_its_dtype(name, limit):
    # -128 is outside the quantizer's range; kernels chosen by proved ranges must stand it.
    target = resolve_target(name, threads=1)
    integer = lower(one_layer(limit))
    with target:
        built = tvm.transform.Sequential(build_passes(isa_for(target)))(integer)
    vm = relax.VirtualMachine(tvm.compile(built, target, relax_pipeline=None), tvm.cpu())
    codes = RNG.choice(np.array([-128, -127, 127], "int8"), (4, 64))
    split = tvm.transform.Sequential([SplitBoundary()])(integer)
    expected = run_integer(split, codes, function="main_codes")
    np.testing.assert_array_equal(vm["main_codes"](tvm.runtime.tensor(codes)).numpy(), expected)


def test_two_inputs_are_refused():
    bb = relax.BlockBuilder()
    params = [relax.Var(n, relax.TensorType((2, 2), "float32")) for n in ("a", "b")]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.op.add(*params))
        bb.emit_func_output(out)
    with pytest.raises(VitqError, match="takes 2 inputs"):
        vitq_pipeline(resolve_target("native"))(bb.get())
