"""Slices move up to where fewer rows are computed; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.dialect.add import add
from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.linear import linear_requant, linear_requant_add
from relay_passes.dialect.matmul import matmul_requant
from relay_passes.dialect.registry import is_vitq_call
from relay_passes.dialect.requantize import requantize
from relay_passes.dialect.softmax import softmax
from relay_passes.hoist_slices import HoistSlices
from tests.helpers.qdq import build
from tvm_vitq.reference.interpreter import Interpreter

RNG = np.random.default_rng(5)
W = RNG.integers(-127, 128, (6, 6)).astype("int8")
B = RNG.integers(-999, 999, 6).astype("int32")
M = np.full(6, 1 << 30, "int32")
E = np.full(6, 38, "int32")
OUT = (0, -127, 127, "int8")
WIDE = (0, -32767, 32767, "int16")
TOKENS = 7


def dense(bb, x):
    return bb.emit(linear_requant(x, W, B, M, E, *OUT))


def norm(bb, x):
    return bb.emit(layer_norm(x, 1e-2, np.ones(6), np.zeros(6), 1e-6, 0.03, *OUT))


def cut(bb, x, axis, begin, end):
    return bb.emit(relax.op.strided_slice(x, [axis], [begin], [end]))


def heads(bb, x):
    tokens = int(x.ty.shape[1])
    split = bb.emit(relax.op.reshape(x, (2, tokens, 3, 2)))
    return bb.emit(relax.op.permute_dims(split, [0, 2, 1, 3]))


def attention(bb, queries, x):
    """Attend with the tokens ``queries`` to the tokens ``x``; keys and values come first."""
    k, v = heads(bb, dense(bb, x)), heads(bb, dense(bb, x))
    q = heads(bb, dense(bb, queries()))
    s = bb.emit(matmul_requant(q, k, True, 1 << 30, 32, *WIDE))
    p = bb.emit(softmax(s, 1e-3, 2.0**-15, 32767, "int16", "poly"))
    o = bb.emit(matmul_requant(p, v, False, 1 << 30, 45, *OUT))
    merged = bb.emit(relax.op.permute_dims(o, [0, 2, 1, 3]))
    return bb.emit(relax.op.reshape(merged, (2, int(o.ty.shape[2]), 6)))


def rename(mod):
    """Drop names and order of bindings that Before/Expected need not share."""
    return relax.transform.CanonicalizeBindings()(mod)


def test_class_token_of_the_last_block():
    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        o = attention(bb, lambda: x, x)
        y = bb.emit(linear_requant_add(o, W, B, M, E, r, 1 << 30, 30, *WIDE))
        return cut(bb, norm(bb, y), 1, 0, 1)

    def expected(bb, x):
        rows = cut(bb, x, 1, 0, 1)
        r = bb.emit(requantize(rows, 3.0, 0, *WIDE))
        o = attention(bb, lambda: rows, x)
        y = bb.emit(linear_requant_add(o, W, B, M, E, r, 1 << 30, 30, *WIDE))
        return norm(bb, y)

    after = HoistSlices()(build((2, TOKENS, 6), before, "int8"))
    tvm.ir.assert_structural_equal(rename(after)["main"],
                                   rename(build((2, TOKENS, 6), expected, "int8"))["main"])


@pytest.mark.parametrize("begin,end", [(0, 4), (1, TOKENS)])
def test_more_than_half_stays(begin, end):
    module = build((2, TOKENS, 6), lambda bb, x: cut(bb, norm(bb, x), 1, begin, end), "int8")
    tvm.ir.assert_structural_equal(HoistSlices()(module)["main"], module["main"])


def test_channels_stay():
    module = build((2, TOKENS, 6), lambda bb, x: cut(bb, norm(bb, x), 2, 0, 2), "int8")
    tvm.ir.assert_structural_equal(HoistSlices()(module)["main"], module["main"])


def test_a_value_read_whole_is_computed_whole():
    def before(bb, x):
        y = norm(bb, x)
        s = cut(bb, y, 1, 0, 1)
        return bb.emit(add(y, s, 0.5, 0.5, 0, 0, *OUT))

    module = build((2, TOKENS, 6), before, "int8")
    tvm.ir.assert_structural_equal(HoistSlices()(module)["main"], module["main"])


def test_two_tokens_are_computed_together():
    def before(bb, x):
        y = norm(bb, x)
        a, b = cut(bb, y, 1, 1, 2), cut(bb, y, 1, 2, 3)
        return bb.emit(add(a, b, 0.5, 0.5, 0, 0, *OUT))

    after = HoistSlices()(build((2, TOKENS, 6), before, "int8"))["main"]
    calls = [b.value for block in after.body.blocks for b in block.bindings]
    (found,) = [c for c in calls if is_vitq_call(c, "layer_norm")]
    assert [int(e) for e in found.ty.shape] == [2, 2, 6]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_values_stay(data):
    """Random networks of row-wise operators, residuals, attention and slices keep their values."""
    def body(bb, x):
        stream = [bb.emit(requantize(x, 1.0, 0, *WIDE))]
        for _ in range(data.draw(st.integers(1, 5))):
            kind = data.draw(st.sampled_from(["mlp", "attention", "slice", "add"]))
            y = stream[-1]
            tokens = int(y.ty.shape[1])
            if kind == "mlp":
                hidden = dense(bb, norm(bb, y))
                y = bb.emit(linear_requant_add(hidden, W, B, M, E, y, 1 << 30, 30, *WIDE))
            elif kind == "attention":
                n = norm(bb, y)
                o = attention(bb, lambda n=n: n, n)
                y = bb.emit(linear_requant_add(o, W, B, M, E, y, 1 << 30, 30, *WIDE))
            elif kind == "slice":
                begin = data.draw(st.integers(0, tokens - 1))
                y = cut(bb, y, 1, begin, data.draw(st.integers(begin + 1, tokens)))
            else:
                other = data.draw(st.sampled_from(stream))
                if list(other.ty.shape) == list(y.ty.shape):
                    y = bb.emit(add(y, other, 0.5, 0.7, 0, 0, *WIDE))
            stream.append(y)
        return bb.emit(requantize(stream[-1], 0.02, 0, *OUT))

    before = build((2, TOKENS, 6), body, "int8")
    after = HoistSlices()(before)
    x = np.random.default_rng(1).choice([-128, -3, 5, 127], (2, TOKENS, 6)).astype("int8")
    np.testing.assert_array_equal(Interpreter(after)(x), Interpreter(before)(x))
