"""ONNX Runtime static int8: QDQ form, weights per channel, unsigned activations.

With ``reduce_range`` weights have 7 bits, which keeps ``vpmaddubsw`` from saturating on machines
without VNNI; without it they have 8. Accuracy and speed differ, so both are peers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .ort_fp32 import session
from .peer import Job, Peer

__all__ = ["PEER", "PEER_REDUCED", "prepare"]


def _reader(name: str, inputs: list[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            value = next(self.left, None)
            return None if value is None else {name: value}

    return Reader()


def prepare(job: Job, reduce_range: bool) -> Callable[[], Any]:
    """Quantize the float model statically and open it."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, quantized = job.folder / "ready.onnx", job.folder / "static.onnx"
    quant_pre_process(str(job.onnx_file), str(ready))
    name = onnx.load(str(ready), load_external_data=False).graph.input[0].name
    quantize_static(
        str(ready),
        str(quantized),
        _reader(name, job.calibration()),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return session(job, quantized)


PEER = Peer(
    "ort-static", "int8", "ONNX Runtime, static QDQ", ("onnx", "onnxruntime"),
    partial(prepare, reduce_range=False),
)  # fmt: skip
PEER_REDUCED = Peer(
    "ort-static-rr", "int8", "ONNX Runtime, static QDQ, reduced range", ("onnx", "onnxruntime"),
    partial(prepare, reduce_range=True),
)  # fmt: skip
