"""ONNX in two forms: a float model, and one that another tool has quantized already.

Run it with ``python tutorials/02_onnx.py``.
"""

# %% A float ONNX file, made here from the digits model; any exporter will do.
import tempfile
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import tvm_vitq
from tvm_vitq import demo

folder = Path(tempfile.mkdtemp(prefix="vitq_"))
images, labels = demo.digits("test")
x = demo.normalise(demo.pixels(images))
calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))

example = (torch.zeros(1, 3, demo.PIXELS, demo.PIXELS),)
torch.onnx.export(
    demo.digits_vit(), example, folder / "float.onnx", dynamo=True, external_data=False,
    verbose=False,
)  # fmt: skip

# %% 1. Float ONNX: calibration as for any other model. An ONNX file doesn't say how its images
# were prepared, so what `run` and `eval` should store is given here (on the command line: flags).
model = tvm_vitq.load_model(folder / "float.onnx", mean=demo.MEAN, std=demo.STD, crop_pct=1.0)
np.savez(folder / "calib.npz", calibration)
quantized = tvm_vitq.quantize(model, folder / "calib.npz")
ours = tvm_vitq.compile(quantized, output=folder / "float.so")
print(f"float ONNX, our calibration:   top-1 {(ours.run(x).argmax(-1) == labels).mean():.2%}")


# %% 2. Already quantized: ONNX Runtime chooses the scales and writes QuantizeLinear and
# DequantizeLinear pairs into the graph; they are kept, and only what has no scale yet (softmax,
# LayerNorm, residuals) is calibrated.
class Reader(CalibrationDataReader):
    """Feed the calibration images to ONNX Runtime, one by one."""

    def __init__(self) -> None:
        """Start at the first image."""
        self.images = iter(calibration)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, None at the end."""
        image = next(self.images, None)
        return None if image is None else {"x": image[None]}


quant_pre_process(folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
quantize_static(
    folder / "prepared.onnx", folder / "qdq.onnx", Reader(), quant_format=QuantFormat.QDQ,
    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
    op_types_to_quantize=["MatMul", "Gemm", "Conv"],
    extra_options={"WeightSymmetric": True},
)  # fmt: skip
model = tvm_vitq.load_model(folder / "qdq.onnx", mean=demo.MEAN, std=demo.STD, crop_pct=1.0)
theirs = tvm_vitq.compile(tvm_vitq.quantize(model, calibration), output=folder / "qdq.so")
print(f"ONNX Runtime's scales:         top-1 {(theirs.run(x).argmax(-1) == labels).mean():.2%}")

# %% Either way the result is integer-only and bit-exact.
for artifact in (ours, theirs):
    assert artifact.verify()["equal"]
    assert artifact.metadata["analysis"]["integer_only"]
