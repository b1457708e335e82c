"""The networks of the bundle, quantized: real weights where there are some, else random ones.

Random weights are drawn as codes, from one small pool of tiles that each matmul reads from another
place: no two weights are alike, so that device memory holds (and the device reads) all of them,
but the bundle, which is compressed, stores the pool only. Times do not depend on the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from benchmarks.acceptance import DATA
from relay_passes.dialect.registry import constant_of

__all__ = ["NETWORKS", "Network", "Quantized", "pooled_weights", "prepare"]

CALIBRATION_BATCH = 8
_TILE_N, _TILE_K = 32, 16  # a packed tile of the CUDA kernels: equal codes are equal bytes there


@dataclass(frozen=True)
class Network:
    """A network and what the runner must know of it.

    Attributes
    ----------
    source
        timm name, or factory with arguments.
    architecture
        ``family`` and arguments for :func:`benchmarks.gpu.runner.models.build`.
    weights, images
        Name of the checkpoint and of the folder of calibration images in the data; empty: random.
    preprocess
        Keywords of ``load_model``.
    bars
        Whether the bars speak of it.
    """

    source: str
    architecture: Mapping[str, Any]
    weights: str = ""
    images: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    bars: bool = True

    @property
    def checkpoint(self) -> Path | None:
        """Path of the weights, None if there are none here."""
        path = DATA / "weights" / f"{self.weights}.safetensors"
        return path if self.weights and path.is_file() else None


def _deit(size: str, width: int, heads: int, real: bool = False) -> Network:
    name = f"deit_{size}_patch16_224"
    architecture = {"family": "vit", "img_size": 224, "patch_size": 16, "embed_dim": width,
                    "depth": 12, "num_heads": heads}  # fmt: skip
    return Network(name, architecture, name if real else "", "calib512" if real else "")


def _small_swin() -> Network:
    path = DATA / "weights" / "swin_micro_cifar10.json"
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    arguments = {
        "img_size": 32, "patch_size": 2, "num_classes": 10, "embed_dim": 48, "depths": [2, 2, 4],
        "num_heads": [2, 4, 8], "window_size": 4, "mlp_ratio": 3.0,
    }  # fmt: skip
    preprocess = {"mean": spec.get("mean", [0.5] * 3), "std": spec.get("std", [0.25] * 3),
                  "crop_pct": 1.0, "input_size": [3, 32, 32]}  # fmt: skip
    return Network(
        f"timm.models.swin_transformer:SwinTransformer?{json.dumps(arguments)}",
        {"family": "swin", **arguments}, "swin_micro_cifar10", "cifar10_calib500", preprocess,
        bars=False,
    )  # fmt: skip


NETWORKS = {
    "deit_tiny": _deit("tiny", 192, 3, real=True),
    "deit_small": _deit("small", 384, 6),
    "swin_tiny": Network(
        "swin_tiny_patch4_window7_224",
        {"family": "swin", "img_size": 224, "patch_size": 4, "embed_dim": 96,
         "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    ),
    "deit_base": _deit("base", 768, 12),
    "swin_micro": _small_swin(),
}  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """What is to be known of a quantized network: its golden inputs and where it is from."""

    golden: np.ndarray | None
    weights: str
    recipe: str


def prepare(network: Network, samples: int, path: Path) -> Quantized:
    """Quantize a network, at some batch.

    Parameters
    ----------
    network
    samples
        Calibration images of a network with real weights.
    path
        The file for the quantized module; if it is there already, it stays.
    """
    import torch

    from tvm_vitq import load_model, quantize
    from tvm_vitq.calibration.data import load_images
    from tvm_vitq.quantizers.recipe import preset
    from tvm_vitq.saved import load_quantized, save_quantized

    real = network.checkpoint is not None
    # Weights of full width: the tensor cores add products in 32 bits.
    recipe = preset("int8" if real else "minmax", int16_groups=0, images=samples)
    said = f"{'int8' if real else 'minmax'}, int16_groups 0"
    weights = "real" if real else "random"
    if path.is_file():
        module = load_quantized(path)
        images = load_images(str(DATA / "images" / network.images), module, 2) if real else None
    else:
        torch.manual_seed(0)
        checkpoint = str(network.checkpoint) if real else None
        source = load_model(network.source, checkpoint=checkpoint, batch=CALIBRATION_BATCH,
                            **network.preprocess)  # fmt: skip
        if real:
            images = load_images(str(DATA / "images" / network.images), source, samples)
        else:
            size = network.architecture["img_size"]
            images = torch.randn(CALIBRATION_BATCH, 3, size, size)
        module = quantize(source, images, recipe)
        save_quantized(module if real else pooled_weights(module), path)
    golden = images[:2].numpy() if real else None
    return Quantized(golden, weights, said)


@relax.expr_functor.mutator
class _Pooled(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, pool: np.ndarray) -> None:
        super().__init__(mod)
        self.pool, self.start = pool, 0

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if call.op.name != "relax.dequantize":
            return call
        codes = constant_of(call.args[0])
        if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
            return call
        drawn = relax.const(self.draw(*codes.shape))
        return relax.Call(call.op, [drawn, *call.args[1:]], call.attrs)

    def draw(self, depth: int, columns: int) -> np.ndarray:
        """Return codes ``[depth, columns]``: tiles of the pool, side by side."""
        groups, steps = -(-columns // _TILE_N), -(-depth // _TILE_K)
        tiles = self.pool[(self.start + np.arange(groups * steps)) % len(self.pool)]
        self.start += 7
        whole = tiles.reshape(groups, steps, _TILE_N, _TILE_K).transpose(1, 3, 0, 2)
        whole = whole.reshape(steps * _TILE_K, groups * _TILE_N)
        return np.ascontiguousarray(whole[:depth, :columns])


def pooled_weights(mod: tvm.IRModule, tiles: int = 5000) -> tvm.IRModule:
    """Replace the weight codes of a quantized module with codes from a pool of random tiles.

    Parameters
    ----------
    mod
        In quantize/dequantize form.
    tiles
        Size of the pool, in tiles of 32 × 16 codes.
    """
    rng = np.random.default_rng(0)
    drawn = np.rint(rng.standard_normal((tiles, _TILE_N, _TILE_K)) * 28)
    mutator = _Pooled(mod, np.clip(drawn, -127, 127).astype(np.int8))
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            mutator.builder_.update_func(gvar, mutator.visit_expr(func))
    out = mutator.builder_.get()
    return out.with_attrs({str(key): value for key, value in mod.attrs.items()})
