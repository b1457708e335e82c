"""Link a VM-ready module, its metadata and its golden vectors into one shared library.

The library exports, as functions of the Relax virtual machine:

``main(x)``               float32 or uint8 input to float32 logits
``main_codes(q)``         input codes to logit codes, no float anywhere
``vitq_metadata()``       uint8 vector, UTF-8 JSON: what running takes, and where the file is from
``vitq_details()``        uint8 vector, the rest of the metadata: JSON compressed with zlib
``vitq_bounds()``         uint8 vector, the rows of the range proof: JSON compressed with zlib
``vitq_golden_inputs()``  input codes, ``[V, ...]``; see :mod:`tvm_vitq.artifact.golden`
``vitq_golden_logits()``  what the reference interpreter makes of them, ``[V, classes]``
``vitq_kernels()``        for a GPU: the kernels' CUDA C++ and their launches, JSON compressed

It needs no other library than the C library. Debug information is left out; kernel names stay, for
:mod:`tvm_vitq.artifact.disassemble`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from schedules.calling import PIPELINE
from schedules.isa import architecture_of

from .golden import shrink
from .seal import UNSEALED, seal
from .toolchain import compiler

if TYPE_CHECKING:
    from .gpu_build import GpuCode

__all__ = ["add_constant_functions", "export"]

_DETAILS = ("recipe", "layers", "kernels")
"""Keys of the metadata that are long and needed for reports only."""
_LINK = ["-Wl,--strip-debug", "-Wl,--as-needed", "-Wl,--build-id=none", "-Wl,-z,noexecstack"]


def add_constant_functions(mod: tvm.IRModule, constants: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """Add one Relax function without arguments for each named array; it returns the array."""
    out = tvm.IRModule(mod.functions, attrs=mod.attrs)
    for name, value in constants.items():
        bb = relax.BlockBuilder()
        with bb.function(name, [], attrs={"global_symbol": name}):
            bb.emit_func_output(relax.const(np.ascontiguousarray(value)))
        out[name] = bb.get()[name]
    return out


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _compressed(document: Any) -> np.ndarray:
    return np.frombuffer(zlib.compress(_json(document), 9), dtype=np.uint8)


def export(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    output: str | Path,
    metadata: Mapping[str, Any],
    bounds: Sequence[Mapping[str, Any]],
    golden_inputs: np.ndarray,
    golden_logits: np.ndarray,
    gpu: GpuCode | None = None,
) -> Path:
    """Build a VM-ready module and write it with its data to ``output`` (not atomically).

    Parameters
    ----------
    mod
        What ``relay_passes.pipeline.build_passes`` made: ``main``, ``main_codes`` and kernels.
    target
        Target of the kernels.
    output
        The library to write, ending in ``.so``.
    metadata
        Anything that JSON can hold.
    bounds
        Rows of the range proof, for ``inspect``.
    golden_inputs, golden_logits
        Input codes ``[V, ...]`` and the logit codes ``[V, classes]`` that they must give.

    gpu
        The kernels' code, if the target is a GPU.

    Raises
    ------
    VitqError
        If there is no compiler for the target's architecture to link with.
    """
    stored, shift = shrink(golden_inputs)
    document = {**metadata, "digest": UNSEALED,
                "golden": {**metadata.get("golden", {}), "shift": shift}}  # fmt: skip
    details = {key: document.pop(key) for key in _DETAILS if key in document}
    constants = {
        "vitq_metadata": np.frombuffer(_json(document), dtype=np.uint8),
        "vitq_details": _compressed(details),
        "vitq_bounds": _compressed(list(bounds)),
        "vitq_golden_inputs": stored,
        "vitq_golden_logits": golden_logits,
    }
    if gpu is not None:
        constants["vitq_kernels"] = _compressed(gpu.document())
    linker = compiler(architecture_of(target))
    complete = add_constant_functions(mod, constants)
    with target, nullcontext() if gpu is None else gpu.building(target):
        executable = relax.build(complete, target, relax_pipeline=None,
                                 tir_pipeline=PIPELINE)
        packing = {} if gpu is None else {"fpack_imports": gpu.build.pack}
        executable.export_library(str(output), cc=linker, options=list(_LINK), **packing)
    seal(output)
    return Path(output)
