"""Linear rules: one operator for every product with a constant, next to the add it feeds."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.relax import op as R

from relay_passes.errors import VitqError
from tests.relay_passes.canonical_helpers import (
    array,
    assert_canonical_form,
    const,
    function,
    run,
    simplified,
)

W, B = array(6, 5), array(5)


def linear(e, x, w, b=None):
    y = e(R.matmul(x, const(w)))
    return y if b is None else e(R.add(y, const(b)))


def test_flattened_rows_and_bias_first() -> None:
    """torch.export's spelling: two-dimensional product of a transposed weight, bias + product."""

    def before(e, x):
        flat = e(R.reshape(x, (8, 6)))
        y = e(R.matmul(flat, e(R.permute_dims(const(W.T), [1, 0]))))
        return e(R.nn.gelu(e(R.reshape(e(R.add(const(B), y)), (2, 4, 5)))))

    def expected(e, x):
        return e(R.nn.gelu(linear(e, x, W, B)))

    assert_canonical_form(function((2, 4, 6), before), function((2, 4, 6), expected))


def test_two_biases_add_up() -> None:
    def before(e, x):
        return e(R.subtract(linear(e, x, W, B), const(B / 2)))

    assert_canonical_form(
        function((4, 6), before), function((4, 6), lambda e, x: linear(e, x, W, B - B / 2))
    )


def test_patch_embedding_is_a_linear_of_patches() -> None:
    kernel, bias = array(5, 3, 2, 2), array(5)

    def before(e, x):
        y = e(R.nn.conv2d(x, const(kernel), strides=[2, 2]))
        y = e(R.add(y, const(bias.reshape(1, 5, 1, 1))))
        return e(R.permute_dims(e(R.reshape(y, (1, 5, 6))), [0, 2, 1]))

    def expected(e, x):
        y = e(R.permute_dims(e(R.reshape(x, (1, 3, 2, 2, 3, 2))), [0, 2, 4, 1, 3, 5]))
        return linear(e, e(R.reshape(y, (1, 6, 12))), kernel.reshape(5, 12).T, bias)

    mod = function((1, 3, 4, 6), before)
    assert_canonical_form(mod, function((1, 3, 4, 6), expected))
    x = array(1, 3, 4, 6)
    np.testing.assert_allclose(run(simplified(mod), x), run(mod, x), rtol=1e-4, atol=1e-5)


def test_other_convolutions_are_named() -> None:
    def body(e, x):
        return e(R.nn.conv2d(x, const(array(4, 3, 3, 3)), strides=[1, 1], padding=[1, 1]))

    with pytest.raises(VitqError, match=r"conv2d .*kernel 3x3, stride \[1, 1\].*not supported"):
        simplified(function((1, 3, 8, 8), body))


def test_layer_scale_folds() -> None:
    gamma = array(5, seed=3)

    def before(e, x):
        return e(R.multiply(linear(e, x, W, B), const(gamma.reshape(1, 1, 5))))

    assert_canonical_form(
        function((2, 4, 6), before),
        function((2, 4, 6), lambda e, x: linear(e, x, W * gamma, B * gamma)),
    )


def test_fused_qkv_comes_apart() -> None:
    w, b = array(6, 18), array(18)

    def heads(e, y):
        return e(R.permute_dims(e(R.reshape(y, (1, 4, 2, 3))), [0, 2, 1, 3]))

    def before(e, x):
        y = e(R.permute_dims(e(R.reshape(linear(e, x, w, b), (1, 4, 3, 2, 3))), [2, 0, 3, 1, 4]))
        q, k, v = (
            e(R.squeeze(e(R.strided_slice(y, [0], [i], [i + 1], [1])), [0])) for i in range(3)
        )
        p = e(R.nn.softmax(e(R.matmul(q, e(R.permute_dims(k, [0, 1, 3, 2]))))))
        return e(R.matmul(p, v))

    def expected(e, x):
        q = heads(e, linear(e, x, w[:, :6], b[:6]))
        k = heads(e, linear(e, x, w[:, 6:12], b[6:12]))
        logits = e(R.matmul(q, e(R.permute_dims(k, [0, 1, 3, 2]))))
        p = e(R.nn.softmax(e(R.multiply(logits, const(1.0)))))
        return e(R.matmul(p, heads(e, linear(e, x, w[:, 12:], b[12:]))))

    assert_canonical_form(function((1, 4, 6), before), function((1, 4, 6), expected))


def test_scalar_on_the_input_folds() -> None:
    def before(e, x):
        return linear(e, e(R.reshape(e(R.divide(x, const(4.0))), (4, 6))), W, B)

    def expected(e, x):
        return linear(e, e(R.reshape(x, (4, 6))), W / 4, B)

    assert_canonical_form(function((2, 2, 6), before), function((2, 2, 6), expected))


def test_average_of_two_heads_is_one_linear() -> None:
    """Distilled DeiT."""
    w2, b2 = array(6, 5, seed=1), array(5, seed=1)

    def before(e, x):
        heads = [
            linear(e, e(R.take(x, const(i, "int64"), axis=1)), w, b)
            for i, (w, b) in enumerate([(W, B), (w2, b2)])
        ]
        return e(R.divide(e(R.add(*heads)), const(2.0)))

    def expected(e, x):
        tokens = e(R.reshape(e(R.strided_slice(x, [1], [0], [2], [1])), (1, 12)))
        return linear(e, tokens, np.concatenate([W, w2]) / 2, (B + b2) / 2)

    assert_canonical_form(function((1, 7, 6), before), function((1, 7, 6), expected))


def test_window_reverse_and_roll_move_above_the_linear() -> None:
    w, b = array(6, 6), array(6)

    def reverse(e, y):
        y = e(R.permute_dims(e(R.reshape(y, (1, 2, 2, 2, 2, 6))), [0, 1, 3, 2, 4, 5]))
        y = e(R.reshape(y, (1, 4, 4, 6)))
        parts = [
            e(R.strided_slice(y, [1], [3], [4], [1])),
            e(R.strided_slice(y, [1], [0], [3], [1])),
        ]
        return e(R.concat(parts, axis=1))

    def before(e, x):
        windows = e(R.nn.softmax(x))
        return e(R.add(e(R.reshape(x, (1, 4, 4, 6))), reverse(e, linear(e, windows, w, b))))

    def expected(e, x):
        whole = e(R.reshape(x, (1, 4, 4, 6)))
        return e(R.add(whole, linear(e, reverse(e, e(R.nn.softmax(x))), w, b)))

    assert_canonical_form(function((4, 4, 6), before), function((4, 4, 6), expected))


def test_product_with_a_stack_of_equal_weights() -> None:
    """bmm with an expanded weight."""

    def before(e, x):
        return e(R.matmul(x, const(np.stack([W, W]))))

    assert_canonical_form(
        function((2, 4, 6), before), function((2, 4, 6), lambda e, x: linear(e, x, W))
    )
