"""Tiny members of the supported families, with every parameter random, and factories of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

__all__ = ["MODELS", "export", "image_shape", "randomised", "tiny_vit"]

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 3,
    "num_classes": 10,
}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "num_classes": 10,
    "embed_dim": 24,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "window_size": 4,
    "mlp_ratio": 2.0,
}


def _vit(**changes: Any) -> Callable[[], torch.nn.Module]:
    return lambda: VisionTransformer(**{**VIT, **changes})


def _swin(**changes: Any) -> Callable[[], torch.nn.Module]:
    return lambda: SwinTransformer(**{**SWIN, **changes})


def _distilled() -> torch.nn.Module:
    return VisionTransformerDistilled(**VIT)


def _fused_swin() -> torch.nn.Module:
    model = SwinTransformer(**SWIN)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "vit": _vit(),
    "distilled": _distilled,
    "deit3": _vit(no_embed_class=True, init_values=1e-3),
    "dinov2": _vit(init_values=1e-3, patch_size=4),
    "registers": _vit(reg_tokens=4, no_embed_class=True, init_values=1e-3),
    "qk-norm": _vit(qk_norm=True),
    "no-qkv-bias": _vit(qkv_bias=False),
    "average": _vit(global_pool="avg", class_token=False),
    "average-fc-norm": _vit(global_pool="avg", fc_norm=True),
    "pre-norm": _vit(pre_norm=True),
    "one-head": _vit(num_heads=1),
    "dynamic-size": _vit(dynamic_img_size=True),
    "swin": _swin(),
    "swin-padded": _swin(img_size=40, window_size=8),
    "swin-fused": _fused_swin,
}
"""Architectures of the supported families; ``dinov2`` differs from ``deit3`` in its positions."""


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value, so that none is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise * 0.08 + float("norm" in path and path.endswith("weight")))
            if path.endswith("gamma"):
                value.add_(0.5)
    return model.eval()


def image_shape(model: torch.nn.Module, batch: int = 1) -> tuple[int, ...]:
    """Input shape of a timm model."""
    height, width = model.patch_embed.img_size
    return (batch, 3, height, width)


def export(model: torch.nn.Module, way: str, folder: Path, batch: int = 1) -> Path:
    """Write a model as ``pt2``, ``onnx`` (torch.export's) or ``legacy`` (TorchScript's)."""
    shape = image_shape(model, batch)
    x = (torch.zeros(shape),)
    path = folder / (f"{way}.pt2" if way.startswith("pt2") else f"{way}.onnx")
    free = ({0: torch.export.Dim("batch", min=1, max=64)},) if way.endswith("dynamic") else None
    if way.startswith("pt2"):
        x = (torch.zeros(2, *shape[1:]),) if free else x
        torch.export.save(torch.export.export(model, x, dynamic_shapes=free), path)
    elif way.startswith("onnx"):
        x = (torch.zeros(2, *shape[1:]),) if free else x
        torch.onnx.export(model, x, path, dynamo=True, verbose=False, dynamic_shapes=free)
    else:
        opset = int(way.removeprefix("legacy"))
        torch.onnx.export(model, x, str(path), dynamo=False, opset_version=opset)
    return path


def tiny_vit(depth: int = 1, bad: bool = False) -> torch.nn.Module:
    """Factory for tests; ``bad`` puts a NaN into a weight."""
    model = randomised(VisionTransformer(**{**VIT, "depth": depth}))
    if bad:
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    return model


def not_a_model() -> int:
    """Factory for tests that returns no module."""
    return 3


def failing() -> torch.nn.Module:
    """Factory for tests that fails."""
    raise RuntimeError("no luck\nsecond line")
