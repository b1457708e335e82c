"""OpenVINO on the float model; the NNCF peer compiles its model here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peer import Job, Peer

__all__ = ["PEER", "compiled", "prepare"]


def compiled(job: Job, model: Any) -> Callable[[], Any]:
    """Compile a model for latency on the job's threads; return a function that runs it."""
    import openvino

    found = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # and not bf16 where the processor has it
        },
    )
    request = found.create_infer_request()
    request.set_input_tensor(openvino.Tensor(job.x, shared_memory=True))
    return request.infer


def prepare(job: Job) -> Callable[[], Any]:
    """Read and compile the float model."""
    import openvino

    return compiled(job, openvino.Core().read_model(str(job.onnx_file)))


PEER = Peer("openvino-fp32", "fp32", "OpenVINO", ("openvino",), prepare)
