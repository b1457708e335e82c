"""OpenVINO int8: NNCF's post-training quantization with its transformer settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .openvino_fp32 import compiled
from .peer import Job, Peer

__all__ = ["PEER", "prepare"]


def prepare(job: Job) -> Callable[[], Any]:
    """Quantize with NNCF and compile."""
    import nncf
    import openvino

    inputs = job.calibration()
    model = openvino.Core().read_model(str(job.onnx_file))
    quantized = nncf.quantize(
        model,
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
    )
    return compiled(job, quantized)


PEER = Peer("openvino-nncf", "int8", "OpenVINO, NNCF", ("openvino", "nncf"), prepare)
