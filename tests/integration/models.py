"""The whole models that the integration tests compile, and how their inputs are made."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tvm
from timm.models.swin_transformer import SwinTransformer

import tvm_vitq
from tvm_vitq.preprocess import preprocess_images

__all__ = ["DEIT", "RANDOM_MODELS", "Built", "build", "build_deit", "build_digits", "deit_tiny",
           "labelled", "swin_micro"]

DEIT = "deit_tiny_patch16_224"

RANDOM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_base_patch32": ("vit_base_patch32_224", {}),
    "deit_small_distilled": ("deit_small_distilled_patch16_224", {}),
    "deit3_small": ("deit3_small_patch16_224", {}),
    "dinov2_small": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
}
"""Architectures of the acceptance list, with random weights: name, further timm arguments."""


def deit_tiny(data: Path) -> torch.nn.Module:
    """Return the float DeiT-Ti with its ImageNet weights."""
    from safetensors.torch import load_file

    model = timm.create_model(DEIT)
    model.load_state_dict(load_file(data / "weights" / f"{DEIT}.safetensors"))
    return model.eval()


def swin_micro(data: Path) -> torch.nn.Module:
    """Return the float Swin that was trained on CIFAR-10."""
    from safetensors.torch import load_file

    spec = json.loads((data / "weights" / "swin_micro_cifar10.json").read_text(encoding="utf-8"))
    model = SwinTransformer(**spec["arguments"])
    model.load_state_dict(load_file(data / "weights" / "swin_micro_cifar10.safetensors"))
    model.pretrained_cfg = model.default_cfg = {
        "input_size": spec["input_size"],
        "mean": spec["mean"],
        "std": spec["std"],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": 10,
    }
    return model.eval()


def random_model(key: str, reduced: bool) -> torch.nn.Module:
    """Return a model of :data:`RANDOM_MODELS`, seeded; ``reduced`` leaves one or two blocks."""
    name, arguments = RANDOM_MODELS[key]
    if reduced:
        depth = {"depths": (2, 2, 1, 1)} if name.startswith("swin") else {"depth": 2}
        arguments = {**arguments, **depth}
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for path, value in model.named_parameters():
            # timm starts biases at zero and LayerScale at 1e-5: make every parameter matter.
            if value.ndim == 1:
                gain = path.endswith(("norm.weight", "gamma")) or "norm" in path.split(".")[-2]
                value.copy_(torch.randn_like(value) * 0.1 + float(gain and "weight" in path))
            if path.endswith("gamma"):
                value.add_(0.5)
    return model.eval()


def labelled(
    folder: Path, spec: dict[str, Any], limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return preprocessed images ``float32 [N, C, H, W]`` and labels of a folder of the data."""
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    images = preprocess_images([folder / "img" / Path(row["image"]).name for row in rows], spec)
    return images, np.array([int(row["label"]) for row in rows])


@dataclass(frozen=True)
class Built:
    """One model at every stage, in files, so that other worker processes can open it."""

    folder: Path

    @property
    def library(self) -> Path:
        """The artefact's file."""
        return self.folder / "model.so"

    def canonical(self) -> tvm.IRModule:
        """Stage 1: the canonical float module."""
        return tvm.ir.load_json((self.folder / "canonical.json").read_text(encoding="utf-8"))

    def quantized(self) -> tvm.IRModule:
        """Stage 2: the quantize/dequantize module."""
        return tvm.ir.load_json((self.folder / "quantized.json").read_text(encoding="utf-8"))

    def integer(self) -> tvm.IRModule:
        """Stage 3: the fused integer dialect."""
        from relay_passes.pipeline import lower

        return lower(self.quantized())

    def artifact(self) -> tvm_vitq.artifact.load.Artifact:
        """The loaded artefact."""
        return tvm_vitq.load(self.library)

    def preprocess(self) -> dict[str, Any]:
        """The preprocessing that the module carries."""
        return json.loads(str(self.canonical().attrs["vitq.model"]))["preprocess"]


def build(folder: Path, source: Any, calibration: Any, recipe: Any = None, **load: Any) -> Built:
    """Load, quantize and compile ``source``; leave every stage in ``folder``."""
    module = tvm_vitq.load_model(source, **load)
    (folder / "canonical.json").write_text(tvm.ir.save_json(module), encoding="utf-8")
    options = {} if recipe is None else {"recipe": recipe}
    quantized = tvm_vitq.quantize(module, calibration, **options)
    (folder / "quantized.json").write_text(tvm.ir.save_json(quantized), encoding="utf-8")
    tvm_vitq.compile(quantized, output=folder / "model.so")
    return Built(folder)


def build_digits(folder: Path) -> Built:
    """Build the embedded digits model, with the default recipe."""
    from tvm_vitq import demo

    calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))
    return build(folder, "tvm_vitq.demo:digits_vit", calibration)


def build_deit(folder: Path, data: Path) -> Built:
    """Build DeiT-Ti calibrated on 32 images: enough for exactness and coarse accuracy."""
    images = sorted((data / "images" / "calib512" / "img").iterdir())[:32]
    return build(folder, DEIT, images, checkpoint=data / "weights" / f"{DEIT}.safetensors")
