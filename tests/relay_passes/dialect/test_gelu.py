"""Integer GELU: compiled code against the reference, bit for bit, and against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.dialect.exponent import METHODS
from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.registry import Interval
from relay_passes.errors import VitqError
from tests.helpers.dialect import compare, extreme, module
from tests.helpers.nonlinear import claims_of, hard_rows, operator_call, prim_func_facts
from tvm_vitq.reference.interpreter import Interpreter

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
SCALES = st.floats(-18, 4).map(lambda e: 2.0**e)


def _truth(value: np.ndarray) -> np.ndarray:
    return value * 0.5 * (1 + np.vectorize(math.erf)(value / math.sqrt(2)))


def _all_codes(dtype: str) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.arange(info.min, info.max + 1).astype(dtype).reshape(-1, 64)


def _outputs(top: float, dtype: str) -> tuple[float, int, int, int, str]:
    """Return (scale, zero point, qmin, qmax, dtype) that a calibration to [-0.17, top] gives."""
    if dtype == "int8":
        scale = (top + 0.17) / 255
        return scale, -128 + round(0.17 / scale), -128, 127, dtype
    return top / 32767, 0, -32767, 32767, dtype


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(st.data(), SCALES, st.sampled_from(["int8", "uint8", "int16"]), st.booleans())
def test_compiled_equals_reference(method, data, scale, dtype, per_channel):
    info = np.iinfo(dtype)
    zero = data.draw(st.sampled_from([0, 3, int(info.min), int(info.max)])) if info.bits == 8 else 0
    length = data.draw(st.integers(1, 70))
    x = np.concatenate([hard_rows(length, dtype), data.draw(extreme([2, length], dtype))])
    gains = np.exp(np.random.default_rng(length).standard_normal(length)) if per_channel else None
    top = data.draw(st.floats(0.05, 2)) * scale * int(info.max)
    output = _outputs(min(top, 30.0), data.draw(st.sampled_from(["int8", "int16"])))

    def body(v):
        return gelu(v, scale, zero, *output, method, gains)

    out = compare([x], body)
    proved, claims = claims_of(module([x], body), Interval(int(info.min), int(info.max)))
    assert all(claim.holds for claim in claims), [c for c in claims if not c.holds]
    assert out.min() >= proved.lo and out.max() <= proved.hi


@pytest.mark.parametrize("gains", [None, np.linspace(0.1, 3, 64)], ids=["plain", "channels"])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_code_compiled_and_scheduled(method, dtype, gains):
    x = _all_codes(dtype)
    scale = 8.0 / int(np.iinfo(dtype).max)
    output = _outputs(6.0, "int8")
    compare([x], lambda v: gelu(v, scale, 0, *output, method, gains), native=True)


@pytest.mark.parametrize("gains", [None, np.geomspace(0.2, 4, 64)], ids=["plain", "channels"])
@pytest.mark.parametrize("top", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(
    ("dtype", "scale"), [("int8", 0.02), ("int8", 0.08), ("int16", 2.0**-12), ("int16", 2.0**-9)]
)
@pytest.mark.parametrize("method", METHODS)
def test_error_against_float64(method, dtype, scale, top, gains):
    """Table and poly: within one code of int8; shift: within 0.03 (times the gain)."""
    x = _all_codes(dtype)
    out_scale, zero, qmin, qmax, out = _outputs(top, "int8")
    body = module([x], lambda v: gelu(v, scale, 0, out_scale, zero, qmin, qmax, out, method, gains))
    gain = 1.0 if gains is None else gains
    exact = np.clip(_truth(x * scale) * gain / out_scale + zero, qmin, qmax)
    error = np.abs(Interpreter(body).evaluate(x) - exact)
    slack = 0.03 * np.max(gain) / out_scale if method == "shift" else 0.5
    assert error.max() <= 0.5 + slack


@pytest.mark.parametrize(("method", "bar"), [("table", 6e-4), ("poly", 7e-4), ("shift", 0.03)])
def test_error_at_int16_output(method, bar):
    x, scale = _all_codes("int16"), 2.0**-12
    out_scale, *output = _outputs(8.0, "int16")
    mod = module([x], lambda v: gelu(v, scale, 0, out_scale, *output, method))
    real = Interpreter(mod).evaluate(x).astype(np.float64) * out_scale
    assert np.abs(real - _truth(x * scale)).max() <= bar


def test_a_large_row_maximum_does_no_harm():
    """ShiftGELU of the literature takes a row maximum and breaks once it passes 9.4."""
    x = np.array([[32767, 1024, -1024, 0, -32767]], "int16")  # 128, 4, -4 at 2**-8
    mod = module([x], lambda v: gelu(v, 2.0**-8, 0, 2.0**-8, 0, -32767, 32767, "int16", "shift"))
    np.testing.assert_allclose(
        Interpreter(mod).evaluate(x) * 2.0**-8, [[128, 4, 0, 0, 0]], atol=0.01
    )


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("method", METHODS)
def test_no_division_and_no_float(method, dtype):
    x = np.zeros([2, 3, 64], dtype)
    mod = module([x], lambda v: gelu(v, 0.01, 0, *_outputs(6.0, "int8"), method))
    assert prim_func_facts(mod) == ({}, 0)


def test_eight_bits_are_one_lookup():
    x = _all_codes("int8")
    output = _outputs(6.0, "int8")
    node = operator_call(module([x], lambda v: gelu(v, 0.05, -7, *output, "table")))
    assert node.attrs["form"] == "codes" and len(node.args) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_scale": -1.0}, "in_scale"),
        ({"out_scale": float("inf")}, "out_scale"),
        ({"out_scale": 1e-12}, "out"),
        ({"method": "exact"}, "exact"),
        ({"channel_scale": np.ones(5)}, "channel_scale"),
        ({"channel_scale": np.full(8, np.nan)}, "channel_scale"),
    ],
)
def test_what_cannot_be_held_is_refused(change, message):
    arguments = {
        "x": relax.Var("x", relax.TensorType([2, 8], "int16")),
        "in_scale": 0.01,
        "in_zp": 0,
        "out_scale": 0.03,
        "out_zp": 0,
        "qmin": -127,
        "qmax": 127,
        "out_dtype": "int8",
        "method": "poly",
    }
    with pytest.raises(VitqError, match=message):
        gelu(**{**arguments, **change})
