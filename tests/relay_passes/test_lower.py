"""Lowering of the quantize/dequantize form: Before/Expected for every kind of value."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from relay_passes.dialect.add import add
from relay_passes.dialect.boundary import dequantize, quantize
from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.linear import linear
from relay_passes.dialect.matmul import matmul
from relay_passes.dialect.reduce import sum_
from relay_passes.dialect.registry import call
from relay_passes.dialect.requantize import requantize
from relay_passes.dialect.softmax import softmax
from relay_passes.errors import VitqError
from relay_passes.lower import LowerToInteger
from tests.helpers.qdq import build, fake_quant, weight

INT32 = (-(2**31), 2**31 - 1)
RNG = np.random.default_rng(0)
W = RNG.integers(-127, 128, (6, 8)).astype("int8")
SW = (RNG.random(8) * 0.01 + 0.001).astype("float32")
BIAS = RNG.standard_normal(8).astype("float32")


def f32(value: float) -> float:
    return float(np.float32(value))


S1, S2, S3 = f32(0.03), f32(0.05), f32(0.004)


def check(before: tvm.IRModule, expected: tvm.IRModule) -> None:
    after = LowerToInteger()(before)
    tvm.ir.assert_structural_equal(after["main"].without_attr("global_symbol"),
                                   expected["main"].without_attr("global_symbol"))


def accumulator(bb, codes, scale_in, zero):
    """linear with the bias and the zero point's share folded in."""
    scale = scale_in * SW.astype("float64")
    bias = np.floor(BIAS.astype("float64") / scale + 0.5) - zero * W.astype("int64").sum(0)
    return bb.emit(linear(codes, relax.const(W), relax.const(bias.astype("int32")))), scale


def test_linear_with_zero_point_and_bias():
    def before(bb, x):
        x = fake_quant(bb, x, S1, 5)
        y = bb.emit(relax.op.matmul(x, weight(bb, W, SW)))
        y = bb.emit(relax.op.add(y, relax.const(BIAS)))
        return fake_quant(bb, y, S2)

    def expected(bb, x):
        q = bb.emit(quantize(x, S1, 5, -128, 127, "int8"))
        acc, scale = accumulator(bb, q, S1, 5)
        y = bb.emit(requantize(acc, scale / S2, 0, 0, -127, 127, "int8"))
        return bb.emit(dequantize(y, S2, 0))

    check(build((2, 6), before), build((2, 6), expected))


def test_residual_add_rounds_the_accumulator_once():
    def before(bb, x):
        r = fake_quant(bb, x, S3, 0, "int16")
        y = bb.emit(relax.op.matmul(fake_quant(bb, r, S1), weight(bb, W[:, :6], SW[:6])))
        y = bb.emit(relax.op.add(r, y))
        return fake_quant(bb, y, S2, 0, "int16")

    def expected(bb, x):
        r = bb.emit(quantize(x, S3, 0, -32767, 32767, "int16"))
        q = bb.emit(requantize(r, S3 / S1, 0, 0, -127, 127, "int8"))
        zero = relax.const(np.zeros(6, "int32"))
        acc = bb.emit(linear(q, relax.const(W[:, :6]), zero))
        wide = bb.emit(
            requantize(acc, S1 * SW[:6].astype("float64") / S2, 0, 0, *INT32, "int32")
        )
        y = bb.emit(add(wide, r, 1.0, S3 / S2, 0, 0, 0, -32767, 32767, "int16"))
        return bb.emit(dequantize(y, S2, 0))

    check(build((2, 6), before), build((2, 6), expected))


def test_attention_takes_keys_row_major_and_folds_the_scale():
    shape = (1, 5, 2, 4)

    def heads(bb, x):
        return bb.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))

    def before(bb, x):
        x = fake_quant(bb, x, S1)
        k = bb.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
        y = bb.emit(relax.op.matmul(heads(bb, x), k))
        y = bb.emit(relax.op.multiply(y, relax.const(np.float32(0.5))))
        y = fake_quant(bb, y, S2, 0, "int16")
        p = fake_quant(bb, bb.emit(call("float_softmax", y, method="poly")), 2**-15, 0, "int16")
        return fake_quant(bb, bb.emit(relax.op.matmul(p, heads(bb, x))), S1)

    def expected(bb, x):
        q = bb.emit(quantize(x, S1, 0, -127, 127, "int8"))
        a, b, v = heads(bb, q), heads(bb, q), heads(bb, q)
        acc = bb.emit(matmul(a, b, True))
        y = bb.emit(requantize(acc, S1 * S1 * 0.5 / S2, 0, 0, -32767, 32767, "int16"))
        p = bb.emit(softmax(y, S2, 2**-15, 32767, "int16", "poly"))
        acc = bb.emit(matmul(p, v, False))
        y = bb.emit(requantize(acc, 2**-15 * S1 / S1, 0, 0, -127, 127, "int8"))
        return bb.emit(dequantize(y, S1, 0))

    after = LowerToInteger()(build(shape, before))
    # The order of the three transposes is free; everything else is a chain.
    names = sorted(c.op.name for c in _calls(after))
    assert names == sorted(c.op.name for c in _calls(build(shape, expected)))
    (score,) = [c for c in _calls(after) if c.op.name == "vitq.matmul" and c.attrs["transpose_b"]]
    assert [int(d) for d in score.args[1].ty.shape] == [1, 2, 5, 4]


