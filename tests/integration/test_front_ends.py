"""The same model through timm, torch.export and ONNX: one canonical form, the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm

import tvm_vitq
from tests.integration import models
from tvm_vitq import demo

WAYS = ("factory", "pt2", "onnx")


def export(model: torch.nn.Module, shape: tuple[int, ...], folder: Path) -> dict[str, str]:
    """Write ``model`` as model.pt2 and model.onnx; return what load_model takes for each."""
    x = (torch.zeros(shape),)
    torch.export.save(torch.export.export(model, x), folder / "model.pt2")
    torch.onnx.export(model, x, folder / "model.onnx", dynamo=True, verbose=False)
    return {"pt2": str(folder / "model.pt2"), "onnx": str(folder / "model.onnx")}


def assert_same_function(first: tvm.IRModule, second: tvm.IRModule) -> None:
    """Compare two modules binding by binding, constants included, names and attributes aside."""
    tvm.ir.assert_structural_equal(
        first["main"].without_attr("global_symbol"), second["main"].without_attr("global_symbol")
    )


@pytest.fixture(scope="module")
def digits_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("exported")
    sources = export(demo.digits_vit(), (1, 3, demo.PIXELS, demo.PIXELS), folder)
    return {"factory": "tvm_vitq.demo:digits_vit", **sources}


def test_digits_logits_are_the_same(digits_sources: dict[str, str], tmp_path: Path) -> None:
    calibration = demo.normalise(demo.pixels(demo.digits("calib")[0][:32]))
    x = demo.normalise(demo.pixels(demo.digits("test")[0][:32]))
    logits = {}
    for way in WAYS:
        quantized = tvm_vitq.quantize(tvm_vitq.load_model(digits_sources[way]), calibration)
        artifact = tvm_vitq.compile(quantized, output=tmp_path / f"{way}.so")
        logits[way] = artifact.run(x)
    assert np.array_equal(logits["factory"], logits["pt2"])
    assert np.array_equal(logits["factory"], logits["onnx"])


@pytest.mark.parametrize("way", ["pt2", "onnx"])
def test_digits_canonical_form_is_the_same(digits_sources: dict[str, str], way: str) -> None:
    assert_same_function(
        tvm_vitq.load_model(digits_sources["factory"]), tvm_vitq.load_model(digits_sources[way])
    )


@pytest.mark.data
def test_deit_canonical_form_is_the_same(data_dir: Path, tmp_path: Path) -> None:
    """The quantizer sees nothing but this form, so the logits of all three are the same, too."""
    checkpoint = data_dir / "weights" / f"{models.DEIT}.safetensors"
    canonical = tvm_vitq.load_model(models.DEIT, checkpoint=checkpoint)
    sources = export(models.deit_tiny(data_dir), (1, 3, 224, 224), tmp_path)
    for way in ("pt2", "onnx"):
        assert_same_function(canonical, tvm_vitq.load_model(sources[way]))


@pytest.mark.slow
@pytest.mark.data
def test_deit_logits_are_the_same(deit_built: models.Built, data_dir: Path, tmp_path: Path) -> None:
    sources = export(models.deit_tiny(data_dir), (1, 3, 224, 224), tmp_path)
    spec = deit_built.preprocess()
    images = sorted((data_dir / "images/calib512/img").iterdir())[:32]
    flags = {key: spec[key] for key in ("crop_pct", "interpolation", "mean", "std") if key in spec}
    x, _ = models.labelled(data_dir / "images/nips500", spec, 16)
    expected = deit_built.artifact().run(x)
    for way, source in sources.items():
        folder = tmp_path / way
        folder.mkdir()
        built = models.build(folder, source, images, **flags)
        assert np.array_equal(built.artifact().run(x), expected), way


def test_a_saved_quantized_module_compiles_to_the_same_logits(
    digits_built: models.Built, tmp_path: Path
) -> None:
    """What passes between calibration and lowering is the module alone."""
    again = tvm_vitq.compile(digits_built.quantized(), output=tmp_path / "again.so")
    x = demo.normalise(demo.pixels(demo.digits("test")[0][:16]))
    assert np.array_equal(again.run(x), digits_built.artifact().run(x))
    spec = json.loads(str(digits_built.quantized().attrs["vitq.model"]))
    assert spec["preprocess"]["input_size"] == [3, demo.PIXELS, demo.PIXELS]
