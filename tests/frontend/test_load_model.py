"""What load_model accepts and what it says about the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from safetensors.torch import save_file

from relay_passes.errors import VitqError
from tests.frontend import zoo
from tvm_vitq import load_model
from tvm_vitq.reference.float_interpreter import run_float

FACTORY = "tests.frontend.zoo:tiny_vit"


def info(mod: tvm.IRModule) -> dict[str, Any]:
    return json.loads(str(mod.attrs["vitq.model"]))


def rejected(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(VitqError) as caught:
        load_model(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


# ---------------------------------------------------------------- sources
def test_timm_name_brings_its_data_configuration() -> None:
    model = info(load_model("vit_tiny_patch16_224", arguments={"depth": 1, "num_classes": 7}))
    assert model["source"] == model["name"] == "vit_tiny_patch16_224"
    assert model["num_classes"] == 7
    assert model["input"] == {"layout": "NCHW", "dtype": "float32", "shape": [1, 3, 224, 224]}
    assert model["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert model["preprocess"]["crop_pct"] == 0.9
    assert model["preprocess"]["interpolation"] == "bicubic"
    assert model["factory"]["arguments"] == {"depth": 1, "num_classes": 7}


def test_image_size_of_the_architecture_counts() -> None:
    arguments = {"depth": 1, "img_size": 96}
    model = info(load_model("vit_tiny_patch16_224", arguments=arguments))
    assert model["preprocess"]["input_size"] == [3, 96, 96]


def test_factory_with_and_without_arguments() -> None:
    one = load_model(FACTORY)
    two = load_model(FACTORY + '?{"depth": 2}')
    also = load_model(FACTORY, arguments={"depth": 2})
    tvm.ir.assert_structural_equal(two["main"], also["main"])
    count = [len(m["main"].body.blocks[0].bindings) for m in (one, two)]
    assert count[1] > count[0] * 1.5
    assert info(one)["factory"]["kind"] == "factory"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vit_tiny_patch16_223", "unknown model 'vit_tiny_patch16_223'.*did you mean vit_tiny_pa"),
        ("no.such.module:f", "no factory 'no.such.module:f'"),
        ("tests.frontend.zoo:nothing", "no factory .*nothing"),
        ("tests.frontend.zoo:not_a_model", "returned int; a torch.nn.Module is needed"),
        ("tests.frontend.zoo:failing", "failed: no luck"),
        (FACTORY + "?depth=2", "not a JSON object"),
        ("missing.onnx", "no such file"),
        ("missing.pt2", "no such file"),
        (3, "not int"),
        ("resnet18", "operator nn.batch_norm near bn1 is not supported"),
    ],
)
def test_bad_source(source: Any, message: str) -> None:
    import re

    text = rejected(source)
    assert re.search(message, text), text


def test_timm_rejects_arguments() -> None:
    assert "timm cannot build" in rejected("vit_tiny_patch16_224", arguments={"depht": 2})


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "nested.pth", "prefixed.pth"])
def test_checkpoint(suffix: str, tmp_path: Path) -> None:
    model = zoo.randomised(zoo.tiny_vit(), seed=7)
    path = tmp_path / f"w.{suffix}"
    state = model.state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "nested.pth":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif suffix == "prefixed.pth":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    mod = load_model(FACTORY, checkpoint=path)
    tvm.ir.assert_structural_equal(mod["main"], load_model(model)["main"])
    assert info(mod)["factory"]["checkpoint"] == str(path)


def changed(tmp_path: Path, change: Any) -> Path:
    state = dict(zoo.tiny_vit().state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "1 missing (head.bias)"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "1 unexpected (extra.weight)"),
        (
            lambda s: s.update({"head.weight": torch.zeros(5, 48)}),
            "1 of another shape (head.weight [5, 48] for [10, 48])",
        ),
        (
            lambda s: s.update({"norm.bias": torch.full((48,), float("nan"))}),
            "norm.bias holds 48 NaN or Inf of 48 values",
        ),
    ],
)
def test_checkpoint_that_does_not_match(change: Any, message: str, tmp_path: Path) -> None:
    assert message in rejected(FACTORY, checkpoint=changed(tmp_path, change))


def test_checkpoint_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such checkpoint" in rejected(FACTORY, checkpoint=tmp_path / "none.pth")
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        assert "cannot be read" in rejected(FACTORY, checkpoint=tmp_path / name)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "no state dict" in rejected(FACTORY, checkpoint=tmp_path / "list.pth")


def test_nan_weights() -> None:
    text = rejected(FACTORY, arguments={"bad": True})
    assert "blocks.0.mlp.fc1.weight hold 1 NaN or Inf" in text


# ---------------------------------------------------------------- options
def test_flags_replace_the_configuration() -> None:
    mod = load_model(FACTORY, mean=[0.1, 0.2, 0.3], std=0.5, crop_pct=1.0, name="mine")
    spec = info(mod)["preprocess"]
    assert (spec["mean"], spec["std"], spec["crop_pct"]) == ([0.1, 0.2, 0.3], [0.5] * 3, 1.0)
    assert info(mod)["name"] == "mine"


def test_labels() -> None:
    names = [f"digit {i}" for i in range(10)]
    assert info(load_model(FACTORY, labels=names))["labels"] == names
    assert "3 labels for a model with 10 classes" in rejected(FACTORY, labels=names[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "int8"}, "input must be"),
        ({"batch": 0}, "batch must be a positive integer"),
        ({"means": [0.5]}, "unknown preprocessing ['means']"),
        ({"std": [0.0, 1.0, 1.0]}, "std must be positive"),
        ({"mean": [0.0, 1.0]}, "mean needs 3"),
        ({"input_size": [3, 64, 64]}, "cannot be traced"),
    ],
)
def test_bad_option(options: dict[str, Any], message: str) -> None:
    assert message in rejected(FACTORY, **options)


def test_files_have_no_preprocessing_of_their_own(tmp_path: Path) -> None:
    path = zoo.export(zoo.tiny_vit(), "pt2", tmp_path)
    assert info(load_model(path))["preprocess"] is None
    spec = info(load_model(path, mean=0.5, std=0.5))["preprocess"]
    assert spec["input_size"] == [3, 32, 32]
    assert "give mean and std" in rejected(path, input="uint8")
    assert "carries its own weights" in rejected(path, checkpoint="w.pth")
    assert "input_size [3, 8, 8] is not the model's" in rejected(path, input_size=[3, 8, 8])


@pytest.mark.parametrize("key", ["vit", "swin", "swin-padded"])
def test_raw_pixels(key: str) -> None:
    model = zoo.randomised(zoo.MODELS[key]())
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    mod = load_model(model, input="uint8", mean=list(mean), std=list(std))
    _, _, height, width = zoo.image_shape(model)
    assert info(mod)["input"] == {
        "layout": "NHWC",
        "dtype": "uint8",
        "shape": [1, height, width, 3],
    }
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3)).astype("uint8")
    x = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype("float32")
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    got = np.asarray(run_float(mod, torch.from_numpy(pixels)))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_bindings_carry_the_names_of_the_modules() -> None:
    names = {b.var.name for b in load_model(FACTORY)["main"].body.blocks[0].bindings}
    assert {"patch_embed_proj", "blocks_0_norm1", "blocks_0_attn_q", "blocks_0_mlp_fc2"} <= names
