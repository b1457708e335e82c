"""Token and activation rules: positions, pooling, decomposed GELU and LayerNorm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tvm.relax import op as R

from tests.relay_passes.canonical_helpers import (
    array,
    assert_canonical_form,
    const,
    function,
    run,
    simplified,
)


def test_positions_go_into_the_class_token_and_onto_the_patches() -> None:
    cls, pos, w, b = array(1, 1, 6), array(1, 5, 6), array(3, 6), array(6)

    def patches(e, x):
        return e(R.add(e(R.matmul(x, const(w))), const(b)))

    def before(e, x):
        token = e(R.broadcast_to(const(cls), (2, 1, 6)))
        return e(R.add(e(R.concat([token, patches(e, x)], axis=1)), const(pos)))

    def expected(e, x):
        moved = e(R.add(patches(e, x), const(pos[:, 1:])))
        return e(R.concat([const(np.tile(cls + pos[:, :1], (2, 1, 1))), moved], axis=1))

    assert_canonical_form(function((2, 4, 3), before), function((2, 4, 3), expected))


def test_class_token_and_registers_are_one_constant() -> None:
    cls, reg = array(1, 1, 6), array(1, 3, 6)

    def before(e, x):
        return e(R.concat([const(cls), e(R.concat([const(reg), x], axis=1))], axis=1))

    def expected(e, x):
        return e(R.concat([const(np.concatenate([cls, reg], 1)), x], axis=1))

    assert_canonical_form(function((1, 4, 6), before), function((1, 4, 6), expected))


@pytest.mark.parametrize("keepdims", [False, True])
def test_pooling_is_over_one_axis(keepdims: bool) -> None:
    def before(e, x):
        return e(R.reshape(e(R.mean(x, axis=[1, 2], keepdims=keepdims)), (2, 6)))

    def expected(e, x):
        return e(R.mean(e(R.reshape(x, (2, 12, 6))), axis=[1]))

    assert_canonical_form(function((2, 3, 4, 6), before), function((2, 3, 4, 6), expected))


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("order", range(3))
def test_gelu_from_erf(divide: bool, order: int) -> None:
    def before(e, x):
        root = math.sqrt(2)
        t = e(R.divide(x, const(root)) if divide else R.multiply(x, const(1 / root)))
        gate = e(R.add(const(1.0), e(R.erf(t))))
        half = const(0.5)
        if order == 0:
            return e(R.multiply(e(R.multiply(x, gate)), half))
        if order == 1:
            return e(R.multiply(e(R.multiply(half, x)), gate))
        return e(R.multiply(x, e(R.multiply(gate, half))))

    assert_canonical_form(function((2, 6), before), function((2, 6), lambda e, x: e(R.nn.gelu(x))))


@pytest.mark.parametrize("square", ["power", "multiply"])
def test_layer_norm_from_its_parts(square: str) -> None:
    gamma, beta = array(6), array(6, seed=1)

    def before(e, x):
        centred = e(R.subtract(x, e(R.mean(x, axis=[-1], keepdims=True))))
        squared = (
            R.power(centred, const(2.0)) if square == "power" else R.multiply(centred, centred)
        )
        variance = e(R.mean(e(squared), axis=[-1], keepdims=True))
        root = e(R.sqrt(e(R.add(variance, const(1e-5)))))
        return e(R.add(e(R.multiply(e(R.divide(centred, root)), const(gamma))), const(beta)))

    def expected(e, x):
        epsilon = float(np.float32(1e-5))
        return e(R.nn.layer_norm(x, const(gamma), const(beta), axes=[-1], epsilon=epsilon))

    mod = function((2, 4, 6), before)
    assert_canonical_form(mod, function((2, 4, 6), expected))
    x = array(2, 4, 6)
    np.testing.assert_allclose(run(simplified(mod), x), run(mod, x), rtol=1e-4, atol=1e-5)


def test_what_depends_on_constants_only_is_a_constant() -> None:
    """Also where numpy has no such operator: TVM evaluates it."""
    value = array(3, 6)

    def before(e, x):
        hidden = e(R.nn.relu(e(R.matmul(const(value), const(array(6, 6))))))
        return e(R.add(x, e(R.cos(e(R.sort(hidden, axis=1))))))

    def expected(e, x):
        hidden = np.maximum(value @ array(6, 6), 0)
        return e(R.add(x, const(np.cos(np.sort(hidden, axis=1)))))

    mod = simplified(function((3, 6), before))
    x = array(3, 6, seed=5)
    wanted = run(function((3, 6), expected), x)
    np.testing.assert_allclose(run(mod, x), wanted, rtol=1e-4, atol=1e-5)
    assert len(mod["main"].body.blocks[0].bindings) == 1