def _calls(mod: tvm.IRModule) -> list[relax.Call]:
    return [b.value for block in mod["main"].body.blocks for b in block.bindings
            if isinstance(b.value, relax.Call)]


def test_bias_and_mask_constants_are_added_at_the_logits_scale():
    table = RNG.standard_normal((1, 2, 5, 5)).astype("float32")
    mask = np.where(RNG.random((1, 1, 5, 5)) < 0.5, -100.0, 0.0).astype("float32")

    def before(bb, x):
        x = fake_quant(bb, x, S1)
        k = bb.emit(relax.op.permute_dims(x, [0, 1, 3, 2]))
        y = bb.emit(relax.op.multiply(bb.emit(relax.op.matmul(x, k)), relax.const(np.float32(1))))
        y = bb.emit(relax.op.add(y, relax.const(table)))
        y = bb.emit(relax.op.add(y, relax.const(mask)))
        return fake_quant(bb, y, S2, 0, "int16")

    def expected(bb, x):
        q = bb.emit(quantize(x, S1, 0, -127, 127, "int8"))
        acc = bb.emit(matmul(q, q, True))
        y = bb.emit(requantize(acc, S1 * S1 / S2, 0, 0, *INT32, "int32"))

        def codes(data):
            rounded = np.floor(data.astype("float64") / S2 + 0.5)
            return relax.const(np.clip(rounded, -32767, 32767).astype("int16"))

        y = bb.emit(add(y, codes(table), 1.0, 1.0, 0, 0, 0, *INT32, "int32"))
        y = bb.emit(add(y, codes(mask), 1.0, 1.0, 0, 0, 0, -32767, 32767, "int16"))
        return bb.emit(dequantize(y, S2, 0))

    check(build((1, 2, 5, 4), before), build((1, 2, 5, 4), expected))


def test_probabilities_with_a_zero_point_are_moved_exactly():
    step = f32(1 / 255)

    def before(bb, x):
        y = call("float_softmax", fake_quant(bb, x, S2, 0, "int16"), method="poly")
        return fake_quant(bb, bb.emit(y), step, -128)

    def expected(bb, x):
        y = bb.emit(quantize(x, S2, 0, -32767, 32767, "int16"))
        y = bb.emit(softmax(y, S2, step, 255, "int16", "poly"))
        y = bb.emit(requantize(y, 1.0, 0, -128, -128, 127, "int8"))
        return bb.emit(dequantize(y, step, -128))

    check(build((2, 6), before), build((2, 6), expected))


def test_a_mask_beyond_int16_still_masks():
    scale = f32(8 / 32767)

    def before(bb, x):
        x = fake_quant(bb, x, S1)
        y = bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(x, [0, 1, 3, 2]))))
        y = bb.emit(relax.op.add(y, relax.const(np.full((1, 1, 5, 5), -100, "float32"))))
        return fake_quant(bb, y, scale, 0, "int16")

    from tvm_vitq.reference.interpreter import run_integer

    x = np.full((1, 2, 5, 4), 1.35, "float32")  # scores of +7.3 under a mask of -100
    out = run_integer(LowerToInteger()(build((1, 2, 5, 4), before)), x)
    np.testing.assert_array_equal(out, np.float32(-32767) * np.float32(scale))


