"""The interpreter itself: layout operators, batches, errors, ranges, calls between functions."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.linear import linear
from relay_passes.dialect.registry import SPECS
from relay_passes.dialect.requantize import requantize
from relay_passes.errors import VitqError
from relay_passes.split_boundary import SplitBoundary
from tests.helpers.dialect import compiled, module
from tests.helpers.qdq import build
from tvm_vitq.reference.arithmetic import exact_matmul
from tvm_vitq.reference.interpreter import Interpreter, run_integer
from tvm_vitq.reference.registry import REFERENCE, RangeError, expect, reference

RNG = np.random.default_rng(1)
W = RNG.integers(-127, 128, (12, 5)).astype("int8")
ROLL = relax.const(np.array([2, 0, 1], "int64"))

LAYOUTS = {
    "reshape": lambda x: relax.op.reshape(x, (4, 6)),
    "reshape_rest": lambda x: relax.op.reshape(x, (3, -1)),
    "flatten": relax.op.flatten,
    "expand_dims": lambda x: relax.op.expand_dims(x, 1),
    "squeeze": lambda x: relax.op.squeeze(relax.op.reshape(x, (2, 1, 12)), [1]),
    "permute": lambda x: relax.op.permute_dims(x, [2, 0, 1]),
    "permute_negative": lambda x: relax.op.permute_dims(x, [-1, 0, 1]),
    "transpose": relax.op.permute_dims,
    "slice": lambda x: relax.op.strided_slice(x, [1, 2], [1, 0], [3, 4], [1, 2]),
    "slice_negative": lambda x: relax.op.strided_slice(x, [1], [-2], [3]),
    "slice_past_the_end": lambda x: relax.op.strided_slice(x, [2], [1], [2**31 - 1]),
    "concat": lambda x: relax.op.concat([x, relax.const(np.ones((2, 1, 4), "int8"))], 1),
    "concat_last": lambda x: relax.op.concat([x, x], -1),
    "take": lambda x: relax.op.take(x, ROLL, axis=1),
    "broadcast": lambda x: relax.op.broadcast_to(x, (3, 2, 3, 4)),
    "astype": lambda x: relax.op.astype(x, "int16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_operators_equal_compiled_code(name):
    x = RNG.integers(-128, 128, (2, 3, 4)).astype("int8")
    mod = module([x], LAYOUTS[name])
    expected = compiled(mod)(x)
    actual = Interpreter(mod).evaluate(x)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_split_gives_a_tuple():
    def body(bb, x):
        parts = bb.emit(relax.op.split(x, 2, axis=1))
        return bb.emit(relax.op.concat([bb.emit(parts[1]), bb.emit(parts[0])], axis=1))

    x = np.arange(8, dtype="int8").reshape(2, 4)
    out = Interpreter(build((2, 4), body, "int8")).evaluate(x)
    np.testing.assert_array_equal(out, x[:, [2, 3, 0, 1]])


def network(bb, x):
    q = bb.emit(quantize(x, 0.1, 3, -128, 127), "q")
    q = bb.emit(relax.op.reshape(q, (2, 12)), "flat")
    acc = bb.emit(linear(q, W, np.zeros(5, "int32")), "acc")
    return bb.emit(dequantize(bb.emit(requantize(acc, 0.01, 0, 0, -127, 127), "out"), 0.2), "real")


def test_batches_observer_and_split_functions():
    mod = build((2, 3, 4), network)
    x = RNG.standard_normal((6, 3, 4)).astype("float32")
    seen = []
    logits = run_integer(mod, x, lambda *event: seen.append(event))
    assert logits.dtype == np.float32 and logits.shape == (6, 5)
    names = ["q", "flat", "acc", "out", "real", "gv"]
    assert [event[0] for event in seen[: len(seen) // 3]] == names
    assert seen[2][1] == "vitq.linear" and seen[2][2].dtype == np.int32
    q = np.clip(np.floor(x / np.float32(0.1) + np.float32(0.5)) + 3, -128, 127).reshape(6, 12)
    acc = q @ W.astype("float64")
    np.testing.assert_array_equal(np.concatenate([e[2] for e in seen if e[0] == "acc"]), acc)

    split = SplitBoundary()(mod)
    np.testing.assert_array_equal(run_integer(split, x), logits)
    codes = run_integer(split, q.reshape(6, 3, 4).astype("int8"), function="main_codes")
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes.astype("float32") * np.float32(0.2), logits)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 5), "float32"), r"input has shape \[2, 3, 5\], the model takes \[2, 3, 4"),
        (np.zeros((3, 3, 4), "float32"), r"whole multiples of its batch"),
        (np.zeros((0, 3, 4), "float32"), r"input has shape"),
        (np.zeros((2, 3, 4), "float64"), r"input is float64, the model takes float32"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(VitqError, match=message):
        run_integer(build((2, 3, 4), network), x)


def test_what_is_not_integer_dialect_is_refused():
    mod = build((2, 3), lambda bb, x: bb.emit(relax.op.nn.gelu(x)))
    with pytest.raises(VitqError, match=r"relax\.nn\.gelu has no integer reference"):
        run_integer(mod, np.zeros((2, 3), "float32"))
    with pytest.raises(VitqError, match="no function other; it has main"):
        run_integer(mod, np.zeros((2, 3), "float32"), function="other")


def test_leaving_a_range_is_an_error():
    w = np.full((2, 1), 127, "int8")
    bias = np.full(1, 2**31 - 1, "int32")
    x = np.ones((1, 2), "int8")
    mod = build((1, 2), lambda bb, v: bb.emit(linear(v, w, bias), "acc"), "int8")
    with pytest.raises(RangeError, match=r"acc \(vitq\.linear\): accumulator spans \[2147483901"):
        run_integer(mod, x)
    mod = build((1, 2), lambda bb, v: bb.emit(relax.op.astype(v, "int8"), "narrow"), "int32")
    with pytest.raises(RangeError, match=r"narrow \(relax\.astype\): result spans .* fit int8"):
        run_integer(mod, np.array([[1, 300]], "int32"))
    assert expect(np.zeros(0, "int64"), "int8", "nothing").size == 0


@pytest.mark.parametrize("high", [127, 2**20, 2**30])
def test_matmul_is_exact_in_float32_float64_and_int64(high):
    a = RNG.integers(-high, high + 1, (3, 4))
    np.testing.assert_array_equal(exact_matmul(a, a.T), a.astype(object) @ a.T.astype(object))


def test_every_operator_that_lowering_makes_has_a_reference():
    packed = {name for name in SPECS if name.startswith(("vitq.packed_", "vitq.float_"))}
    assert set(SPECS) - packed <= set(REFERENCE)


def test_the_table_takes_new_operators():
    @reference("vitq.test_only")
    def function(args, _attrs):
        return args[0]

    assert REFERENCE.pop("vitq.test_only") is function
