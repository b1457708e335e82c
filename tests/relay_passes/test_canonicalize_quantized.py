"""Models that arrive quantized: pairs stay at the sites and nowhere else."""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from tests.relay_passes.canonical_helpers import array, assert_canonical_form, const, function

W, B = array(6, 6), array(6)


def pair(e, x, scale=0.1, zero=3, dtype="uint8"):
    args = const(np.float32(scale)), const(zero, dtype)
    codes = e(R.quantize(x, *args, axis=-1, out_dtype=dtype))
    return e(R.dequantize(codes, *args, axis=-1, out_dtype="float32"))


def linear(e, x, w=W, b=B):
    return e(R.add(e(R.matmul(x, const(w))), const(b)))


def test_pair_between_product_and_bias_is_dropped() -> None:
    def before(e, x):
        product = pair(e, e(R.matmul(pair(e, x, 0.2), const(W))), 0.3)
        return pair(e, e(R.add(product, const(B))), 0.4)

    def expected(e, x):
        return pair(e, linear(e, pair(e, x, 0.2)), 0.4)

    assert_canonical_form(function((4, 6), before), function((4, 6), expected))


def test_pairs_inside_a_decomposed_gelu_are_dropped() -> None:
    def before(e, x):
        y = pair(e, linear(e, pair(e, x, 0.2)), 0.4)
        erf = pair(e, e(R.erf(pair(e, e(R.divide(y, const(math.sqrt(2)))), 0.9))), 0.8)
        gate = pair(e, e(R.add(erf, const(1.0))), 0.7)
        return pair(e, e(R.multiply(pair(e, e(R.multiply(y, gate)), 0.6), const(0.5))), 0.5)

    def expected(e, x):
        return pair(e, e(R.nn.gelu(pair(e, linear(e, pair(e, x, 0.2)), 0.4))), 0.5)

    assert_canonical_form(function((4, 6), before), function((4, 6), expected))


def test_pair_moves_above_layouts_and_off_a_branch() -> None:
    """A quantizer after a reshape is the linear's; a linear that feeds a residual add has none."""

    def before(e, x):
        y = pair(e, e(R.reshape(linear(e, x), (1, 4, 2, 3))), 0.2)
        y = pair(e, e(R.permute_dims(y, [0, 2, 1, 3])), 0.2)
        z = pair(e, e(R.nn.softmax(y)), 1 / 256, 0)
        z = e(R.reshape(e(R.permute_dims(z, [0, 2, 1, 3])), (1, 4, 6)))
        return pair(e, e(R.add(x, pair(e, linear(e, z), 0.3))), 0.4)

    def expected(e, x):
        y = e(R.reshape(pair(e, linear(e, x), 0.2), (1, 4, 2, 3)))
        y = e(R.permute_dims(y, [0, 2, 1, 3]))
        z = pair(e, e(R.nn.softmax(y)), 1 / 256, 0)
        z = e(R.reshape(e(R.permute_dims(z, [0, 2, 1, 3])), (1, 4, 6)))
        return pair(e, e(R.add(x, linear(e, z))), 0.4)

    assert_canonical_form(function((1, 4, 6), before), function((1, 4, 6), expected))


def test_constant_token_takes_the_scale_of_the_patches() -> None:
    token = array(1, 1, 6)

    def before(e, x):
        y = linear(e, pair(e, x, 0.2))
        return pair(e, e(R.concat([const(token), y], axis=1)), 0.3)

    def expected(e, x):
        first = pair(e, const(token), 0.3)
        return e(R.concat([first, pair(e, linear(e, pair(e, x, 0.2)), 0.3)], axis=1))

    assert_canonical_form(function((1, 4, 6), before), function((1, 4, 6), expected))


def test_weight_codes_and_scales_are_kept() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, 6)).astype("int8")
    scales = rng.uniform(0.01, 0.02, 5).astype("float32")
    gamma = np.array([1, -2, 0.5, 1, 1], "float32")

    def dequantized(values, scale, axis):
        zero = relax.const(np.zeros(scale.shape, "int8"))
        return R.dequantize(
            const(values, "int8"), const(scale), zero, axis=axis, out_dtype="float32"
        )

    def before(e, x):
        """Gemm with a transposed weight, per output channel, and a LayerScale behind it."""
        weight = e(R.permute_dims(e(dequantized(codes, scales, 0)), [1, 0]))
        return e(R.multiply(e(R.matmul(x, weight)), const(gamma)))

    def expected(e, x):
        signed = (codes.T * np.sign(gamma)).astype("int8")
        weight = R.dequantize(
            const(signed, "int8"),
            const(scales * np.abs(gamma)),
            const(0, "int8"),
            axis=1,
            out_dtype="float32",
        )
        return e(R.matmul(x, e(weight)))

    assert_canonical_form(function((4, 6), before), function((4, 6), expected))


def test_integer_bias_becomes_float() -> None:
    codes = np.arange(6, dtype="int32") * 100

    def before(e, x):
        bias = e(R.dequantize(const(codes, "int32"), const(0.01), const(0, "int32"), axis=0))
        return e(R.add(e(R.matmul(x, const(W))), bias))

    def expected(e, x):
        return linear(e, x, W, (codes * np.float32(0.01)).astype("float32"))

    assert_canonical_form(function((4, 6), before), function((4, 6), expected))


def test_quantizer_of_a_fused_qkv_is_that_of_each_part() -> None:
    w, b = array(6, 12), array(12)

    def before(e, x):
        y = pair(e, e(R.add(e(R.matmul(x, const(w))), const(b))), 0.2)
        first = e(R.nn.softmax(e(R.strided_slice(y, [1], [0], [6], [1]))))
        return e(R.add(first, e(R.nn.softmax(e(R.strided_slice(y, [1], [6], [12], [1]))))))

    def expected(e, x):
        first = e(R.nn.softmax(pair(e, linear(e, x, w[:, :6], b[:6]), 0.2)))
        second = e(R.nn.softmax(pair(e, linear(e, x, w[:, 6:], b[6:]), 0.2)))
        return e(R.add(first, second))

    assert_canonical_form(function((4, 6), before), function((4, 6), expected))


_ = tvm