def test_norm_gelu_and_mean():
    gamma, beta = RNG.standard_normal(6).astype("float32"), BIAS[:6]
    factor = (RNG.random(6) + 0.5).astype("float32")

    def before(bb, x):
        x = fake_quant(bb, x, S3, 0, "int16")
        norm = relax.op.nn.layer_norm(
            x, relax.const(gamma), relax.const(beta), axes=[-1], epsilon=1e-6
        )
        y = fake_quant(bb, bb.emit(norm), S1, -3)
        y = bb.emit(call("float_gelu", y, method="table"))
        y = fake_quant(bb, bb.emit(relax.op.multiply(y, relax.const(factor))), S2, 7)
        y = bb.emit(relax.op.mean(y, axis=[1], keepdims=False))
        return fake_quant(bb, y, S3, 0, "int16")

    def expected(bb, x):
        q = bb.emit(quantize(x, S3, 0, -32767, 32767, "int16"))
        g, b = gamma.astype("float64"), beta.astype("float64")
        y = bb.emit(layer_norm(q, S3, g, b, 1e-6, S1, -3, -128, 127, "int8"))
        y = bb.emit(
            gelu(y, S1, -3, S2, 7, -128, 127, "int8", "table", factor.astype("float64"))
        )
        y = bb.emit(sum_(y, 1, False))
        y = bb.emit(requantize(y, S2 / (3 * S3), 21, 0, -32767, 32767, "int16"))
        return bb.emit(dequantize(y, S3, 0))

    check(build((2, 3, 6), before), build((2, 3, 6), expected))


def test_uint8_input_has_no_quantize():
    def before(bb, x):
        one, zero = relax.const(np.float32(1)), relax.const(np.uint8(0))
        y = bb.emit(relax.op.dequantize(x, one, zero, axis=-1, out_dtype="float32"))
        y = bb.emit(relax.op.matmul(y, weight(bb, W, SW)))
        return fake_quant(bb, y, S2, 0, "int16")

    names = [c.op.name for c in _calls(LowerToInteger()(build((2, 6), before, "uint8")))]
    assert names == ["vitq.linear", "vitq.requantize", "vitq.dequantize"]


def test_concat_of_a_quantized_constant():
    token = RNG.standard_normal((1, 1, 6)).astype("float32")

    def before(bb, x):
        x = fake_quant(bb, x, S1, 0, "int16")
        first = fake_quant(bb, relax.const(token), S1, 0, "int16")
        return bb.emit(relax.op.concat([first, x], axis=1))

    def expected(bb, x):
        q = bb.emit(quantize(x, S1, 0, -32767, 32767, "int16"))
        codes = np.floor(token.astype("float64") / S1 + 0.5).astype("int16")
        y = bb.emit(relax.op.concat([relax.const(codes), q], axis=1))
        return bb.emit(dequantize(y, S1, 0))

    check(build((1, 3, 6), before), build((1, 3, 6), expected))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda bb, x: bb.emit(relax.op.tanh(fake_quant(bb, x, S1))), "relax.tanh"),
        (lambda bb, x: bb.emit(relax.op.add(fake_quant(bb, x, S1), fake_quant(bb, x, S1))),
         "not quantized"),
        (lambda bb, x: bb.emit(relax.op.matmul(fake_quant(bb, x, S1), relax.const(BIAS[:6]))),
         "weight is not quantized"),
    ],
    ids=["unknown operator", "unrounded output", "float weight"],
)
def test_refusals_name_the_place(body, message):
    with pytest.raises(VitqError, match=message) as info:
        LowerToInteger()(build((2, 6), body))
    assert "\n" not in str(info.value)


def test_bias_that_does_not_fit_is_refused():
    tiny = np.full(8, 1e-12, "float32")

    def before(bb, x):
        y = bb.emit(relax.op.matmul(fake_quant(bb, x, S1), weight(bb, W, tiny)))
        y = bb.emit(relax.op.add(y, relax.const(BIAS)))
        return fake_quant(bb, y, S2)

    with pytest.raises(VitqError, match="does not fit int32"):
        LowerToInteger()(build((2, 6), before))


def test_channel_without_weights_keeps_its_bias():
    codes, scale = W.copy(), SW.copy()
    codes[:, 3], scale[3] = 0, 1e-30

    def before(bb, x):
        y = bb.emit(relax.op.matmul(fake_quant(bb, x, S1), weight(bb, codes, scale)))
        y = bb.emit(relax.op.add(y, relax.const(BIAS)))
        return fake_quant(bb, y, S2)

    from tvm_vitq.reference.interpreter import run_integer

    out = run_integer(LowerToInteger()(build((1, 6), before)), np.zeros((1, 6), "float32"))
    assert abs(out[0, 3] - BIAS[3]) <= S2 / 2 + 1e-6
