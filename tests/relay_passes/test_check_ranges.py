"""The range proof: its bounds are reached by adversarial inputs; what may overflow is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tvm
from tvm import relax

from relay_passes.check_ranges import check_ranges, headroom_bits
from relay_passes.dialect.add import add
from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.linear import linear, linear_requant, linear_requant_add
from relay_passes.dialect.matmul import matmul, matmul_requant
from relay_passes.dialect.reduce import sum_
from relay_passes.dialect.registry import SPECS, Claim, Interval
from relay_passes.dialect.requantize import requantize
from relay_passes.dialect.softmax import softmax
from relay_passes.errors import VitqError
from tests.helpers.dialect import module
from tvm_vitq.reference.interpreter import Interpreter

RNG = np.random.default_rng(3)
INT32 = (-(2**31), 2**31 - 1, "int32")


def proved(arrays, body, quantity: str) -> tuple[int, int]:
    rows = [row for row in check_ranges(module(arrays, body)) if row["quantity"] == quantity]
    return rows[-1]["lo"], rows[-1]["hi"]


def worst_rows(w: np.ndarray, lo: int, hi: int, dtype: str) -> np.ndarray:
    """For each column the inputs that make its accumulator largest, then smallest."""
    largest = np.where(w > 0, hi, lo).T
    return np.concatenate([largest, np.where(w > 0, lo, hi).T]).astype(dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_linear_bounds_are_reached(dtype):
    info = np.iinfo(dtype)
    w = RNG.integers(-127, 128, (24, 6)).astype("int8")
    bias = RNG.integers(-(10**6), 10**6, 6).astype("int32")
    x = worst_rows(w, info.min, info.max, dtype)
    body = lambda v: linear(v, w, bias)  # noqa: E731
    out = Interpreter(module([x], body)).evaluate(x)
    assert proved([x], body, "accumulator") == (out.min(), out.max())


def test_partial_sums_cover_every_order():
    w = np.array([[100, -100], [100, -100]], "int8")
    bias = np.array([-(10**6), 5], "int32")
    x = np.zeros((1, 2), "uint8")
    lo, hi = proved([x], lambda v: linear(v, w, bias), "partial sums")
    assert (lo, hi) == (-(10**6), 2 * 100 * 255)


def test_requantised_bounds_are_reached_per_channel():
    w = RNG.integers(-127, 128, (16, 3)).astype("int8")
    bias = np.array([1000, -5, 0], "int32")
    x = worst_rows(w, -128, 127, "int8")
    res = np.full((6, 3), 32767, "int16")
    res[3:] = -32768
    mult = np.array([2**30, -(2**31) + 1, 2**31 - 1], "int32")
    shift = np.array([40, 33, 35], "int32")
    body = lambda v: linear_requant(v, w, bias, mult, shift, 7, *INT32)  # noqa: E731
    out = Interpreter(module([x], body)).evaluate(x)
    assert proved([x], body, "requantised") == (out.min(), out.max())
    codes = (-128, 127, "int8")
    clamped = lambda v: linear_requant(v, w, bias, mult, shift, 7, *codes)  # noqa: E731
    assert proved([x], clamped, "result") == (-128, 127)

    def wide(v, r):
        return linear_requant_add(v, w, bias, mult, shift, r, 2**30, 31, 0, *INT32)

    lo, hi = proved([x, res], wide, "requantised")
    out = Interpreter(module([x, res], wide)).evaluate(x, res)
    assert lo <= out.min() and out.max() <= hi


def test_matmul_bounds_are_reached():
    a, b = np.full((2, 2, 9), -32768, "int16"), np.full((2, 9, 2), -128, "int8")
    a[1] = 32767
    out = Interpreter(module([a, b], matmul)).evaluate(a, b)
    assert proved([a, b], matmul, "accumulator") == (out.min(), out.max())


def test_add_sum_and_requantize_bounds_are_reached():
    a = np.array([[-128, 127]], "int8")
    body = lambda u, v: add(u, v, 0.7, 20.0, 3, -4, 5, *INT32)  # noqa: E731
    out = Interpreter(module([a, a], body)).evaluate(a, a)
    assert proved([a, a], body, "sum") == (out.min(), out.max())
    column = np.full((50, 1), -128, "int8")
    assert proved([column], lambda v: sum_(v, 0), "accumulator")[0] == -128 * 50
    body = lambda v: requantize(v, np.array([1.5, 3e-3]), -7, 1, *INT32)  # noqa: E731
    out = Interpreter(module([a], body)).evaluate(a)
    lo, hi = proved([a], body, "requantised")
    assert lo <= out.min() and hi == max(out.max(), int(1.5 * 134 + 1.5))


def network(body) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            q = bb.emit(quantize(x, 0.1, 0, -100, 90), "q")
            out = bb.emit_output(bb.emit(dequantize(body(bb, q), 0.1), "logits"))
        bb.emit_func_output(out)
    return bb.get()


def test_codes_of_the_input_are_its_clamp_and_survive_layout():
    w = np.ones((8, 2), "int8")

    def body(bb, q):
        v = bb.emit(relax.op.permute_dims(bb.emit(relax.op.reshape(q, (2, 8, 2))), [0, 2, 1]))
        v = bb.emit(relax.op.strided_slice(v, [0], [0], [1]))
        const = relax.const(np.full((1, 2, 8), 110, "int8"))
        v = bb.emit(relax.op.concat([v, const], axis=1))
        return bb.emit(linear(v, w, np.zeros(2, "int32")), "head")

    rows = check_ranges(network(body))
    (row,) = [r for r in rows if r["quantity"] == "accumulator"]
    assert (row["binding"], row["op"]) == ("head", "vitq.linear")
    assert (row["lo"], row["hi"]) == (-800, 880)
    assert set(row) == {"binding", "op", "quantity", "lo", "hi", "dtype", "headroom_bits"}


def test_rows_of_known_sum_bound_a_long_matmul():
    p, v = np.zeros((1, 2, 4000), "int16"), np.zeros((1, 4000, 3), "int8")
    with pytest.raises(VitqError, match=r"vitq\.matmul: partial sums"):
        check_ranges(module([p, v], matmul))
    node = module([p, v], matmul)["main"].body.blocks[0].bindings[0].value
    known = [Interval(0, 32767, row_sum=33000), Interval(-128, 127)]
    interval, claims = SPECS["vitq.matmul"].bounds(node, known)
    assert (interval.lo, interval.hi) == (-33000 * 128, 33000 * 128)
    assert all(claim.holds for claim in claims)


def test_long_attention_rows_are_proved_through_layout_operators():
    """1370 tokens (518 pixels, patch 14): K * max * max would pass int32 several times over."""
    logits = RNG.choice([-32767, 0, 32767], (1, 4, 1370)).astype("int16")
    logits[0, 0] = 0  # a flat row: every probability rounds the same way
    v = np.full((1, 1370, 3), 127, "int8")

    def body(x, right):
        p = softmax(x, 0.01, 2.0**-15, 32767, "int16", "poly")
        p = relax.op.permute_dims(relax.op.reshape(p, (1, 2, 2, 1370)), [0, 2, 1, 3])
        return matmul(relax.op.reshape(p, (1, 4, 1370)), right)

    mod = module([logits, v], body)
    (row,) = [r for r in check_ranges(mod) if r["quantity"] == "accumulator"]
    out = Interpreter(mod).evaluate(logits, v)
    assert 2**15 * 127 * 0.9 < out.max() <= row["hi"] < 2**24


@pytest.mark.parametrize(
    ("arrays", "body", "message"),
    [
        (
            [np.zeros((1, 4000), "int16")],
            lambda v: linear(v, np.full((4000, 1), 127, "int8"), np.zeros(1, "int32")),
            r"vitq\.linear: partial sums may reach \[-16646144000, .*\], outside int32",
        ),
        (
            [np.zeros((1, 1), "int8")],
            lambda v: linear(v, np.full((1, 1), 1, "int8"), np.full(1, 2**31 - 100, "int32")),
            r"vitq\.linear: partial sums may reach",
        ),
        (
            [np.zeros((2, 600), "int16"), np.zeros((600, 2), "int16")],
            lambda a, b: matmul_requant(a, b, False, 2**30, 40, 0, -127, 127),
            r"vitq\.matmul_requant: partial sums",
        ),
        (
            [np.zeros((70000, 2), "int16")],
            lambda v: sum_(v, 0),
            r"vitq\.sum: partial sums",
        ),
        (
            [np.zeros((2, 2), "int32")],
            lambda v: requantize(v, 0.5, 1, 0, -127, 127),
            r"vitq\.requantize: centred codes",
        ),
        (
            [np.zeros((2, 2), "int32")] * 2,
            lambda a, b: add(a, b, 1.0, 1.0, 0, -3, 0, *INT32),
            r"vitq\.add: centred b",
        ),
        (
            [np.zeros((2, 2), "int8")] * 2,
            relax.op.add,
            r"relax\.add has no bounds",
        ),
        (
            [np.zeros((2, 2), "int8"), np.zeros((2, 2), "int8"), np.zeros(2, "int32")],
            linear,
            r"vitq\.linear: w must be a constant",
        ),
    ],
)
def test_refuses_what_is_not_proved(arrays, body, message):
    with pytest.raises(VitqError, match=message) as caught:
        check_ranges(module(arrays, body))
    assert "\n" not in str(caught.value)


def test_headroom():
    assert headroom_bits(Claim("", -(2**15), 2**15 - 1, "int16")) == 0
    assert headroom_bits(Claim("", -(2**20), 0, "int32")) == 11
    assert headroom_bits(Claim("", 0, 0, "int32")) == 32


def test_fast_on_a_whole_model():
    """As many and as large weights as DeiT-Ti has."""

    def body(bb, q):
        v = bb.emit(relax.op.reshape(q, (1, 32)))
        v = bb.emit(requantize(linear_of(bb, v, 192), 1e-4, 0, 0, -127, 127))
        for _ in range(12):
            for width in (192, 192, 192, 192, 768, 192):
                v = bb.emit(requantize(linear_of(bb, v, width), 1e-4, 0, 0, -127, 127))
        return linear_of(bb, v, 1000)

    def linear_of(bb, v, width):
        w = RNG.integers(-127, 128, (int(v.ty.shape[-1]), width)).astype("int8")
        return bb.emit(linear(v, w, np.zeros(width, "int32")))

    mod = network(body)
    start = time.process_time()
    rows = check_ranges(mod)
    assert len(rows) > 300
    assert time.process_time() - start < 3
