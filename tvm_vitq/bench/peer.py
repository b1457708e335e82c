"""What a peer is: a name, the packages it needs, and how to make a function that runs the model.

A peer is prepared and timed in a process of its own (:mod:`tvm_vitq.bench.worker`), which is pinned
to its cores and has its thread settings in the environment before anything is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_passes.errors import VitqError

if TYPE_CHECKING:
    import torch

__all__ = ["CALIBRATION_IMAGES", "FloatSource", "Job", "Peer"]

CALIBRATION_IMAGES = 8
"""Inputs that static quantizers of peers are calibrated on: their speed hardly depends on them."""


@dataclass(frozen=True)
class FloatSource:
    """How to build the float model again.

    Parameters
    ----------
    kind
        ``"torch"`` (timm name or factory), ``"pt2"`` or ``"onnx"``.
    source
        Name, factory or file.
    arguments
        Keyword arguments of the timm model or factory.
    checkpoint
        Weights; None leaves what the source makes.
    """

    kind: str
    source: str
    arguments: dict[str, Any] | None = None
    checkpoint: str | None = None

    def torch_module(self) -> torch.nn.Module:
        """Build the model as a torch module, in evaluation mode.

        Raises
        ------
        VitqError
            If the source is an ONNX file, or cannot be built.
        """
        if self.kind == "onnx":
            raise VitqError(f"{self.source} is an ONNX file: there is no PyTorch model of it")
        if self.kind == "pt2":
            import torch

            return torch.export.load(self.source).module()
        from tvm_vitq.frontend.timm_models import build_model, load_checkpoint

        model = build_model(self.source, self.arguments)
        if self.checkpoint is not None:
            load_checkpoint(model, self.checkpoint)
        return model.eval()


@dataclass(frozen=True)
class Job:
    """What a peer is prepared for.

    Parameters
    ----------
    model
        The float model.
    onnx
        The float model as an ONNX file of a fixed batch; None if no peer of the run needs it.
    shape
        Input shape ``[B, C, H, W]``, float32.
    threads
        Threads that it may use.
    folder
        For its files.
    """

    model: FloatSource
    onnx: Path | None
    shape: tuple[int, ...]
    threads: int
    folder: Path

    @cached_property
    def x(self) -> np.ndarray:
        """The input: seeded standard normal values, as normalised images are."""
        return np.random.default_rng(0).standard_normal(self.shape).astype(np.float32)

    def calibration(self) -> list[np.ndarray]:
        """Return inputs for quantizers that want some."""
        rng = np.random.default_rng(1)
        count = max(1, CALIBRATION_IMAGES // self.shape[0])
        return [rng.standard_normal(self.shape).astype(np.float32) for _ in range(count)]

    @property
    def onnx_file(self) -> Path:
        """The ONNX file; it must have been exported."""
        assert self.onnx is not None, "the peer must say needs_onnx"
        return self.onnx


@dataclass(frozen=True)
class Peer:
    """One runtime and precision.

    Parameters
    ----------
    name
        As the user names it.
    precision
        ``"fp32"`` or ``"int8"``.
    doc
        One line for tables.
    packages
        Import names of what it needs.
    prepare
        From a :class:`Job` to a function without arguments that runs the model once.
    needs_onnx
        Whether it starts from the ONNX file.
    """

    name: str
    precision: str
    doc: str
    packages: tuple[str, ...]
    prepare: Callable[[Job], Callable[[], Any]]
    needs_onnx: bool = True

    def missing(self) -> list[str]:
        """Return those of its packages that are not installed."""
        return [name for name in self.packages if util.find_spec(name) is None]

    def version(self) -> str:
        """Return the version of its main package."""
        try:
            return metadata.version(self.packages[-1])
        except metadata.PackageNotFoundError:
            return "unknown"
