"""ONNX models with QuantizeLinear/DequantizeLinear from onnxruntime's static quantization."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from tvm import relax

from relay_passes.canonicalize import check_canonical
from tests.frontend import zoo
from tvm_vitq import load_model
from tvm_vitq.reference.float_interpreter import run_float

CASES = {
    "uint8": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8},
    "int8-per-channel": {
        "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    },
}


class _Images(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.name = name
        self.left = iter(images(16))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.left, None)
        return None if image is None else {self.name: image[None]}


def images(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, 32, 32)).astype("float32")


@pytest.fixture(scope="module", params=["onnx", "legacy17"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.export(zoo.tiny_vit(), request.param, tmp_path_factory.mktemp("float"))


def quantized(path: Path, folder: Path, case: str) -> Path:
    out = folder / "qdq.onnx"
    name = onnx.load(path).graph.input[0].name
    quantize_static(path, out, _Images(name), quant_format=QuantFormat.QDQ, **CASES[case])
    return out


def operators(mod: tvm.IRModule) -> collections.Counter[str]:
    bindings = mod["main"].body.blocks[0].bindings
    return collections.Counter(b.value.op.name.removeprefix("relax.") for b in bindings)


def run_onnx(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in x])


@pytest.mark.parametrize("case", CASES)
def test_structure_is_that_of_the_float_model(exported: Path, case: str, tmp_path: Path) -> None:
    """The same compute; a pair at every site, weights as codes, nothing else quantized."""
    mod = load_model(quantized(exported, tmp_path, case))
    check_canonical(mod)
    expected, got = operators(load_model(exported)), operators(mod)
    pairs, weights = got.pop("quantize"), got.pop("dequantize")
    assert got == expected
    linears = 8  # patches, q, k, v, proj, fc1, fc2, head
    assert weights - pairs == linears
    # input, class token, patches + positions, two LayerNorms and the last, q, k, v, logits,
    # softmax, p @ v, two residuals, fc1, gelu, head
    assert pairs == 17


@pytest.mark.parametrize("case", CASES)
def test_scales_and_codes_are_the_file_s(exported: Path, case: str, tmp_path: Path) -> None:
    path = quantized(exported, tmp_path, case)
    tensors = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    scales = {v.item() for k, v in tensors.items() if k.endswith("_scale") and v.size == 1}
    codes = {v.T.tobytes() for v in tensors.values() if v.dtype == np.int8 and v.ndim == 2}
    codes |= {v.tobytes() for v in tensors.values() if v.dtype == np.int8 and v.ndim == 2}
    found = 0
    for binding in load_model(path)["main"].body.blocks[0].bindings:
        call = binding.value
        if call.op.name == "relax.quantize":
            assert float(call.args[1].value.numpy()) in scales
        if call.op.name == "relax.dequantize" and not isinstance(call.args[0], relax.Var):
            found += call.args[0].value.numpy().tobytes() in codes
    assert found == 4  # proj, fc1, fc2, head; q, k, v are parts and the patches a convolution


@pytest.mark.parametrize("case", CASES)
def test_accuracy_is_that_of_the_file(exported: Path, case: str, tmp_path: Path) -> None:
    """Fewer roundings than onnxruntime's graph: no farther from the float model than it is."""
    path = quantized(exported, tmp_path, case)
    x = images(32, seed=9)
    exact = run_onnx(exported, x)
    theirs = run_onnx(path, x)
    ours = np.asarray(run_float(load_model(path), torch.from_numpy(x)))
    error = np.square(ours - exact).mean() ** 0.5
    assert error <= 1.1 * np.square(theirs - exact).mean() ** 0.5
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
