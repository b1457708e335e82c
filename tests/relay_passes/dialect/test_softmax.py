"""Integer softmax: compiled code against the reference, bit for bit, and against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.dialect.exponent import METHODS, exponential_design, quotient_design
from relay_passes.dialect.registry import Interval
from relay_passes.dialect.softmax import softmax
from relay_passes.errors import VitqError
from tests.helpers.dialect import compare, extreme, module
from tests.helpers.nonlinear import claims_of, hard_rows, prim_func_facts
from tvm_vitq.reference.interpreter import Interpreter

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
SCALES = st.floats(-18, 6).map(lambda e: 2.0**e)
OUTPUTS = [(2.0**-15, 32767, "int16"), (1 / 255, 255, "uint8"), (1 / 127, 127, "int8")]


def _truth(x: np.ndarray, scale: float) -> np.ndarray:
    logits = scale * (x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    exp = np.exp(logits)
    return exp / exp.sum(axis=-1, keepdims=True)


def _integer(x: np.ndarray, *parameters) -> np.ndarray:
    return Interpreter(module([x], lambda v: softmax(v, *parameters))).evaluate(x)


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(st.data(), st.integers(1, 300), SCALES, st.sampled_from(["int8", "uint8", "int16"]))
def test_compiled_equals_reference(method, data, length, scale, dtype):
    output = data.draw(st.sampled_from(OUTPUTS))
    drawn = data.draw(extreme([3, length], dtype))
    x = np.concatenate([hard_rows(length, dtype), drawn])
    mod = module([x], lambda v: softmax(v, scale, *output, method))
    out = compare([x], lambda v: softmax(v, scale, *output, method))
    info = np.iinfo(dtype)
    proved, claims = claims_of(mod, Interval(int(info.min), int(info.max)))
    assert all(claim.holds for claim in claims), [c for c in claims if not c.holds]
    assert out.min() >= proved.lo and out.max() <= proved.hi
    assert out.sum(axis=-1, dtype=np.int64).max() <= proved.row_sum


@pytest.mark.parametrize("method", METHODS)
def test_scheduled_for_this_machine(method):
    x = np.stack([hard_rows(197, "int16", seed) for seed in range(3)])
    compare([x], lambda v: softmax(v, 1 / 40, *OUTPUTS[0], method), native=True)


@pytest.mark.parametrize("length", [1, 2, 4097, 32767])
@pytest.mark.parametrize("output", OUTPUTS, ids=["int16", "uint8", "int8"])
def test_ranges_are_proved_for_any_length(length, output):
    x = np.zeros([1, length], "int16")
    for method in METHODS:
        for scale in (1e-9, 2.0**-12, 0.1, 0.7, 1.0, 7.0, 15.9, 1e6):
            mod = module([x], lambda v, s=scale, m=method: softmax(v, s, *output, m))
            _, claims = claims_of(mod, Interval(-32768, 32767))
            assert all(claim.holds for claim in claims), [c for c in claims if not c.holds]


@pytest.mark.parametrize(
    ("method", "bar"), [("table", 0.003), ("poly", 0.004), ("shift", 0.07)], ids=METHODS[::-1]
)
@pytest.mark.parametrize("scale", [1 / 1000, 1 / 64, 1 / 25, 1 / 5, 1 / 2])
def test_row_error_against_float64(method, bar, scale):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal([200, 197]) * np.repeat([0.05, 0.5, 2.0, 6.0], 50)[:, None]
    x = np.clip(np.round(rows / scale), -32767, 32767).astype("int16")
    error = _integer(x, scale, *OUTPUTS[0], method) * 2.0**-15 - _truth(x, scale)
    assert np.abs(error).sum(axis=-1).mean() <= bar


@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_share_evenly_and_a_lone_maximum_takes_all(method):
    x = np.full([2, 197], -32768, "int16")
    x[1, 5] = 32767
    out = _integer(x, 0.05, *OUTPUTS[0], method)
    assert set(out[0]) == {round(2**15 / 197)}
    np.testing.assert_array_equal(out[1], np.where(np.arange(197) == 5, 32767, 0))


@pytest.mark.parametrize("method", METHODS)
def test_thousands_of_far_entries_weigh_nothing(method):
    x = np.full([1, 4096], 0, "int16")
    x[0, 0] = 2000  # 20 real units above the rest
    out = _integer(x, 0.01, *OUTPUTS[0], method)
    assert out[0, 0] >= 32760 and not out[0, 1:].any()


@pytest.mark.parametrize("method", METHODS)
def test_one_division_a_row_and_no_float(method):
    x = np.zeros([2, 3, 197], "int16")
    mod = module([x], lambda v: softmax(v, 0.02, *OUTPUTS[0], method))
    assert prim_func_facts(mod) == ({"row_factor": 1}, 0)


def test_the_reciprocal_of_the_shift_family_is_exact():
    for scale in (2.0**-20, 0.0009, 0.013, 0.3, 1.0, 2.2, 15.0):
        design = quotient_design(scale)
        assert 511 <= design["one"] <= 1024
        n = np.arange(18 * design["one"] + 1)
        np.testing.assert_array_equal(n * design["reciprocal"] >> 25, n // design["one"])


@pytest.mark.parametrize("method", ["poly", "table"])
def test_scaled_differences_keep_sixteen_bits(method):
    """The last difference of any scale reaches 2**-16, so that what lies beyond rounds to 0."""
    for scale in (2.0**-18, 1e-3, 1 / 1500, 0.0104, 0.05, 0.1, 0.7, 1.0, 2.2, 7.7, 15.9, 1e6):
        _, scalars = exponential_design(method, scale, 65535)
        diff_max, lift, mult = (int(v) for v in scalars)
        assert diff_max * lift < 2**16
        slope = min(scale, 16.0) * math.log2(math.e) * 2**11
        assert abs(lift * mult / 2**16 / slope - 1) < 2.0**-15 or diff_max == 65535
        far = _integer(np.array([[32767, -32768]], "int16"), scale, *OUTPUTS[0], method)[0]
        assert far[1] == 0 or slope * 65535 < 2**15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_scale": 0.0}, "in_scale"),
        ({"in_scale": float("nan")}, "in_scale"),
        ({"out_scale": 2.0**-16}, "out_scale"),
        ({"method": "magic"}, "magic"),
        ({"x": relax.Var("x", relax.TensorType([2, 8], "int32"))}, "int32"),
        ({"x": relax.Var("x", relax.TensorType([2, 40000], "int16"))}, "32767"),
    ],
)
def test_what_cannot_be_proved_is_refused(change, message):
    arguments = {
        "x": relax.Var("x", relax.TensorType([2, 8], "int16")),
        "in_scale": 0.1,
        "out_scale": 2.0**-15,
        "qmax": 32767,
        "out_dtype": "int16",
        "method": "poly",
    }
    with pytest.raises(VitqError, match=message):
        softmax(**{**arguments, **change})
