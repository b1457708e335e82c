"""ONNX Runtime dynamic int8: weights quantized ahead, activations at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .ort_fp32 import session
from .peer import Job, Peer

__all__ = ["PEER", "prepare"]


def prepare(job: Job) -> Callable[[], Any]:
    """Quantize the weights of the float model and open it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, quantized = job.folder / "ready.onnx", job.folder / "dynamic.onnx"
    quant_pre_process(str(job.onnx_file), str(ready))
    # Convolutions have no fast dynamic form on CPU; the patch embedding stays float.
    quantize_dynamic(
        str(ready), str(quantized), op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return session(job, quantized)


PEER = Peer("ort-dynamic", "int8", "ONNX Runtime, dynamic", ("onnx", "onnxruntime"), prepare)
