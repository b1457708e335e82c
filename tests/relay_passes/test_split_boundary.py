"""The float boundary becomes a function boundary."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.linear import linear
from relay_passes.dialect.requantize import requantize
from relay_passes.errors import VitqError
from relay_passes.split_boundary import SplitBoundary
from tests.helpers.qdq import build

W = relax.const(np.arange(24, dtype="int8").reshape(6, 4))
B = relax.const(np.zeros(4, "int32"))


def integer(bb, q):
    return bb.emit(requantize(bb.emit(linear(q, W, B)), 1e-2, 0, 0, -127, 127, "int16"))


def test_main_keeps_the_boundary_only():
    def before(bb, x):
        x = bb.emit(relax.op.reshape(x, (2, 6)))
        return bb.emit(dequantize(integer(bb, bb.emit(quantize(x, 0.1, 0, -127, 127))), 0.5))

    after = SplitBoundary()(build((12,), before))
    expected = build((2, 6), integer, "int8")["main"]
    tvm.ir.assert_structural_equal(
        after["main_codes"].without_attr("global_symbol"), expected.without_attr("global_symbol")
    )
    names = [
        binding.value.op.name
        for block in after["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call) and isinstance(binding.value.op, tvm.ir.Op)
    ]
    assert names == ["relax.reshape", "vitq.quantize", "vitq.dequantize"]


def test_uint8_input_goes_straight_to_main_codes():
    def before(bb, x):
        return bb.emit(dequantize(integer(bb, x), 0.5))

    after = SplitBoundary()(build((2, 6), before, "uint8"))
    assert str(after["main_codes"].params[0].ty.dtype) == "uint8"
    assert str(after["main_codes"].ret_ty.dtype) == "int16"


def test_unquantized_output_is_refused():
    with pytest.raises(VitqError, match="dequantized logits"):
        SplitBoundary()(build((2, 6), integer, "int8"))
