"""What an artefact says of itself: one JSON document, made from its modules."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata as packages
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from relay_passes.dialect.registry import constant_of, is_vitq_call
from relay_passes.errors import VitqError
from schedules.isa import architecture_of

from .elf import METADATA_FORMAT

__all__ = ["analyse", "describe", "describe_target", "input_and_output"]

_FEATURES = (
    "sse4.1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avxvnni",
    "amx-int8", "dotprod", "i8mm", "sve", "sve2",
)  # fmt: skip
# LLVM's names that Linux spells otherwise in /proc/cpuinfo.
_LINUX_NAMES = {"sse4.1": "sse4_1", "dotprod": "asimddp"}


def _bindings(mod: tvm.IRModule) -> list[relax.VarBinding]:
    return [b for block in mod["main"].body.blocks for b in block.bindings]


def _dims(expr: relax.Expr) -> list[int]:
    return [int(d) for d in expr.ty.shape.values]


def _attribute(mod: tvm.IRModule, name: str) -> Any:
    text = mod.attrs[name] if mod.attrs is not None and name in mod.attrs else None
    return None if text is None else json.loads(str(text))


def describe_target(name: str, target: tvm.target.Target) -> dict[str, Any]:
    """Return the target's name, processor and the instruction sets that its code may use.

    A GPU's has ``kind`` "cuda" and ``arch`` besides, and ``mcpu`` is its architecture; the other
    keys are of the host code, which any processor of its architecture runs.
    """
    if target.kind.name == "cuda":
        arch, host = str(target.attrs["arch"]), target.host
        return {"name": name, "kind": "cuda", "arch": arch, "mcpu": arch,
                "mtriple": str(host.attrs.get("mtriple", "") or "") if host else "",
                "architecture": architecture_of(target), "features": []}
    has = tvm_ffi.get_global_func("target.target_has_feature")
    features = [_LINUX_NAMES.get(f, f) for f in _FEATURES if has(f, target)]
    return {
        "name": name,
        "mcpu": str(target.attrs.get("mcpu", "") or ""),
        "mtriple": str(target.attrs.get("mtriple", "") or ""),
        "architecture": architecture_of(target),
        "features": features,
    }


def input_and_output(mod: tvm.IRModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the input codes and the output codes of an integer module.

    Returns
    -------
    codes : dict
        ``shape``, ``dtype``, ``zero_point``, ``qmin``, ``qmax`` of what ``main_codes`` takes and
        ``inv_scale`` (None for uint8 input).
    output : dict
        ``shape``, ``dtype``, ``scale``, ``zero_point`` of what ``main_codes`` returns.
    """
    main = mod["main"]
    x = main.params[0]
    entry, quantizer = x, None
    for binding in _bindings(mod):
        if is_vitq_call(binding.value, "quantize"):
            entry, quantizer = binding.var, binding.value
            break
    codes: dict[str, Any] = {"shape": _dims(entry), "dtype": str(entry.ty.dtype)}
    if quantizer is not None:
        attrs = quantizer.attrs
        codes |= {key: int(attrs[key]) for key in ("zero_point", "qmin", "qmax")}
        codes["inv_scale"] = float(attrs["inv_scale"])
    else:
        codes |= {"zero_point": 0, "qmin": 0, "qmax": 255, "inv_scale": None}
    last = [b.value for b in _bindings(mod) if is_vitq_call(b.value)]
    final: Any = last[-1] if last else None
    if not is_vitq_call(final, "dequantize"):
        raise VitqError("the integer module does not end in vitq.dequantize; lower it first")
    output = {
        "shape": _dims(final),
        "dtype": str(final.args[0].ty.dtype),
        "scale": float(final.attrs["scale"]),
        "zero_point": int(final.attrs["zero_point"]),
    }
    return codes, output


def _count_parameters(mod: tvm.IRModule) -> int:
    """Count the elements of weights and biases; tables, masks and scales are left out."""
    total = 0
    for binding in _bindings(mod):
        call = binding.value
        if not (isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.Op)):
            continue
        args = [f for a in call.args for f in (a.fields if isinstance(a, relax.Tuple) else [a])]
        name = call.op.name.removeprefix("relax.")
        if name in ("quantize", "dequantize"):
            args = args[:1]
        elif name.startswith("vitq.linear"):
            args = args[1:3]  # weights and bias, not the multipliers
        elif name.startswith("vitq."):
            continue
        for arg in args:
            value = constant_of(arg)
            if value is not None and (value.ndim < 3 or value.shape[:-2] == (1,)):
                total += int(value.size)
    return total


def _version(package: str) -> str:
    try:
        return packages.version(package)
    except packages.PackageNotFoundError:
        return "unknown"


def describe(
    quantized: tvm.IRModule | None,
    integer: tvm.IRModule,
    target: dict[str, Any],
    analysis: dict[str, Any],
    labels: list[str] | None = None,
) -> dict[str, Any]:
    """Make the metadata document of an artefact.

    Parameters
    ----------
    quantized
        The quantize/dequantize module that the artefact was made from, None if it is not at hand.
    integer
        The fused integer module (stage 3), with its attributes.
    target
        What :func:`describe_target` gives.
    analysis
        Results of the integer-only and range checks.
    labels
        Names of the classes; None takes the model's own, if it has any.

    Raises
    ------
    VitqError
        If the module is not an integer network, or the labels do not fit its classes.
    """
    model = dict(_attribute(integer, "vitq.model") or {})
    codes, output = input_and_output(integer)
    x = integer["main"].params[0]
    labels = labels if labels is not None else model.get("labels")
    classes = output["shape"][-1]
    if labels is not None and len(labels) != classes:
        raise VitqError(f"there are {len(labels)} labels and the model has {classes} classes")
    model.pop("labels", None)
    dtype = str(x.ty.dtype)
    operators = Counter(
        b.value.op.name
        for b in _bindings(integer)
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.Op)
    )
    parameters = _count_parameters(quantized if quantized is not None else integer)
    return {
        "format": METADATA_FORMAT,
        "model": model,
        "input": {
            "shape": _dims(x),
            "dtype": dtype,
            "layout": "NHWC" if dtype == "uint8" else "NCHW",
            "codes": codes,
        },
        "output": output,
        "preprocess": model.pop("preprocess", None),
        "labels": labels,
        "target": target,
        "recipe": _attribute(integer, "vitq.recipe"),
        "versions": {
            "tvm_vitq": _version("tvm-vitq"),
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "parameters": parameters,
        "operators": dict(sorted(operators.items())),
        "analysis": analysis,
        "layers": _attribute(integer, "vitq.layers"),
    }


def analyse(integer: tvm.IRModule) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Collect the results of the two analyses of an integer module, which both must pass.

    Returns
    -------
    dict
        ``integer_only`` and ``ranges_proved`` (bool), ``integer`` (what the first check counted),
        ``claims`` (number of proved ranges) and ``least_headroom_bits`` of them all.
    list of dict
        The rows of the range proof.

    Raises
    ------
    VitqError
        If the module holds a float or a range cannot be proved.
    """
    from relay_passes.check_integer_only import check_integer_only
    from relay_passes.check_ranges import check_ranges

    integer_report = check_integer_only(integer)
    bounds = check_ranges(integer)
    analysis = {
        "integer_only": bool(integer_report["integer_only"]),
        "ranges_proved": True,
        "integer": integer_report,
        "claims": len(bounds),
        "least_headroom_bits": min((row["headroom_bits"] for row in bounds), default=None),
    }
    return analysis, bounds
