"""Integer LayerNorm: compiled code against the reference, bit for bit, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.dialect.layer_norm import layer_norm, root_bounds
from relay_passes.dialect.registry import Interval
from relay_passes.errors import VitqError
from tests.helpers.dialect import compare, extreme, module
from tests.helpers.nonlinear import claims_of, hard_rows, prim_func_facts
from tvm_vitq.reference.interpreter import Interpreter
from tvm_vitq.reference.nonlinear import reciprocal_root

FEW = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
OUTPUTS = [(0.03, 5, -128, 127, "int8"), (2.0**-10, 0, -32767, 32767, "int16")]


def _affine(channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (gamma, beta) with a zero, a tiny and a negative gamma and one outlier."""
    rng = np.random.default_rng(seed)
    gamma, beta = 1 + rng.standard_normal(channels), rng.standard_normal(channels)
    gamma[: min(4, channels)] = [0.0, 1e-12, -1.0, 30.0][: min(4, channels)]
    return gamma, beta


@FEW
@given(
    st.data(),
    st.sampled_from([1, 2, 3, 5, 48, 192, 768, 1536]),
    st.sampled_from(["int8", "uint8", "int16"]),
    st.floats(-12, 4),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-5, 1.0]),
    st.sampled_from(OUTPUTS),
)
def test_compiled_equals_reference(data, channels, dtype, log_scale, eps, output):
    x = np.concatenate([hard_rows(channels, dtype), data.draw(extreme([2, channels], dtype))])
    affine = _affine(channels)

    def body(v):
        return layer_norm(v, 2.0**log_scale, *affine, eps, *output)

    out = compare([x], body)
    info = np.iinfo(dtype)
    proved, claims = claims_of(module([x], body), Interval(int(info.min), int(info.max)))
    assert all(claim.holds for claim in claims), [c for c in claims if not c.holds]
    assert out.min() >= proved.lo and out.max() <= proved.hi


@pytest.mark.parametrize("channels", [48, 192])
def test_scheduled_for_this_machine(channels):
    x = np.stack([hard_rows(channels, "int16", seed) for seed in range(3)])
    gamma, beta = _affine(channels)
    compare([x], lambda v: layer_norm(v, 0.004, gamma, beta, 1e-6, *OUTPUTS[0]), native=True)


@pytest.mark.parametrize("output", OUTPUTS, ids=["int8", "int16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 48, 192, 768, 1536, 4096])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_error_against_float64(channels, dtype, output):
    x = np.concatenate([hard_rows(channels, dtype, seed) for seed in range(4)])
    gamma, beta = _affine(channels)
    scale, eps = 1 / 128, 1e-6
    mod = module([x], lambda v: layer_norm(v, scale, gamma, beta, eps, *output))
    real = x.astype(np.float64) * scale
    centred = real - real.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(real.var(axis=-1, keepdims=True) + eps)
    out_scale, zero, qmin, qmax, _ = output
    exact = np.clip((normal * gamma + beta) / out_scale + zero, qmin, qmax)
    error = np.abs(Interpreter(mod).evaluate(x) - exact)
    assert np.all(error <= 0.51 + np.abs(normal * gamma / out_scale) * 2.0**-10)
    assert error.max() <= 0.6


def test_equal_codes_give_beta():
    x = np.stack([np.full(192, v) for v in (-32768, 0, 32767)]).astype("int16")
    gamma, beta = _affine(192)
    mod = module([x], lambda v: layer_norm(v, 0.01, gamma, beta, 1e-6, *OUTPUTS[0]))
    expected = np.clip(np.floor(beta / 0.03 + 5 + 0.5), -128, 127)
    np.testing.assert_array_equal(Interpreter(mod).evaluate(x), np.tile(expected, (3, 1)))


def test_epsilon_counts_where_the_variance_is_small():
    x = np.array([[0, 1, 0, 1]], "int16")
    ones, zeros = np.ones(4), np.zeros(4)
    mod = module(
        [x], lambda v: layer_norm(v, 1e-3, ones, zeros, 1e-6, 2.0**-12, 0, -32767, 32767, "int16")
    )
    exact = 0.5e-3 / np.sqrt(0.25e-6 + 1e-6) * 2.0**12
    np.testing.assert_allclose(
        Interpreter(mod).evaluate(x), exact * np.array([[-1, 1, -1, 1]]), atol=0.51
    )


def test_the_root_keeps_its_bounds_and_its_accuracy():
    rng = np.random.default_rng(0)
    v = np.concatenate([2**28 + np.arange(1000), 2**30 - 1 - np.arange(1000)])
    v = np.concatenate([v, rng.integers(2**28, 2**30, 200_000)])
    root = reciprocal_root(v)
    low, high = root_bounds()["root"]
    assert low <= root.min() and root.max() <= high < 2**32
    assert np.abs(root * 2.0**-30 * np.sqrt(v * 2.0**-30) - 1).max() <= 2.0**-25


def test_no_division_and_no_float():
    x = np.zeros([2, 3, 192], "int16")
    gamma, beta = _affine(192)
    mod = module([x], lambda v: layer_norm(v, 0.01, gamma, beta, 1e-6, *OUTPUTS[0]))
    assert prim_func_facts(mod) == ({}, 0)


def test_the_range_proof_fails_for_codes_past_the_design():
    x = np.zeros([1, 1536], "int16")
    gamma, beta = _affine(1536)
    mod = module([x], lambda v: layer_norm(v, 0.01, gamma, beta, 1e-6, *OUTPUTS[0]))
    _, claims = claims_of(mod, Interval(-(2**20), 2**20))
    assert not all(claim.holds for claim in claims)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_scale": 0.0}, "in_scale"),
        ({"in_scale": 1e-12}, "variance"),
        ({"eps": -1.0}, "eps"),
        ({"gamma": np.full(8, np.inf)}, "finite"),
        ({"gamma": np.ones(7)}, "7"),
        ({"out_scale": 1e-9}, "gamma/out_scale"),
        ({"x": relax.Var("x", relax.TensorType([2, 40000], "int16"))}, "32767"),
    ],
)
def test_what_cannot_be_held_is_refused(change, message):
    arguments = {
        "x": relax.Var("x", relax.TensorType([2, 8], "int16")),
        "in_scale": 0.01,
        "gamma": np.ones(8),
        "beta": np.zeros(8),
        "eps": 1e-6,
        "out_scale": 0.03,
        "out_zp": 0,
        "qmin": -128,
        "qmax": 127,
        "out_dtype": "int8",
    }
    with pytest.raises(VitqError, match=message):
        layer_norm(**{**arguments, **change})
