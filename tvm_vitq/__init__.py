"""Integer-only Vision Transformers through Apache TVM: a trained ViT in, one proved ``.so`` out.

The public API is four functions, imported when first used, so that ``import tvm`` (which loads the
plug-in of this package) stays light::

    mod = tvm_vitq.load_model("deit_tiny_patch16_224", checkpoint="W.safetensors")
    qdq = tvm_vitq.quantize(mod, "calibration_images/")
    artifact = tvm_vitq.compile(qdq, output="deit_tiny.so")
    logits = tvm_vitq.load("deit_tiny.so").run(x)

``load`` and what it returns need neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_passes.errors import VitqError

    from .artifact.load import Artifact, load
    from .compiler import compile_module as compile
    from .frontend.load import load_model
    from .quantizers import Recipe, quantize

__all__ = ["Artifact", "Recipe", "VitqError", "compile", "load", "load_model", "quantize"]

_PLACES = {
    "Artifact": ("tvm_vitq.artifact.load", "Artifact"),
    "Recipe": ("tvm_vitq.quantizers", "Recipe"),
    "VitqError": ("relay_passes.errors", "VitqError"),
    "compile": ("tvm_vitq.compiler", "compile_module"),
    "load": ("tvm_vitq.artifact.load", "load"),
    "load_model": ("tvm_vitq.frontend.load", "load_model"),
    "quantize": ("tvm_vitq.quantizers", "quantize"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'tvm_vitq' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
