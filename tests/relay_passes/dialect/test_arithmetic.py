"""Arithmetic operators: compiled code against the int64 reference, bit for bit, extreme codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay_passes.dialect.add import add
from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.linear import linear, linear_requant, linear_requant_add
from relay_passes.dialect.matmul import matmul, matmul_requant
from relay_passes.dialect.reduce import sum_
from relay_passes.dialect.registry import call
from relay_passes.dialect.requantize import output_codes, requantize
from tests.helpers.dialect import compare, compiled, extreme, module

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CODES = st.sampled_from(["int8", "uint8", "int16"])
MULTS = {"lo": -(2**31) + 1, "hi": 2**31 - 1}
LEADING = st.lists(st.integers(1, 3), max_size=3)


@st.composite
def outputs(draw):
    """A (zero_point, qmin, qmax, dtype) of every kind that lowering makes."""
    dtype = draw(st.sampled_from(["int8", "uint8", "int16", "int32"]))
    info = np.iinfo(dtype)
    symmetric = draw(st.booleans()) and info.min < 0
    qmin = -int(info.max) if symmetric else int(info.min)
    zero_point = 0 if symmetric or dtype == "int32" else draw(st.integers(qmin, int(info.max)))
    return zero_point, qmin, int(info.max), dtype


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("zero", [0, 7])
def test_quantize_rounds_half_up_and_survives_anything(dtype, zero):
    info = np.iinfo(dtype)
    scale = 0.0625
    grid = np.arange(-600, 600) * 0.5 * scale  # every other value is a tie
    odd = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0, 2.0**31, -(2.0**40)]
    x = np.array([*odd, *grid], dtype="float32")
    out = compare([x], lambda v: quantize(v, scale, zero, int(info.min), int(info.max), dtype))
    truth = np.clip(np.floor(x[1:].astype("float64") / scale + 0.5) + zero, info.min, info.max)
    np.testing.assert_array_equal(out[1:], truth)
    assert out[0] == info.min


@FEW
@given(st.data(), st.floats(1e-6, 1e3))
def test_quantize_is_within_half_a_step(data, scale):
    x = data.draw(st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s)))
    values = (x.standard_normal((3, 7)) * scale * 100).astype("float32")
    out = compare([values], lambda v: quantize(v, scale, -5, -32768, 32767, "int16"))
    error = np.abs((out.astype("float64") + 5) - values.astype("float64") / scale)
    assert error.max() <= 0.5 + 1e-4


def test_quantize_rounds_twice_beside_a_tie_on_every_machine():
    # A fused multiply-add would round product and sum once and differ exactly here.
    rng = np.random.default_rng(0)
    for scale in (0.0187, 1 / 3, 0.00731):
        ties = ((rng.integers(-128, 128, 2048) - 0.5) * scale).astype("float32")
        x = np.stack([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9))])
        compare([x], lambda v, s=scale: quantize(v, s, -7, -128, 127, "int8"))


@FEW
@given(st.data(), st.sampled_from(["int8", "uint8", "int16", "int32"]))
def test_dequantize(data, dtype):
    q = data.draw(extreme([2, 5], dtype, *((-(2**24), 2**24) if dtype == "int32" else ())))
    out = compare([q], lambda v: dequantize(v, 0.1, 3))
    np.testing.assert_array_equal(out, (q.astype("float32") - 3) * np.float32(0.1))


@FEW
@given(st.data(), LEADING, st.integers(1, 40), st.integers(1, 9), CODES)
def test_linear(data, leading, depth, columns, dtype):
    x = data.draw(extreme([*leading, depth], dtype))
    w = data.draw(extreme([depth, columns], "int8", -127))
    bias = data.draw(extreme([columns], "int32", -(2**30), 2**30))
    out = compare([x, w, bias], linear)
    np.testing.assert_array_equal(out, x.astype(object) @ w.astype(object) + bias)


@FEW
@given(st.data(), st.booleans(), st.integers(1, 20), st.integers(1, 9), CODES, outputs())
def test_linear_with_epilogues(data, residual, depth, columns, dtype, codes):
    x = data.draw(extreme([2, 3, depth], dtype))
    w = data.draw(extreme([depth, columns], "int8", -127))
    bias = data.draw(extreme([columns], "int32", -(2**30), 2**30))
    mult = data.draw(extreme([columns], "int32", **MULTS))
    shift = data.draw(extreme([columns], "int32", 1, 62))
    arrays = [x, w, bias, mult, shift]
    if not residual:
        compare(arrays, lambda *v: linear_requant(*v, *codes))
        return
    res = data.draw(extreme([2, 3, columns], "int16"))
    scale = data.draw(st.integers(MULTS["lo"], MULTS["hi"])), data.draw(st.integers(1, 62))
    compare([*arrays, res], lambda *v: linear_requant_add(*v, *scale, *codes))


@FEW
@given(st.data(), st.integers(1, 33), st.integers(1, 70), st.integers(1, 19), CODES)
def test_packed_and_scheduled_linear_for_this_machine(data, rows, depth, columns, dtype):
    x = data.draw(extreme([1, rows, depth], dtype))
    w = data.draw(extreme([depth, columns], "int8", -127))
    bias = data.draw(extreme([columns], "int32", -(2**30), 2**30))
    mult = data.draw(extreme([columns], "int32", **MULTS))
    shift = data.draw(extreme([columns], "int32", data.draw(st.sampled_from([1, 20, 32])), 62))
    res = data.draw(extreme([1, rows, columns], "int16"))
    tail = [w, bias, mult, shift]
    codes = (3, -32768, 32767, "int16")
    compare([x], lambda v: linear_requant(v, *tail, *codes), native=True)
    compare([x, res], lambda v, r: linear_requant_add(v, *tail, r, 2**30, 32, *codes), native=True)


@FEW
@given(st.data(), LEADING, st.tuples(*[st.integers(1, 9)] * 3), st.booleans(), CODES, CODES)
def test_matmul(data, leading, extents, transpose_b, a_dtype, b_dtype):
    m, n, k = extents
    limit = 16383 if a_dtype == b_dtype == "int16" else None  # nine products stay in int32
    low = None if limit is None else -limit
    a = data.draw(extreme([*leading, m, k], a_dtype, low, limit))
    b = data.draw(extreme([*leading, *((n, k) if transpose_b else (k, n))], b_dtype, low, limit))
    if limit is not None:
        b = b // 2
    out = compare([a, b], lambda u, v: matmul(u, v, transpose_b))
    right = np.swapaxes(b, -1, -2) if transpose_b else b
    np.testing.assert_array_equal(out, np.matmul(a.astype("int64"), right.astype("int64")))


@FEW
@given(st.data(), st.booleans(), st.booleans(), outputs())
def test_matmul_requant(data, transpose_b, native, codes):
    a = data.draw(extreme([2, 3, 5, 8], "int16"))
    b = data.draw(extreme([2, 3, *((6, 8) if transpose_b else (8, 6))], "int8"))
    scale = data.draw(st.integers(MULTS["lo"], MULTS["hi"])), data.draw(st.integers(1, 62))
    compare([a, b], lambda u, v: matmul_requant(u, v, transpose_b, *scale, *codes), native)


@FEW
@given(st.data(), st.booleans(), st.booleans(), outputs())
def test_matmul_requant_add(data, transpose_b, native, codes):
    a = data.draw(extreme([2, 3, 5, 8], "int16"))
    b = data.draw(extreme([2, 3, *((6, 8) if transpose_b else (8, 6))], "int8"))
    shared = data.draw(st.sampled_from([(2, 3), (1, 3), (2, 1), (1, 1)]))
    r = data.draw(extreme([*shared, 5, 6], data.draw(st.sampled_from(["int8", "int16"]))))
    mult, res_mult = (data.draw(st.integers(MULTS["lo"], MULTS["hi"])) for _ in "ar")
    shift, res_shift = (data.draw(st.integers(1, 62)) for _ in "ar")
    attrs = {"transpose_b": transpose_b, "mult": mult, "shift": shift, "res_mult": res_mult,
             "res_shift": res_shift, **output_codes(*codes)}
    compare([a, b, r], lambda *v: call("matmul_requant_add", *v, **attrs), native)


@FEW
@given(st.data(), CODES | st.just("int32"), st.booleans(), outputs())
def test_requantize(data, dtype, per_channel, codes):
    x = data.draw(extreme([3, 11], dtype))
    channels = 11 if per_channel else 1
    mult = data.draw(extreme([channels], "int32", **MULTS))
    shift = data.draw(extreme([channels], "int32", 1, 62))
    in_zero = 0 if dtype == "int32" else data.draw(st.integers(-300, 300))
    attrs = output_codes(*codes)
    compare([x, mult, shift], lambda *v: call("requantize", *v, in_zero_point=in_zero, **attrs))


def test_requantize_is_within_half_a_step_of_the_truth():
    x = np.random.default_rng(0).integers(-(2**20), 2**20, (50, 4)).astype("int32")
    ratio = np.array([1e-3, 0.5, 3.7e-2, 1e-6])
    out = compare([x], lambda v: requantize(v, ratio, 0, 0, -(2**31), 2**31 - 1, "int32"))
    assert np.abs(out - x * ratio).max() <= 0.5 + 2**20 * 0.5 * 2**-31


@FEW
@given(
    st.data(),
    st.sampled_from([((2, 3, 4), (2, 3, 4)), ((2, 1, 4), (3, 1)), ((4,), (2, 3, 4)), ((1,), (5,))]),
    CODES | st.just("int32"),
    CODES,
    outputs(),
)
def test_add(data, shapes, a_dtype, b_dtype, codes):
    a, b = (data.draw(extreme(s, d)) for s, d in zip(shapes, (a_dtype, b_dtype), strict=True))
    ratios = [data.draw(st.sampled_from([1.0, 0.5, 1e-4, 0.7, 1000.0, 1e-9])) for _ in "ab"]
    zeros = [0 if a_dtype == "int32" else data.draw(st.integers(-200, 200)), 5]
    compare([a, b], lambda u, v: add(u, v, *ratios, *zeros, *codes))


@FEW
@given(st.data(), st.integers(0, 2), st.booleans(), st.booleans(), CODES)
def test_sum(data, axis, negative, keepdims, dtype):
    x = data.draw(extreme([3, 7, 4], dtype))
    axis = axis - 3 if negative else axis
    out = compare([x], lambda v: sum_(v, axis, keepdims))
    np.testing.assert_array_equal(out, x.astype("int64").sum(axis, keepdims=keepdims))


def test_one_kernel_many_parameters():
    """Multipliers and shifts as run-time arrays: every shift against every corner accumulator."""
    corners = np.array([-(2**31), -(2**31) + 1, -3, -1, 0, 1, 3, 2**31 - 1])
    mults = np.array([-(2**31) + 1, -1, 0, 1, 2**30, 2**30 + 1, 2**31 - 1])
    pairs = np.array(np.meshgrid(mults, np.arange(1, 63))).reshape(2, -1).astype("int32")
    x = np.repeat(corners[:, None], pairs.shape[1], 1).astype("int32")
    attrs = output_codes(0, -(2**31), 2**31 - 1, "int32")
    arrays = [x, pairs[0], pairs[1]]
    mod = module(arrays, lambda *v: call("requantize", *v, in_zero_point=0, **attrs))
    exact = (x.astype(object) * pairs[0] + [1 << int(e - 1) for e in pairs[1]]) >> pairs[1]
    np.testing.assert_array_equal(compiled(mod)(*arrays), np.clip(exact, -(2**31), 2**31 - 1))
