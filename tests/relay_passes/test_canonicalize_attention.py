"""Attention rules: one scale behind the product, finite separate masks, the softmax's shape."""

from __future__ import annotations

import numpy as np
from tvm.relax import op as R

from tests.relay_passes.canonical_helpers import array, assert_canonical_form, const, function

SHAPE = (1, 2, 5, 4)
EXACT = np.float32(0.5)  # 1 / sqrt(4)


def swap(e, x):
    return e(R.permute_dims(x, [0, 1, 3, 2]))


def attention(e, x, scale=EXACT, mask=None, batch=None):
    q = x if batch is None else e(R.reshape(x, batch))
    logits = e(R.multiply(e(R.matmul(q, swap(e, q))), const(scale)))
    if mask is not None:
        logits = e(R.add(logits, const(mask)))
    return e(R.matmul(e(R.nn.softmax(logits)), q))


def test_scales_on_q_and_k_merge_and_the_guard_goes() -> None:
    """scaled_dot_product_attention as torch.export decomposes it."""

    def before(e, x):
        root = const(np.float32(0.70710677))
        q = e(R.reshape(e(R.multiply(x, root)), (2, 5, 4)))
        k = e(R.reshape(e(R.multiply(swap(e, x), root)), (2, 4, 5)))
        logits = e(R.reshape(e(R.matmul(q, k)), (1, 2, 5, 5)))
        p = e(R.nn.softmax(logits))
        finite = e(R.logical_not(e(R.equal(logits, const(-np.inf)))))
        any_finite = e(R.max(e(R.astype(finite, "int8")), axis=[-1], keepdims=True))
        dead = e(R.logical_not(e(R.astype(any_finite, "bool"))))
        p = e(R.where(dead, e(R.zeros_like(p)), p))
        p = e(R.reshape(e(R.broadcast_to(p, (1, 2, 5, 5))), (2, 5, 5)))
        return e(R.reshape(e(R.matmul(p, e(R.reshape(x, (2, 5, 4))))), SHAPE))

    assert_canonical_form(function(SHAPE, before), function(SHAPE, attention))


def test_scale_on_q_before_its_layout() -> None:
    def before(e, x):
        q = e(R.multiply(x, const(EXACT)))
        return e(R.matmul(e(R.nn.softmax(e(R.matmul(q, swap(e, x))))), x))

    assert_canonical_form(function(SHAPE, before), function(SHAPE, attention))


def test_unusual_scale_is_kept() -> None:
    def before(e, x):
        logits = e(R.divide(e(R.matmul(x, swap(e, x))), const(8.0)))
        return e(R.matmul(e(R.nn.softmax(logits)), x))

    assert_canonical_form(
        function(SHAPE, before),
        function(SHAPE, lambda e, x: attention(e, x, scale=np.float32(0.125))),
    )


def test_bias_inside_the_scale_comes_out() -> None:
    bias = array(1, 2, 5, 5)

    def before(e, x):
        logits = e(R.add(e(R.matmul(x, swap(e, x))), const(bias)))
        return e(R.matmul(e(R.nn.softmax(e(R.multiply(logits, const(EXACT))))), x))

    assert_canonical_form(
        function(SHAPE, before),
        function(SHAPE, lambda e, x: attention(e, x, mask=bias * EXACT)),
    )


def test_minus_infinity_becomes_finite() -> None:
    mask = np.triu(np.full((5, 5), -np.inf, "float32"), 1)
    finite = np.where(np.isinf(mask), np.float32(-100), mask)[None, None]

    assert_canonical_form(
        function(SHAPE, lambda e, x: attention(e, x, mask=mask)),
        function(SHAPE, lambda e, x: attention(e, x, mask=finite)),
    )


def test_bias_and_window_mask_added_beforehand_come_apart() -> None:
    windows, heads, m = 4, 2, 5
    bias = array(1, heads, m, m)
    mask = np.zeros((windows, 1, m, m), "float32")
    mask[1, :, :2, 3:] = -100
    mask[3, :, 3:, :2] = -100
    both = np.tile(bias + mask, (2, 1, 1, 1))
    shape = (2 * windows, heads, m, 4)

    def expected(e, x):
        logits = e(R.multiply(e(R.matmul(x, swap(e, x))), const(EXACT)))
        logits = e(R.reshape(e(R.add(logits, const(bias))), (2, windows, heads, m, m)))
        logits = e(R.add(logits, const(mask[None])))
        logits = e(R.reshape(logits, (2 * windows, heads, m, m)))
        return e(R.matmul(e(R.nn.softmax(logits)), x))

    assert_canonical_form(
        function(shape, lambda e, x: attention(e, x, mask=both)), function(shape, expected)
    )
