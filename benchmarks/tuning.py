"""What tuning brings: a module compiled with and without records, run turn about, task by task.

Run: ``python -m benchmarks.tuning MODEL.vitq --records DIR [--target native] [--pairs 60]``. The
records are those of ``tvm-vitq tune``. The artefacts' logits must be equal. Every task whose best
is not the default is timed beside the default's kernel again, in new processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.pipeline import lower
from schedules.isa import isa_for, resolve_target
from schedules.records import Schedules
from schedules.space import space_of
from tvm_vitq.artifact.load import load
from tvm_vitq.bench.worker import Worker, cores
from tvm_vitq.compiler import compile_module
from tvm_vitq.saved import load_quantized
from tvm_vitq.tuning.build import Builders
from tvm_vitq.tuning.extract import extract
from tvm_vitq.tuning.runner import LocalRunner


def whole(artefacts: list[Path], folder: Path, threads: int, pairs: int) -> list[float]:
    """Return the first artefact's time over the second's, pair by pair."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(path.stem, {
                "runner": "tvm-vitq", "artifact": str(path), "threads": threads,
                "cores": cores(threads), "folder": str(folder / path.stem)}))
            for path in artefacts]  # fmt: skip
        for worker in workers:
            worker.ask("warm", runs=5)
        ratios = []
        for number in range(pairs):
            order = (0, 1) if number % 2 else (1, 0)
            times = {i: workers[i].turn() for i in order}
            ratios.append(times[0] / times[1])
    return ratios


def by_task(mod: Any, target: str, records: str, threads: int, rounds: int) -> dict[str, float]:
    """Return the default's time over the best's, for every task whose best is another."""
    isa = isa_for(resolve_target(target))
    known, found = Schedules.of_folder(isa, records, threads), {}
    builders = Builders(target, 2)
    try:
        for job in extract(lower(mod), isa):
            point, space = known.point(job.task), space_of(job.task, isa)
            if point is None or space is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                built = builders.build(job, [space.default, point], Path(folder))
                base, best = (Path(made) for made in built)
                runner = LocalRunner(target, threads, cores(threads))
                comparison = runner.compare(job, base, best, rounds)
                runner.close()
            found[f"{job.calls} x {job.task}"] = round(1 / comparison.ratio, 4)
            print(f"{1 / comparison.ratio:7.3f} (noise {comparison.noise:.3f})  "
                  f"{job.calls:3d} x {job.task}", flush=True)  # fmt: skip
    finally:
        builders.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--records", required=True)
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mod = load_quantized(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / "default.so", folder / "tuned.so"]
        for path, records in zip(paths, ("none", options.records), strict=True):
            made = compile_module(mod, options.target, path, records=records,
                                  threads=options.threads)  # fmt: skip
            print(f"{path.stem}: {made.metadata['schedules']}")
        artefacts = [load(path, options.threads) for path in paths]
        shape = (artefacts[0].batch, *artefacts[0].input_shape)
        x = np.random.default_rng(1).standard_normal(shape).astype("float32")
        if artefacts[0].input_dtype == "uint8":
            x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        logits = [artefact.run(x) for artefact in artefacts]
        assert np.array_equal(*logits), "tuning changed the logits"
        ratios = whole(paths, folder, options.threads, options.pairs)
    low, median, high = (float(np.percentile(ratios, p)) for p in (10, 50, 90))
    print(f"whole run: default over tuned {median:.4f} (10-90 %: {low:.3f}-{high:.3f})")
    tasks = by_task(mod, options.target, options.records, options.threads, 100)
    least = min(tasks.values(), default=1.0)
    print(f"tasks: least {least:.3f}, median {statistics.median(tasks.values() or [1.0]):.3f}")
    if options.json:
        options.json.write_text(json.dumps({"whole": median, "tasks": tasks}, indent=1))


if __name__ == "__main__":
    main()
