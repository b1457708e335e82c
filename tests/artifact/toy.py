"""A network of one integer linear layer and the artefact made of it, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

import relay_passes.dialect
from relay_passes.dialect import boundary, linear, requantize
from relay_passes.split_boundary import SplitBoundary
from tvm_vitq.artifact.build import export
from tvm_vitq.artifact.metadata import analyse, describe, describe_target
from tvm_vitq.compiler import golden_codes, reference_logits, resolve

assert relay_passes.dialect
CLASSES, SIDE = 5, 8
MODEL = {
    "name": "toy",
    "source": "tests",
    "batch": 2,
    "input": {"layout": "NCHW", "dtype": "float32", "shape": [2, 3, SIDE, SIDE]},
    "preprocess": {
        "input_size": [3, SIDE, SIDE],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "num_classes": CLASSES,
    "labels": [f"class {i}" for i in range(CLASSES)],
    "factory": None,
}


def toy_integer(dtype: str = "float32", batch: int = 2, wide: int = 0) -> tvm.IRModule:
    """Return quantize, linear, requantize to int16, dequantize; ``wide`` adds a hidden layer."""
    rng = np.random.default_rng(0)
    shape = (batch, 3, SIDE, SIDE) if dtype == "float32" else (batch, SIDE, SIDE, 3)
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with bb.function("main", [x], attrs={"global_symbol": "main"}):
        with bb.dataflow():
            q: Any = x
            if dtype == "float32":
                q = bb.emit(boundary.quantize(x, 1 / 64, 3, -128, 127, "int8"))
            h = bb.emit(R.reshape(q, (batch, 3 * SIDE * SIDE)))
            for width, out in (
                ((wide, "int8"), (CLASSES, "int16")) if wide else ((CLASSES, "int16"),)
            ):
                k = int(h.ty.shape[-1])
                w = relax.const(rng.integers(-127, 128, (k, width)).astype("int8"))
                b = relax.const(rng.integers(-9, 9, width).astype("int32"))
                acc = bb.emit(linear.linear(h, w, b))
                top = int(np.iinfo(out).max)
                h = bb.emit(requantize.requantize(acc, 0.01, 0, 0, -top, top, out))
            logits = bb.emit_output(bb.emit(boundary.dequantize(h, 1 / 128)))
        bb.emit_func_output(logits)
    model = {**MODEL, "batch": batch}
    return bb.get().with_attr("vitq.model", json.dumps(model))


def toy_kernels(integer: tvm.IRModule) -> tvm.IRModule:
    """Legalise without schedules: what ``build_passes`` does, in the plainest way."""
    passes = [SplitBoundary(), relax.get_pipeline("default_build")]
    return tvm.transform.Sequential(passes)(integer)


def toy_artifact(
    path: Path, change: dict[str, Any] | None = None, wrong: bool = False, **kind: Any
) -> Path:
    """Write a toy artefact; ``change`` overrides metadata, ``wrong`` spoils a golden logit."""
    integer = toy_integer(**kind)
    name, target = resolve("native")
    metadata = describe(None, integer, describe_target(name, target), analyse(integer))
    codes = golden_codes(integer, None)
    logits = reference_logits(SplitBoundary()(integer), codes, metadata["input"]["shape"][0])
    if wrong:
        logits = logits.copy()
        logits[0, 1] += 1
    return export(toy_kernels(integer), target, path, {**metadata, **(change or {})}, codes, logits)
