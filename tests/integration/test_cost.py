"""What a compile costs, and how fast its result is: bars on a quiet machine, so all are slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import models

pytestmark = [pytest.mark.slow, pytest.mark.data]

COMPILE = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, "-m", "tvm_vitq.cli", "compile", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print()
print(done.returncode, time.perf_counter() - start, used.ru_maxrss * 1024)
"""

VERSUS = """
import json, sys
import numpy as np, onnxruntime
import tvm_vitq
from tvm_vitq.demo.__main__ import interleaved
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
peer = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
ours = tvm_vitq.load(sys.argv[1])
x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
name = peer.get_inputs()[0].name
times = interleaved(lambda: peer.run(None, {name: x}), lambda: ours.run(x), 40)
print(json.dumps({"peer": float(np.median(times[:, 0])), "ours": float(np.median(times[:, 1]))}))
"""


def test_compile_time_and_memory(data_dir: Path, tmp_path: Path) -> None:
    images = tmp_path / "calib"
    images.mkdir()
    for image in sorted((data_dir / "images/calib512/img").iterdir())[:128]:
        (images / image.name).symlink_to(image)
    done = subprocess.run(
        [
            sys.executable, "-c", COMPILE, models.DEIT,
            "--checkpoint", str(data_dir / "weights" / f"{models.DEIT}.safetensors"),
            "--calib", str(images), "-o", str(tmp_path / "deit.so"),
        ],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    status, seconds, peak = done.stdout.split()[-3:]
    assert int(status) == 0, done.stderr
    assert float(seconds) <= 120
    assert int(peak) <= 4 * 2**30


def test_no_slower_than_onnx_runtime_fp32(
    deit_built: models.Built, data_dir: Path, tmp_path: Path
) -> None:
    import torch

    path = tmp_path / "deit.onnx"
    example = (torch.zeros(1, 3, 224, 224),)
    torch.onnx.export(models.deit_tiny(data_dir), example, path, dynamo=True, verbose=False)
    done = subprocess.run(
        [sys.executable, "-c", VERSUS, str(deit_built.library), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    times = json.loads(done.stdout.splitlines()[-1])
    assert times["ours"] <= times["peer"], times
