"""PyTorch through ``torch.compile`` (Inductor's C++ code and MKL)."""

from __future__ import annotations

from functools import partial

from .peer import Peer
from .torch_eager import prepare

__all__ = ["PEER"]

PEER = Peer(
    "torch-compile", "fp32", "PyTorch, torch.compile", ("torch",),
    partial(prepare, compiled=True), needs_onnx=False,
)  # fmt: skip
