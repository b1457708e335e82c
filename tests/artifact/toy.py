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
    analysis, bounds = analyse(integer)
    metadata = describe(None, integer, describe_target(name, target), analysis)
    codes = golden_codes(integer, None)
    logits = reference_logits(SplitBoundary()(integer), codes, metadata["input"]["shape"][0])
    if wrong:
        logits = logits.copy()
        logits[0, 1] += 1
    return export(
        toy_kernels(integer), target, path, {**metadata, **(change or {})}, bounds, codes, logits
    )


def toy_quantized(dtype: str = "float32", batch: int = 2, spoil: str = "") -> tvm.IRModule:
    """Return the quantize/dequantize form of one linear layer; ``spoil`` leaves a site out."""
    rng = np.random.default_rng(0)
    shape = (batch, 3, SIDE, SIDE) if dtype == "float32" else (batch, SIDE, SIDE, 3)
    k = 3 * SIDE * SIDE
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))

    def site(value: Any, scale: float, zero_point: int, out: str) -> Any:
        s, z = relax.const(np.float32(scale)), relax.const(np.array(zero_point, out))
        codes = bb.emit(R.quantize(value, s, z, axis=-1, out_dtype=out))
        return bb.emit(R.dequantize(codes, s, z, axis=-1, out_dtype="float32"))

    with bb.function("main", [x]):
        with bb.dataflow():
            if dtype == "uint8":
                one, zero = relax.const(np.float32(1)), relax.const(np.array(0, "uint8"))
                h = bb.emit(R.dequantize(x, one, zero, axis=-1, out_dtype="float32"))
            else:
                h = site(x, 1 / 50, 3, "int8")
            h = bb.emit(R.reshape(h, (batch, k)))
            codes = relax.const(rng.integers(-127, 128, (k, CLASSES)).astype("int8"))
            scale = relax.const(rng.uniform(1e-4, 1e-3, CLASSES).astype("float32"))
            zero = relax.const(np.zeros(CLASSES, "int8"))
            weight = bb.emit(R.dequantize(codes, scale, zero, axis=1, out_dtype="float32"))
            bias = relax.const(rng.standard_normal(CLASSES).astype("float32"))
            h = bb.emit(R.add(bb.emit(R.matmul(h, weight)), bias))
            out = bb.emit_output(h if spoil == "logits" else site(h, 1e-3, 0, "int16"))
        bb.emit_func_output(out)
    return bb.get().with_attr("vitq.model", json.dumps({**MODEL, "batch": batch}))
