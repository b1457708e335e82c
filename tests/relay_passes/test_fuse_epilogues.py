"""Fusion of requantisation and residual add into the matmul that feeds them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from relay_passes.dialect.add import add
from relay_passes.dialect.linear import linear
from relay_passes.dialect.matmul import matmul
from relay_passes.dialect.registry import call
from relay_passes.dialect.requantize import requantize
from relay_passes.fuse_epilogues import FuseEpilogues
from tests.helpers.qdq import build

INT32 = (-(2**31), 2**31 - 1)
RNG = np.random.default_rng(1)
W = relax.const(RNG.integers(-127, 128, (6, 6)).astype("int8"))
B = relax.const(RNG.integers(-999, 999, 6).astype("int32"))
RATIO = RNG.random(6) * 1e-3 + 1e-4
OUT = (0, -127, 127, "int8")
WIDE = (0, *INT32, "int32")


def named(**kw):
    return dict(zip(("zero_point", "qmin", "qmax", "out_dtype"), kw["out"], strict=True))


def rows(ratio, width):
    node = requantize(B, ratio, 0, *OUT)
    return [np.broadcast_to(a.value.numpy(), (width,)).copy() for a in node.args[1:]]


def check(before, expected, shape=(3, 6), dtype="int8"):
    after = FuseEpilogues()(build(shape, before, dtype))
    tvm.ir.assert_structural_equal(after["main"], build(shape, expected, dtype)["main"])


@pytest.mark.parametrize("ratio", [RATIO, 1e-3], ids=["per channel", "per tensor"])
def test_linear_requantize(ratio):
    def before(bb, x):
        acc = bb.emit(linear(x, W, B))
        return bb.emit(requantize(acc, ratio, 0, *OUT))

    def expected(bb, x):
        mult, shift = rows(ratio, 6)
        return bb.emit(
            call("linear_requant", x, W, B, relax.const(mult), relax.const(shift), **named(out=OUT))
        )

    check(before, expected)


@pytest.mark.parametrize("swapped", [False, True])
def test_residual_add(swapped):
    out = (0, -32767, 32767, "int16")

    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *out))
        y = bb.emit(requantize(bb.emit(linear(x, W, B)), RATIO, 0, *WIDE))
        if swapped:
            return bb.emit(add(r, y, 0.3, 1.0, 0, 0, *out))
        return bb.emit(add(y, r, 1.0, 0.3, 0, 0, *out))

    def expected(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *out))
        mult, shift = rows(RATIO, 6)
        node = add(r, r, 0.3, 1.0, 0, 0, *out)
        return bb.emit(
            call("linear_requant_add", x, W, B, relax.const(mult), relax.const(shift), r,
                 res_mult=node.attrs["a_mult"], res_shift=node.attrs["a_shift"], **named(out=out))
        )

    check(before, expected)


def test_matmul_requantize():
    def before(bb, x):
        return bb.emit(requantize(bb.emit(matmul(x, x, True)), 1e-3, 0, *OUT))

    def expected(bb, x):
        mult, shift = rows(1e-3, 1)
        return bb.emit(
            call("matmul_requant", x, x, transpose_b=True, mult=int(mult[0]), shift=int(shift[0]),
                 **named(out=OUT))
        )

    check(before, expected, (2, 3, 6))


@pytest.mark.parametrize("shared", [True, False])
def test_matmul_bias(shared):
    """A relative position bias, one for all windows; one that has fewer columns stays apart."""
    bias = relax.const(RNG.integers(-99, 99, (1, 3, 3 if shared else 1)).astype("int16"))

    def before(bb, x):
        scores = bb.emit(requantize(bb.emit(matmul(x, x, True)), 1e-3, 0, *WIDE))
        return bb.emit(add(scores, bias, 1.0, 0.7, 0, 0, *OUT))

    def expected(bb, x):
        mult, shift = (int(v.item()) for v in rows(1e-3, 1))
        if not shared:
            scores = bb.emit(call("matmul_requant", x, x, transpose_b=True, mult=mult, shift=shift,
                                  **named(out=WIDE)))
            return bb.emit(add(scores, bias, 1.0, 0.7, 0, 0, *OUT))
        node = add(x, x, 1.0, 0.7, 0, 0, *OUT)
        scale = {"res_mult": node.attrs["b_mult"], "res_shift": node.attrs["b_shift"]}
        return bb.emit(call("matmul_requant_add", x, x, bias, transpose_b=True, mult=mult,
                            shift=shift, **scale, **named(out=OUT)))

    check(before, expected, (2, 3, 6))


def test_an_accumulator_used_twice_stays():
    def before(bb, x):
        acc = bb.emit(linear(x, W, B))
        a = bb.emit(requantize(acc, 1e-3, 0, *OUT))
        b = bb.emit(requantize(acc, 2e-3, 0, *OUT))
        return bb.emit(add(a, b, 1.0, 1.0, 0, 0, *OUT))

    check(before, before)


@pytest.mark.parametrize("ratio", [0.5, 0.7, 2.0])
def test_a_scaled_sum_stays(ratio):
    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, 0, -32767, 32767, "int16"))
        y = bb.emit(requantize(bb.emit(linear(x, W, B)), RATIO, 0, *WIDE))
        return bb.emit(add(y, r, ratio, 0.3, 0, 0, 0, -32767, 32767, "int16"))

    after = FuseEpilogues()(build((3, 6), before, "int8"))
    names = [b.value.op.name for block in after["main"].body.blocks for b in block.bindings
             if isinstance(b.value, relax.Call)]
    assert "vitq.linear_requant" in names and "vitq.add" in names
