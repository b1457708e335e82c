"""Quantized modules on disk: TVM's JSON of the module, written whole or not at all.

The quantize/dequantize module is the only thing that passes between calibration and lowering, so a
saved one is a complete starting point for ``compile``; saving loses nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from relay_passes.errors import VitqError
from tvm_vitq.artifact.output import atomic_output

if TYPE_CHECKING:
    import tvm

__all__ = ["is_saved_module", "load_quantized", "save_quantized"]


def save_quantized(mod: tvm.IRModule, path: str | Path) -> Path:
    """Write a module in quantize/dequantize form to ``path``.

    Raises
    ------
    VitqError
        If the file cannot be written.
    """
    import tvm

    with atomic_output(path) as draft:
        draft.write_text(tvm.ir.save_json(mod), encoding="utf-8")
    return Path(path)


def is_saved_module(path: str | Path) -> bool:
    """Whether ``path`` is a file that starts like a saved module (JSON)."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return handle.read(64).lstrip()[:1] == b"{"


def load_quantized(path: str | Path) -> tvm.IRModule:
    """Read a module that :func:`save_quantized` wrote.

    Raises
    ------
    VitqError
        If the file is missing, damaged, or holds something else than a quantized module.
    """
    import tvm

    import relay_passes.dialect

    assert relay_passes.dialect  # the module may call its operators
    try:
        mod = tvm.ir.load_json(Path(path).read_text(encoding="utf-8"))
    except OSError as why:
        raise VitqError(f"cannot read {path}: {why.strerror}") from why
    except Exception as why:
        raise VitqError(
            f"{path} is not a whole saved module; make it again with --save-quantized"
        ) from why
    if not isinstance(mod, tvm.IRModule) or "main" not in [
        v.name_hint for v in mod.get_global_vars()
    ]:
        raise VitqError(f"{path} holds no module with a function main; expected a quantized model")
    return mod
