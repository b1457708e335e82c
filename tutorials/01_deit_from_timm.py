"""A timm model becomes an integer-only library, step by step.

Runs on the embedded digits model in under a minute::

    python tutorials/01_deit_from_timm.py

and on a real DeiT with its weights and a folder of sample images::

    python tutorials/01_deit_from_timm.py deit_tiny_patch16_224 W.safetensors IMAGES
"""

# %% What we need: the four functions of the API, and NumPy.
import sys
import tempfile
from pathlib import Path

import numpy as np
import tvm

import tvm_vitq
from tvm_vitq import demo

folder = Path(tempfile.mkdtemp(prefix="vitq_"))

# %% 1. The float model, as Relax. A model is a timm name, a factory `package.module:function`, a
# `.pt2` or an `.onnx` file; all arrive at one canonical form, in which attention, LayerNorm and
# GELU are single operators again.
if len(sys.argv) == 4:
    name, checkpoint, calibration = sys.argv[1:]
    model = tvm_vitq.load_model(name, checkpoint=checkpoint)
else:
    model = tvm_vitq.load_model("tvm_vitq.demo:digits_vit")
    calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))
print("\n".join(model.script(show_meta=False).splitlines()[:40]))

# %% 2. Calibrate and quantize. No labels, no training: a folder of images or an array of 32 to 512
# inputs. The result is an ordinary Relax module in which `R.quantize`/`R.dequantize` pairs say
# where and how finely everything is rounded. It is all that the compiler gets, and can be saved.
quantized = tvm_vitq.quantize(model, calibration)
saved = folder / "quantized.json"
saved.write_text(tvm.ir.save_json(quantized))
quantized = tvm.ir.load_json(saved.read_text())

# %% 3. Compile. This lowers to the integer dialect, proves that nothing is float and nothing can
# overflow, builds machine code, and compares it with the reference interpreter before writing.
artifact = tvm_vitq.compile(quantized, output=folder / "model.so")
size, weights = artifact.path.stat().st_size, artifact.metadata["parameters"]
print(f"{size / 1e3:.0f} kB for {weights:,} weights")

# %% 4. Deploy: this part needs neither torch nor timm.
artifact = tvm_vitq.load(folder / "model.so")
proof = artifact.verify()
print("golden vectors replayed: {vectors}, different logits: {logits_different}".format(**proof))
assert proof["equal"]

if len(sys.argv) != 4:
    images, labels = demo.digits("test")
    logits = artifact.run(demo.normalise(demo.pixels(images)))
    print(f"top-1 on {len(labels)} digits: {(logits.argmax(-1) == labels).mean():.2%}")

# %% 5. The same function without a single float: integer codes in, integer codes out.
codes, expected = artifact.golden
assert np.array_equal(artifact.run_codes(codes), expected)
print(f"input codes {codes.dtype}{list(codes.shape)} -> logit codes {expected.dtype}")
