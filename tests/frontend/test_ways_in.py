"""One canonical form: the same model through torch, torch.export and ONNX, and equal to torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import tvm

from relay_passes.canonicalize import check_canonical
from tests.frontend import zoo
from tvm_vitq import load_model
from tvm_vitq.reference.float_interpreter import run_float

NAMES = {
    "vit_small_patch16_224": {"depth": 1},
    "vit_base_patch32_224": {"depth": 1},
    "deit_small_distilled_patch16_224": {"depth": 1},
    "deit3_small_patch16_224": {"depth": 1},
    "vit_small_patch14_dinov2": {"depth": 1, "img_size": 224},
    "vit_small_patch14_reg4_dinov2": {"depth": 1, "img_size": 98, "num_classes": 10},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2, 1, 1)},
}


def relative_error(mod: tvm.IRModule, model: torch.nn.Module, seed: int = 0) -> float:
    shape = [int(d) for d in mod["main"].params[0].ty.shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(x).numpy()
    got = np.asarray(run_float(mod, x))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def assert_same(first: tvm.IRModule, second: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(
        first["main"].without_attr("global_symbol"), second["main"].without_attr("global_symbol")
    )


@pytest.mark.parametrize("name", NAMES)
def test_timm_model_equals_torch(name: str) -> None:
    model = zoo.randomised(timm.create_model(name, **NAMES[name]))
    mod = load_model(model)
    check_canonical(mod)
    assert relative_error(mod, model) < 1e-4


@pytest.mark.parametrize(
    ("key", "batch"),
    [*((key, 1) for key in zoo.MODELS), ("distilled", 2), ("average-fc-norm", 2), ("swin", 2)],
)
def test_tiny_model_equals_torch(key: str, batch: int) -> None:
    model = zoo.randomised(zoo.MODELS[key]())
    mod = load_model(model, batch=batch)
    check_canonical(mod)
    assert int(mod["main"].params[0].ty.shape[0]) == batch
    assert relative_error(mod, model) < 1e-4


@pytest.mark.parametrize("key", zoo.MODELS)
def test_torch_export_gives_the_same_module(key: str, tmp_path: Path) -> None:
    """With fused attention where timm uses it, which the timm front end switches off."""
    model = zoo.randomised(zoo.MODELS[key]())
    path = zoo.export(model, "pt2", tmp_path)
    assert_same(load_model(model), load_model(path))


@pytest.mark.parametrize("key", [k for k in zoo.MODELS if k != "swin-fused"])
def test_onnx_gives_the_same_module(key: str, tmp_path: Path) -> None:
    model = zoo.randomised(zoo.MODELS[key]())
    path = zoo.export(model, "onnx", tmp_path)
    assert_same(load_model(model), load_model(path))


@pytest.mark.parametrize(
    ("key", "opset"),
    [
        ("vit", 14),
        ("distilled", 17),
        ("swin", 17),
        pytest.param("qk-norm", 14, marks=pytest.mark.slow),
        pytest.param("swin-padded", 14, marks=pytest.mark.slow),
    ],
)
def test_old_onnx_exporter_gives_the_same_module(key: str, opset: int, tmp_path: Path) -> None:
    """Decomposed LayerNorm and GELU, shapes computed at run time."""
    model = zoo.randomised(zoo.MODELS[key]())
    path = zoo.export(model, f"legacy{opset}", tmp_path)
    assert_same(load_model(model), load_model(path))


@pytest.mark.parametrize("way", ["pt2-dynamic", "onnx-dynamic"])
@pytest.mark.parametrize("key", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_dynamic_batch_is_fixed(key: str, way: str, tmp_path: Path) -> None:
    model = zoo.randomised(zoo.MODELS[key]())
    path = zoo.export(model, way, tmp_path)
    assert_same(load_model(model, batch=3), load_model(path, batch=3))
    assert int(load_model(path)["main"].params[0].ty.shape[0]) == 1


@pytest.mark.parametrize("way", ["pt2", "onnx"])
def test_batch_of_the_file(way: str, tmp_path: Path) -> None:
    model = zoo.randomised(zoo.MODELS["vit"]())
    path = zoo.export(model, way, tmp_path, batch=2)
    assert_same(load_model(model, batch=2), load_model(path))


def test_module_is_left_as_it_was() -> None:
    model = zoo.randomised(zoo.MODELS["vit"]()).train()
    load_model(model)
    assert model.training
    assert all(block.attn.fused_attn for block in model.blocks)


def test_half_precision_weights_are_widened() -> None:
    model = zoo.randomised(zoo.MODELS["vit"]())
    narrow = zoo.randomised(zoo.MODELS["vit"]()).half()
    assert relative_error(load_model(narrow), model) < 1e-2
    assert next(narrow.parameters()).dtype == torch.float16


@pytest.mark.data
def test_real_deit(data_dir: Path) -> None:
    from safetensors.torch import load_file

    weights = data_dir / "weights/deit_tiny_patch16_224.safetensors"
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(weights))
    mod = load_model("deit_tiny_patch16_224", checkpoint=weights)
    assert relative_error(mod, model) < 1e-4


@pytest.mark.data
def test_real_swin(data_dir: Path) -> None:
    import json

    from safetensors.torch import load_file
    from timm.models.swin_transformer import SwinTransformer

    spec = json.loads((data_dir / "weights/swin_micro_cifar10.json").read_text(encoding="utf-8"))
    weights = data_dir / "weights/swin_micro_cifar10.safetensors"
    model = SwinTransformer(**spec["arguments"]).eval()
    model.load_state_dict(load_file(weights))
    mod = load_model(SwinTransformer(**spec["arguments"]), checkpoint=weights)
    assert relative_error(mod, model) < 1e-4
