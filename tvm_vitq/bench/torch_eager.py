"""PyTorch, eager: the model as its authors run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peer import Job, Peer

__all__ = ["PEER", "prepare"]


def prepare(job: Job, compiled: bool = False) -> Callable[[], Any]:
    """Return a function that runs the torch module, through ``torch.compile`` if asked."""
    import torch

    torch.set_num_threads(job.threads)
    torch.set_num_interop_threads(1)
    model: Any = job.model.torch_module()
    if compiled:
        model = torch.compile(model)
    x = torch.from_numpy(job.x)

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


PEER = Peer("torch-eager", "fp32", "PyTorch, eager", ("torch",), prepare, needs_onnx=False)
