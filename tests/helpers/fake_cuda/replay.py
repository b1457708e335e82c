"""Replay an artefact through TVM's CUDA runtime on the fake driver, in a process of its own.

Arguments: the artefact. Prints one line of JSON. The folder of the driver must be in
``LD_LIBRARY_PATH`` when the process starts.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(path: Path) -> dict[str, Any]:
    sys.modules["torch"] = None  # type: ignore[assignment]  # it would bring NVIDIA's own libcudart
    driver = ctypes.CDLL("libcudart.so.13", ctypes.RTLD_GLOBAL)
    driver.fake_problems.restype = ctypes.c_char_p
    from schedules.cuda.emulate import Emulator
    from schedules.cuda.lower import Kernel
    from tvm_vitq.artifact.load import Artifact, load

    described = Artifact(path, describe_only=True)
    document = described._compressed("vitq_kernels")
    kernels = {name: Kernel.of_json(fields) for name, fields in document["launches"].items()}
    emulator = Emulator.of_source(document["source"], kernels, described.metadata["target"]["arch"])
    driver.fake_open(emulator._library._name.encode())
    for kernel in kernels.values():
        driver.fake_kernel(kernel.name.encode(), len(kernel.parameters))
    artifact = load(path)
    counts = (ctypes.c_int * 4)()
    runs = []
    codes, expected = artifact.golden
    for seed in range(3):
        driver.fake_seed(seed)
        different = int((artifact.run_codes(codes[::-1]) != expected[::-1]).sum())
        driver.fake_counts(counts)
        runs.append({"different": different, "counts": list(counts)})
    images = np.random.default_rng(0).standard_normal((2, *artifact.input_shape), np.float32)
    again = [artifact.run(images).tolist() for _ in range(2)]
    return {"runs": runs, "logits": again, "problems": driver.fake_problems().decode().split("\n")}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
