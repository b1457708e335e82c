"""``load_model``: one function for every way in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from relay_passes.canonicalize import canonicalize
from relay_passes.canonicalize.uint8_input import fold_uint8_input
from relay_passes.errors import VitqError
from tvm_vitq.preprocess import check_preprocess

from .source import Imported

if TYPE_CHECKING:
    import torch

__all__ = ["load_model"]

PREPROCESS_KEYS = ("input_size", "crop_pct", "resize", "crop_mode", "interpolation", "mean", "std")


def load_model(
    source: str | Path | torch.nn.Module,
    checkpoint: str | Path | None = None,
    batch: int | None = None,
    input: str = "float32",
    *,
    arguments: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    **preprocess: Any,
) -> tvm.IRModule:
    """Read a trained model into the canonical float form.

    Parameters
    ----------
    source : str, Path or torch.nn.Module
        timm model name; factory ``package.module:function`` (with keyword arguments
        ``package.module:function?{"depth": 2}``); path of a ``.pt2`` or ``.onnx`` file; a module.
    checkpoint : str or Path, optional
        ``.safetensors`` or torch state dict for a timm name, a factory or a module. Nothing is ever
        downloaded: without a checkpoint the weights are those that the source makes.
    batch : int, optional
        Images per call. Default: what a ``.pt2`` or ``.onnx`` file was exported for, else 1.
    input : {"float32", "uint8"}
        ``float32 [B, C, H, W]`` normalised images, or ``uint8 [B, H, W, C]`` raw pixels with the
        normalisation folded into the first layer.
    arguments : mapping, optional
        Keyword arguments for the timm model or the factory.
    labels : sequence of str, optional
        Class names.
    name : str, optional
        Name of the model in reports.
    **preprocess
        ``input_size``, ``crop_pct``, ``resize``, ``crop_mode``, ``interpolation``, ``mean`` and
        ``std`` replace what the model's own configuration says; files declare none.

    Returns
    -------
    tvm.IRModule
        Canonical module with attribute ``vitq.model`` (JSON: name, source, batch, input,
        preprocess, num_classes, labels, factory).

    Raises
    ------
    VitqError
        If the source cannot be read or is not supported; one line says what and how to mend it.
    """
    if input not in ("float32", "uint8"):
        raise VitqError(f"input must be 'float32' or 'uint8', not {input!r}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise VitqError(f"batch must be a positive integer, not {batch!r}")
    unknown = sorted(set(preprocess) - set(PREPROCESS_KEYS))
    if unknown:
        raise VitqError(f"unknown preprocessing {unknown}; known are {', '.join(PREPROCESS_KEYS)}")
    flags = {k: v for k, v in preprocess.items() if v is not None}
    imported = _import(source, checkpoint, batch, arguments, flags.get("input_size"))
    canonical = canonicalize(imported.mod, imported.names, imported.constants)
    shape = _shape(canonical["main"].params[0])
    spec = _preprocess(imported, flags, shape)
    if input == "uint8":
        if spec is None:
            raise VitqError("input='uint8' needs the model's normalisation: give mean and std")
        canonical = fold_uint8_input(canonical, spec["mean"], spec["std"])
    classes = _shape(canonical["main"].body.body)[-1]
    names = list(labels) if labels is not None else imported.labels
    if names is not None and len(names) != classes:
        if labels is not None:
            raise VitqError(f"{len(names)} labels for a model with {classes} classes")
        names = None
    info = {
        "name": name or imported.name,
        "source": imported.factory.get("source"),
        "batch": shape[0],
        "input": {
            "layout": "NHWC" if input == "uint8" else "NCHW",
            "dtype": input,
            "shape": list(_shape(canonical["main"].params[0])),
        },
        "preprocess": spec,
        "num_classes": classes,
        "labels": names,
        "factory": imported.factory,
    }
    return canonical.with_attr("vitq.model", json.dumps(info))


def _import(
    source: Any,
    checkpoint: str | Path | None,
    batch: int | None,
    arguments: Mapping[str, Any] | None,
    input_size: Any,
) -> Imported:
    text = str(source) if isinstance(source, (str, Path)) else ""
    suffix = Path(text).suffix.lower()
    if suffix in (".onnx", ".pt2"):
        path = Path(text)
        if not path.is_file():
            raise VitqError(f"no such file: {path}")
        if checkpoint is not None or arguments:
            raise VitqError(
                f"{path} carries its own weights; a checkpoint or arguments don't go with it"
            )
        if suffix == ".onnx":
            from .onnx_file import load_onnx

            return load_onnx(path, batch)
        from .torch_export import load_pt2

        return load_pt2(path, batch)
    from .timm_models import build_model, import_module, load_checkpoint

    model = build_model(text, arguments) if text else source
    if not hasattr(model, "state_dict"):
        raise VitqError(
            f"a model is a name, a file or a torch.nn.Module, not {type(source).__name__}"
        )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    label = text or type(model).__name__
    size = None if input_size is None else [int(v) for v in input_size]
    imported = import_module(model, label, batch or 1, size)
    kind = "module" if not text else "factory" if ":" in text else "timm"
    imported.factory = {
        "kind": kind,
        "source": text or None,
        "arguments": dict(arguments or {}),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    return imported


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in var.ty.shape)


def _preprocess(
    imported: Imported, flags: dict[str, Any], shape: tuple[int, ...]
) -> dict[str, Any] | None:
    """Merge the model's preprocessing with the flags; None where nothing is known of it."""
    spec = {**imported.preprocess, **flags}
    if not spec:
        return None
    given = spec.get("input_size")
    differs = given is not None and [int(v) for v in given] != list(shape[1:])
    if differs and "input_size" in flags:
        raise VitqError(f"input_size {flags['input_size']} is not the model's {list(shape[1:])}")
    spec["input_size"] = list(shape[1:])
    return check_preprocess(spec)
