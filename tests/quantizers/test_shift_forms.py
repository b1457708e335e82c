"""The shift family in real arithmetic against the integer operators that it stands for."""

from __future__ import annotations

import numpy as np
import torch

from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.softmax import softmax
from tests.helpers.dialect import module
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.shift_forms import shift_gelu, shift_operators, shift_softmax
from tvm_vitq.reference.interpreter import Interpreter


def test_gelu_is_the_integer_operator_without_its_rounding():
    x = np.arange(-32767, 32768, 37, dtype="int16")
    scale, out = 8 / 32767, 1e-3
    mod = module([x], lambda v: gelu(v, scale, 0, out, 0, -32767, 32767, "int16", "shift", None))
    codes = Interpreter(mod).evaluate(x)
    real = shift_gelu(torch.from_numpy(x.astype("float32") * scale)).numpy()
    assert np.abs(codes * out - real).max() < 4e-3
    exact = torch.nn.functional.gelu(torch.from_numpy(x.astype("float32") * scale)).numpy()
    assert np.abs(real - exact).max() > 1e-2  # what calibration has to know of


def test_softmax_is_the_integer_operator_without_its_rounding():
    x = np.random.default_rng(0).integers(-300, 300, (8, 197)).astype("int16")
    mod = module([x], lambda v: softmax(v, 1 / 64, 2**-15, 32767, "int16", "shift"))
    codes = Interpreter(mod).evaluate(x)
    real = shift_softmax(torch.from_numpy(x / np.float32(64))).numpy()
    assert np.abs(codes * 2.0**-15 - real).sum(-1).max() < 0.01


def test_only_the_shift_family_is_replaced():
    assert not shift_operators(Recipe()) and not shift_operators(Recipe(nonlinear="table"))
    assert "nn.softmax" in shift_operators(Recipe(nonlinear={"softmax": "shift"}))
    assert "nn.gelu" not in shift_operators(Recipe(nonlinear={"softmax": "shift"}))
