"""Truncated, foreign and unsupported .pt2 and .onnx files: one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from relay_passes.errors import VitqError
from tests.frontend import zoo
from tvm_vitq import load_model


def rejected(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(VitqError) as caught:
        load_model(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {way: zoo.export(zoo.tiny_vit(), way, folder) for way in ("pt2", "onnx", "legacy17")}


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("way", ["pt2", "legacy17"])
def test_truncated(way: str, keep: float, files: dict[str, Path], tmp_path: Path) -> None:
    data = files[way].read_bytes()
    path = tmp_path / files[way].name
    path.write_bytes(data[: int(len(data) * keep)])
    assert "truncated" in rejected(path)


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_foreign(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("this is no model\n" * 100, encoding="utf-8")
    assert "truncated" in rejected(path)


def test_pickled_module_is_no_pt2(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.save(zoo.tiny_vit().state_dict(), path)
    assert "torch.export.save" in rejected(path)


def test_external_data_is_missing(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "alone.onnx"
    path.write_bytes(files["onnx"].read_bytes())
    assert "alone.onnx" in rejected(path)


@pytest.mark.parametrize("way", ["pt2", "onnx"])
def test_other_batch(way: str, files: dict[str, Path]) -> None:
    assert "was exported for batch 1, not 4" in rejected(files[way], batch=4)


def graph(
    nodes: list[onnx.NodeProto], shape: list[Any], weights: dict[str, Any]
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )


def save(model: onnx.ModelProto, tmp_path: Path) -> Path:
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


FLAT = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
W = {"w": np.ones((12, 4), "float32")}


def test_smallest_onnx_model(tmp_path: Path) -> None:
    load_model(save(graph(FLAT, [1, 3, 2, 2], W), tmp_path))


def test_operator_set(tmp_path: Path) -> None:
    model = graph(FLAT, [1, 3, 2, 2], W)
    model.opset_import[0].version = 9
    assert "operator set 9; 13 to 23 are supported" in rejected(save(model, tmp_path))


def test_dynamic_image_size(tmp_path: Path) -> None:
    text = rejected(save(graph(FLAT, ["b", 3, "h", "w"], W), tmp_path))
    assert "dynamic height h" in text


def test_unknown_operator(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["y"], name="/blocks/blocks.0/attn/Mystery")]
    text = rejected(save(graph(nodes, [1, 3, 2, 2], {}), tmp_path))
    assert "operator Mystery in blocks.0.attn of m.onnx is not supported" in text


def test_quantized_operators_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("QLinearMatMul", ["x"] * 8, ["y"], name="q")]
    text = rejected(save(graph(nodes, [1, 3, 2, 2], {}), tmp_path))
    assert "operator QLinearMatMul" in text and "QDQ" in text


def test_unsupported_activation(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "mlp.fc1.weight"], ["h"]),
        helper.make_node("HardSwish", ["h"], ["y"]),
    ]
    path = save(graph(nodes, [1, 3, 2, 2], {"mlp.fc1.weight": W["w"]}), tmp_path)
    assert "near mlp.fc1" in rejected(path)


def test_nan_in_onnx(tmp_path: Path) -> None:
    bad = W["w"].copy()
    bad[0, 0] = np.nan
    text = rejected(save(graph(FLAT, [1, 3, 2, 2], {"w": bad}), tmp_path))
    assert "hold 1 NaN or Inf of 48 values" in text


def test_two_inputs(tmp_path: Path) -> None:
    model = graph(FLAT, [1, 3, 2, 2], W)
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    assert "inputs ['x', 'z']" in rejected(save(model, tmp_path))


def test_half_precision_onnx(tmp_path: Path) -> None:
    model = graph(FLAT, [1, 3, 2, 2], {"w": W["w"].astype("float16")})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert "float32" in rejected(save(model, tmp_path))
