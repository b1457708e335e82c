"""An artefact in C++ beside the same artefact in Python: classes, time of a run, time to the first.

Run: ``python -m benchmarks.embedding ARTEFACT --images FOLDER [--limit 40] [--pairs 200]``, for an
artefact with float32 input. The C++ program is built by CMake from ``tutorials/cpp`` as its README
says; every fourth photograph is shown to both as PNG. Both run one thread on the same core, turn
about; the ratio is the median of the pairs' ratios. The first result is timed from the start of a
new process to its end: open the artefact, read one image, resize, run, print.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from tvm_vitq.artifact.load import Artifact, load
from tvm_vitq.evaluate import best_classes, model_input
from tvm_vitq.preprocess import list_images

__all__ = ["against_python", "build_programs", "first_result", "same_classes"]

_ROOT = Path(__file__).resolve().parents[1]
_PROGRAM = Path(__file__).with_name("embedding_time.cpp")


def build_programs(folder: Path) -> tuple[Path, Path]:
    """Return ``vitq_classify`` and the program that times runs, built in a folder."""
    commands = [["cmake", "-S", str(_ROOT / "tutorials/cpp"), "-B", str(folder),
                 f"-DVITQ_PYTHON={sys.executable}", f"-DVITQ_PROGRAM={_PROGRAM}"],
                ["cmake", "--build", str(folder)]]  # fmt: skip
    for command in commands:
        subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "vitq_classify", folder / "vitq_program"


def _classify(program: Path, artifact: Artifact, images: list[Path]) -> list[dict[str, Any]]:
    command = [str(program), str(artifact.path), "--json", "--threads", "1", *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["images"]


def same_classes(program: Path, artifact: Artifact, images: list[Path]) -> tuple[int, int]:
    """Return on how many images C++ has Python's five best classes, and its very logits of them."""
    classes = logits = 0
    for image, row in zip(images, _classify(program, artifact, images), strict=True):
        found = artifact.run(model_input(artifact, [image])[0])[0]
        pairs = list(zip(best_classes(found, 5, artifact.labels), row["top"], strict=True))
        classes += all(ours["class"] == theirs["class"] for ours, theirs in pairs)
        logits += all(ours["logit"] == theirs["logit"] for ours, theirs in pairs)
    return classes, logits


def against_python(program: Path, artifact: Artifact, pairs: int) -> tuple[float, float, float]:
    """Return fastest milliseconds of a run in C++ and in Python, and the median ratio of pairs."""
    x = np.full((artifact.batch, *artifact.input_shape), 0.5, np.float32)
    ours, theirs = [], []
    # The child inherits the core, and waits while this process runs.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with subprocess.Popen([str(program), str(artifact.path)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        for i in range(pairs + 5):
            child.stdin.write("\n")
            child.stdin.flush()
            answer = int(child.stdout.readline())
            start = time.perf_counter_ns()
            artifact.run(x)
            if i >= 5:
                theirs.append(time.perf_counter_ns() - start)
                ours.append(answer)
        child.stdin.close()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return min(ours) / 1e6, min(theirs) / 1e6, statistics.median(ratios)


def first_result(program: Path, artifact: Artifact, image: Path, times: int = 7) -> float:
    """Return the median seconds of a process that classifies one image."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        _classify(program, artifact, [image])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> int:
    """Measure, print, and end with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artefact")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    artifact = load(options.artefact, threads=1)
    with tempfile.TemporaryDirectory(prefix="vitq_") as scratch:
        folder = Path(scratch)
        classify, timed = build_programs(folder / "build")
        images = list_images(options.images)[: options.limit]
        for i in range(0, len(images), 4):
            shown = folder / f"{images[i].stem}.png"
            Image.open(images[i]).convert("RGB").save(shown)
            images[i] = shown
        classes, logits = same_classes(classify, artifact, images)
        seconds = first_result(classify, artifact, images[-1])
        ours, theirs, ratio = against_python(timed, artifact, options.pairs)
    print(f"same five best classes on {classes} of {len(images)} images, same logits on {logits}")
    print(f"start to first result: {seconds:.3f} s")
    print(f"a run: C++ {ours:.3f} ms, Python {theirs:.3f} ms, ratio {ratio:.4f}")
    return int(classes < len(images) or seconds > 1 or ratio > 1.02)


if __name__ == "__main__":
    sys.exit(main())
