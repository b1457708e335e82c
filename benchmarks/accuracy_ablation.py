"""What each step of the quantization buys, paired with the float model on the same images.

``python -m benchmarks.accuracy_ablation [--outliers] [--images N] [--only NAME …]`` prints
Markdown. It needs the data of ``VITQ_DATA``. The quantize/dequantize module is executed by torch
with the rounding points of the integer network; nonlinearities and LayerNorm are float. *Noise* is
the error of the logits over their variance, about the mean of each image.

``--outliers`` rescales DeiT-Ti so that its activations look like those of a model with strong
outliers: LayerNorm's output, V and Q against K get channel factors spread over two orders of
magnitude (which leaves the function as it is), K gets large constants, and some channels before
GELU are made up to ten times larger (which changes it a little: the float reference has it, too).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

import tvm_vitq
from tvm_vitq.preprocess import preprocess_image
from tvm_vitq.quantizers import PRESETS, Recipe, preset
from tvm_vitq.reference.float_interpreter import Program

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("VITQ_DATA") or ROOT.parent / "shared" / "data").expanduser()
NAME = "deit_tiny_patch16_224"
SPEC = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}

RECIPES: dict[str, Recipe] = {
    "default": PRESETS["default"],
    "no int16 activations for products (budget 0)": preset("int8"),
    "… probabilities uint8": preset("int8", probabilities="uint8"),
    "… int8 before GELU": preset("int8", wide_gelu=False),
    "… weights to nearest": preset("int8", rounding="nearest"),
    "… no bias correction": preset("int8", bias_correction=False),
    "… no channel scales after LayerNorm": preset("int8", norm=0.0),
    "… no channel scales of attention, Q/K": preset("int8", attention=0.0, balance_keys=False),
    "… no channel scales after GELU": preset("int8", gelu=0.0),
    "… full channel scales everywhere": preset("int8", norm=1.0, attention=1.0, gelu=1.0),
    "… ranges by min-max": preset("int8", observer="minmax"),
    "preset repq": PRESETS["repq"],
    "preset minmax": PRESETS["minmax"],
    "preset minmax, probabilities uint8, int8 before GELU": preset(
        "minmax", probabilities="uint8", wide_gelu=False
    ),
}


def with_outliers(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Rescale channels of a timm VisionTransformer in place, and return it."""
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int, spread: float, largest: float) -> torch.Tensor:
        out = torch.exp(torch.randn(count, generator=generator) * spread)
        few = torch.rand(count, generator=generator) < 0.03
        return torch.where(few, out * largest, out)

    with torch.no_grad():
        for block in model.blocks:
            dim, qkv = block.norm1.weight.numel(), block.attn.qkv
            for norm, linear in ((block.norm1, qkv), (block.norm2, block.mlp.fc1)):
                factor = factors(dim, 0.7, 12.0)
                norm.weight *= factor
                norm.bias *= factor
                linear.weight /= factor
            factor = factors(dim, 0.7, 12.0)
            qkv.weight[2 * dim :] *= factor[:, None]
            qkv.bias[2 * dim :] *= factor
            block.attn.proj.weight /= factor
            factor = factors(dim, 0.5, 6.0)
            qkv.weight[:dim] *= factor[:, None]
            qkv.bias[:dim] *= factor
            qkv.weight[dim : 2 * dim] /= factor[:, None]
            qkv.bias[dim : 2 * dim] /= factor
            norms = qkv.weight[dim : 2 * dim].norm(dim=1)
            qkv.bias[dim : 2 * dim] += torch.randn(dim, generator=generator) * norms * 0.5
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            chosen = torch.randperm(len(fc1.bias), generator=generator)[:16]
            gain = 1 + 9 * torch.rand(len(chosen), generator=generator)
            fc1.weight[chosen] *= gain[:, None]
            fc1.bias[chosen] *= gain
            fc2.weight[:, chosen] /= gain
    return model


def pictures(folder: str, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return preprocessed images of a folder, spread evenly, and their labels."""
    place = DATA / "images" / folder
    with (place / "labels.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if count is not None:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
    images = [preprocess_image(place / "img" / Path(row["image"]).name, SPEC) for row in rows]
    labels = torch.tensor([int(row["label"]) for row in rows])
    return torch.from_numpy(np.stack(images)), labels


def main() -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--images", type=int, default=384, help="evaluation images")
    parser.add_argument("--only", nargs="*", help="parts of the recipes' names")
    options = parser.parse_args()
    model = timm.create_model(NAME)
    model.load_state_dict(load_file(DATA / "weights" / f"{NAME}.safetensors"))
    model = with_outliers(model.eval()) if options.outliers else model.eval()
    module = tvm_vitq.load_model(model)
    calibration, _ = pictures("calib512", 128)
    share = options.images / 1150
    sets = [pictures("val650", round(650 * share)), pictures("nips500", round(500 * share))]
    images, labels = (torch.cat(parts) for parts in zip(*sets, strict=True))

    def logits(mod: object) -> torch.Tensor:
        program = Program(mod)
        return torch.cat([program(part) for part in images.split(32)])

    reference = logits(module)
    float_top1 = 100 * float((reference.argmax(1) == labels).float().mean())
    print(f"DeiT-Ti{' with outliers' * options.outliers}, {len(images)} images, ", end="")
    print(f"float top-1 {float_top1:.2f}\n")
    print(
        "| recipe | noise, 1e-4 | same prediction | top-1 change | CPU s |\n|---|---|---|---|---|"
    )
    for name, recipe in RECIPES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        start = time.process_time()
        quantized = tvm_vitq.quantize(module, calibration, recipe)
        seconds = time.process_time() - start
        out = logits(quantized)
        noise = float((out - reference).var(1).sum() / reference.var(1).sum())
        same = float((out.argmax(1) == reference.argmax(1)).float().mean())
        top1 = 100 * float((out.argmax(1) == labels).float().mean())
        print(
            f"| {name} | {noise * 1e4:.1f} | {same:.2%} | {top1 - float_top1:+.2f} "
            f"| {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
