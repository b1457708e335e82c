"""The integer-only proof: what it reports, and every way in which a float may hide."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, te

from relay_passes.check_integer_only import (
    check_integer_only,
    check_integer_only_tir,
    check_primfuncs,
    float_nodes,
)
from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.linear import linear
from relay_passes.dialect.requantize import requantize
from relay_passes.errors import VitqError
from relay_passes.split_boundary import SplitBoundary
from tests.helpers.qdq import build

W = np.random.default_rng(0).integers(-127, 128, (6, 4)).astype("int8")


def network(bb, x, middle=lambda bb, q: q):
    x = bb.emit(relax.op.permute_dims(x, [1, 0]), "moved")
    q = bb.emit(quantize(x, 0.1, 3, -128, 127), "q")
    q = middle(bb, q)
    acc = bb.emit(linear(q, W, np.zeros(4, "int32")), "acc")
    return bb.emit(dequantize(bb.emit(requantize(acc, 0.01, 0, 0, -127, 127)), 0.2), "logits")


def changed(middle) -> tvm.IRModule:
    return build((6, 2), lambda bb, x: network(bb, x, middle))


def test_report():
    report = check_integer_only(build((6, 2), network))
    assert report["integer_only"] is True
    assert report["boundary"] == ["q: vitq.quantize", "logits: vitq.dequantize"]
    assert report["dtypes"] == {"float32": 3, "int32": 1, "int8": 2}
    assert (report["integer_tensors"], report["float_tensors"]) == (3, 3)


@pytest.mark.parametrize("split", [False, True])
def test_legalised_report(split):
    mod = build((6, 2), network)
    mod = relax.transform.LegalizeOps()(SplitBoundary()(mod) if split else mod)
    report = check_primfuncs(mod)
    assert report["boundary_primfuncs"] == ["vitq_dequantize", "vitq_quantize"]
    assert (report["primfuncs"], report["integer_primfuncs"]) == (5, 2)
    tvm.ir.assert_structural_equal(check_integer_only_tir()(mod), mod)


def test_uint8_input_and_codes_have_no_float_before_the_logits():
    def body(bb, x):
        acc = bb.emit(linear(x, W, np.zeros(4, "int32")))
        return bb.emit(dequantize(acc, 0.2))

    report = check_integer_only(build((2, 6), body, "uint8"))
    assert report["float_tensors"] == 1


def island(bb, q):
    return bb.emit(quantize(bb.emit(dequantize(q, 0.1), "island"), 0.1, 0, -128, 127), "back")


def float_operator(bb, q):
    bb.emit(relax.op.nn.gelu(bb.emit(dequantize(q, 0.1))), "hidden")
    return q


def float_cast(bb, q):
    bb.emit(relax.op.astype(q, "float32"), "cast")
    return q


def float_constant(bb, q):
    bb.emit(relax.op.broadcast_to(relax.const(np.float32(1)), (2,)), "biased")
    return q


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (island, r"^back: vitq\.quantize takes a tensor that is not the network's input$"),
        (float_operator, r"^hidden: relax\.nn\.gelu takes a float tensor"),
        (float_cast, r"^cast: makes a float32 tensor inside the integer part"),
        (float_constant, r"^biased: has a float constant of shape \[\]$"),
    ],
)
def test_refuses(middle, message):
    with pytest.raises(VitqError, match=message) as caught:
        check_integer_only(changed(middle))
    assert "\n" not in str(caught.value)


def test_float_operator_on_the_input_is_refused():
    def body(bb, x):
        x = bb.emit(relax.op.multiply(x, x), "square")
        return network(bb, x)

    with pytest.raises(VitqError, match=r"^square: relax\.multiply takes a float tensor"):
        check_integer_only(build((6, 2), body))


def through_float(x: te.Tensor) -> te.Tensor:
    """An integer kernel that computes in float on the way."""
    return te.compute(
        x.shape, lambda *i: (x(*i).astype("float32") * 0.5).astype("int8"), name="out"
    )


@pytest.mark.parametrize("tag", [None, "vitq.requantize"])
def test_float_inside_a_kernel_is_refused(tag):
    def middle(bb, q):
        attrs = {"vitq.op": tag} if tag else None
        return bb.emit_te(through_float, q, primfunc_name_hint="sneaky", primfunc_attrs=attrs)

    mod = relax.transform.LegalizeOps()(changed(middle))
    assert list(float_nodes(mod["sneaky"]))
    with pytest.raises(VitqError, match=r"sneaky \(.*\): has (Cast|Mul|FloatImm)"):
        check_primfuncs(mod)


def test_no_entry():
    with pytest.raises(VitqError, match="no function main"):
        check_integer_only(tvm.IRModule({}))
