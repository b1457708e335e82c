"""The comparison with other runtimes, and the speed bars: ``make bench``.

``python -m benchmarks.compare [MODEL ...] [--batches 1,8] [--peers all] [--target T]`` compiles
DeiT-Ti (real weights), DeiT-S and Swin-T (random weights: times do not depend on them) from the
data of ``VITQ_DATA``, runs ``tvm-vitq bench`` on each, prints its tables and then the bars. Figures
and charts go to ``benchmarks/results``; only ratios inside one run count, and only on a machine
that does nothing else: ``load_average`` in the JSON tells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from tvm_vitq.cli.bench import tables

from .acceptance import DATA, ROOT, command

__all__ = ["MODELS", "bars", "main"]

RESULTS = ROOT / "benchmarks" / "results"
MODELS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}


def build(
    model: str, batch: int, folder: Path, samples: int, target: str
) -> tuple[Path, float]:
    """Compile one model; return the artefact and the seconds of its compilation proper."""
    library = folder / f"{model}_b{batch}.so"
    weights = DATA / "weights" / f"{model}.safetensors"
    known = ("--checkpoint", weights) if weights.is_file() else ()
    done, _, _ = command(
        "compile", model, *known, "--calib", DATA / "images" / "calib512", "--samples", samples,
        "--batch", batch, "--target", target, "-o", library,
    )  # fmt: skip
    seconds = done["seconds"]
    return library, sum(seconds.values()) - seconds.get("quantize", 0.0)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def bars(runs: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Compare what was measured with the bars.

    Parameters
    ----------
    runs
        What ``tvm-vitq bench --json`` printed, by ``model_bBATCH_tTHREADS``.

    Returns
    -------
    list of (what, bar, measured, met)
    """
    rows = []
    single = [run for run in runs.values() if run["threads"] == 1]
    for precision, mean, least in (("fp32", 2.0, 1.8), ("int8", 1.5, 1.3)):
        ratios = [run["fastest"][precision]["ratio"] for run in single
                  if precision in run["fastest"]]  # fmt: skip
        if ratios:
            found, worst = geometric_mean(ratios), min(ratios)
            rows.append((f"against the fastest {precision} peer", f"≥ {mean}×, none below {least}×",
                         f"{found:.2f}×, worst {worst:.2f}×",
                         found >= mean and worst >= least))  # fmt: skip
    small, small_two = runs.get("deit_small_b1_t1"), runs.get("deit_small_b1_t2")
    if small is not None and "layers" in small:
        weights = small["layers"]["weights"]
        share = weights["of_peak"] or 0.0
        rows.append(("DeiT-S weight matmuls, share of their sequences' peak", "≥ 85 %",
                     f"{share:.1%}", share >= 0.85))  # fmt: skip
        fast = sum(part for name, part in weights["work"].items()
                   if "vpmaddwd" not in name and "vpdpwssd" not in name)
        rows.append(("DeiT-S weight-matmul work on a sequence faster than vpmaddwd", "≥ 90 %",
                     f"{fast:.1%}", fast >= 0.9))  # fmt: skip
    tiny = runs.get("deit_tiny_b1_t1")
    if tiny is not None and "layers" in tiny:
        outside = tiny["layers"]["outside_matmuls"]
        rows.append(("DeiT-Ti, time outside matmuls", "≤ 20 %", f"{outside:.1%}", outside <= 0.2))
    if small is not None and small_two is not None:
        gain = small["results"][0]["median_ms"] / small_two["results"][0]["median_ms"]
        rows.append(("DeiT-S, two threads against one (two runs)", "≥ 1.7×",
                     f"{gain:.2f}×", gain >= 1.7))  # fmt: skip
    return rows


def measure(library: Path, name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run ``tvm-vitq bench`` on one artefact and keep what it wrote."""
    peers = options.peers if threads == 1 else "none"
    chart = ("--plot", RESULTS / f"{name}.png") if peers != "none" else ()
    document, _, _ = command(
        "bench", library, "--peers", peers, "--threads", threads, "--pairs", options.pairs,
        "--per-layer", *chart,
    )  # fmt: skip
    document["artifact"] = library.name
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def main() -> int:
    """Measure the named models (default: all) and print tables and bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="*", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--peers", default="all", help="as tvm-vitq bench takes them")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs for each peer")
    parser.add_argument("--samples", type=int, default=32, help="calibration images")
    parser.add_argument("--target", default="native", help="as tvm-vitq compile takes it")
    options = parser.parse_args()
    if unknown := set(options.model) - set(MODELS):
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if not DATA.is_dir():
        print(f"nothing to measure: {DATA} is not there; set VITQ_DATA", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    console = Console(highlight=False)
    runs: dict[str, dict[str, Any]] = {}
    for key in options.model or MODELS:
        for batch in (int(value) for value in options.batches.split(",")):
            with tempfile.TemporaryDirectory(prefix="vitq_") as folder:
                library, seconds = build(
                    MODELS[key], batch, Path(folder), options.samples, options.target)
                console.print(f"{key}, batch {batch}: compiled in {seconds:.0f} s")
                for threads in (1, 2) if (key, batch) == ("deit_small", 1) else (1,):
                    name = f"{key}_b{batch}_t{threads}"
                    runs[name] = measure(library, name, threads, options)
                    for table in tables(runs[name]):
                        console.print(table)
                    for left_out in runs[name]["skipped"]:
                        console.print(f"{left_out['runner']}: {left_out['reason']}", markup=False)
    print("\n| bar | wanted | measured | |\n|---|---|---|---|")
    for what, bar, found, met in bars(runs):
        print(f"| {what} | {bar} | {found} | {'met' if met else 'NOT MET'} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
