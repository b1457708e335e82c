"""The acceptance table: compile cost, paired accuracy, size and proofs, through the command line.

``python -m benchmarks.acceptance [CASE ...]`` (``make acceptance``) prints Markdown. It needs the
data of ``VITQ_DATA``; latency against ONNX Runtime fp32 is interleaved, one thread: only the ratio
counts, absolute times are the machine's noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CASES", "Case", "main", "measure"]

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("VITQ_DATA") or ROOT.parent / "shared" / "data").expanduser()


@dataclass(frozen=True)
class Case:
    """One row: a model, what it is calibrated on and evaluated on, and options of ``compile``."""

    title: str
    model: str
    weights: str
    calib: str
    sets: tuple[str, ...]
    options: tuple[str, ...] = ()


def swin(options: tuple[str, ...] = ()) -> Case:
    """Make the case of the small Swin, whose arguments are in the data."""
    path = DATA / "weights" / "swin_micro_cifar10.json"
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    flags = [f"--{key}={','.join(map(str, spec.get(key, [])))}" for key in ("mean", "std")]
    arguments = json.dumps(spec.get("arguments", {}))
    return Case(
        "small Swin",
        f"timm.models.swin_transformer:SwinTransformer?{arguments}",
        "swin_micro_cifar10",
        "cifar10_calib500",
        ("cifar10_test2000",),
        ("--crop-pct=1", "--input-size=32", *flags, *options),
    )


DEIT = "deit_tiny_patch16_224"
IMAGENET = ("val650", "nips500")
CASES = {
    "deit": Case("DeiT-Ti", DEIT, DEIT, "calib512", IMAGENET),
    "deit-poly": Case("DeiT-Ti, poly", DEIT, DEIT, "calib512", IMAGENET, ("--nonlinear=poly",)),
    "deit-shift": Case("DeiT-Ti, shift", DEIT, DEIT, "calib512", IMAGENET, ("--nonlinear=shift",)),
    "swin": swin(),
}


def command(verb: str, *arguments: object) -> tuple[dict[str, Any], float, int]:
    """Run one ``tvm-vitq`` verb; return its JSON, wall seconds and peak bytes."""
    line = [sys.executable, "-m", "tvm_vitq.cli", verb, *map(str, arguments), "--json"]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(line, stdout=out, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with status {process.returncode}")
    return json.loads(text), seconds, usage.ru_maxrss * 1024


def measure(case: Case, folder: Path, samples: int = 128) -> dict[str, Any]:
    """Compile, evaluate, inspect and time one case.

    Parameters
    ----------
    case : Case
    folder : Path
        Receives the artefact.
    samples : int
        Calibration images.

    Returns
    -------
    dict
        One row of the table.
    """
    library, weights = folder / "model.so", DATA / "weights" / f"{case.weights}.safetensors"
    _, seconds, peak = command(
        "compile", case.model, "--checkpoint", weights, "--calib", DATA / "images" / case.calib,
        "--samples", samples, "-o", library, *case.options,
    )  # fmt: skip
    parts = [
        command("eval", library, "--images", DATA / "images" / name, "--against-float", weights)[0]
        for name in case.sets
    ]
    n = sum(part["n"] for part in parts)
    row: dict[str, Any] = {
        key: sum(part[key] * part["n"] for part in parts) / n
        for key in ("top1", "float_top1", "agreement")
    }
    report = command("inspect", library)[0]
    golden = command("verify", library)[0]
    bench = command("bench", library, "--peers", "ort-fp32", "--pairs", 40)[0]["results"]
    peer = next(entry for entry in bench if entry["runner"] != "tvm-vitq")
    ours = next(entry for entry in bench if entry["runner"] == "tvm-vitq")
    return {
        "case": case.title,
        "n": n,
        **row,
        "compile_s": seconds,
        "peak_bytes": peak,
        "size_percent": report["size_percent"],
        "integer_only": report["integer_only"],
        "ranges_proved": report["ranges_proved"],
        "float_instructions": report["float_instructions"],
        "golden_equal": golden["equal"],
        "peer_ms": peer["median_ms"],
        "ms": ours["median_ms"],
        "ratio": peer["ratio"],
    }


HEADER = (
    "| model | images | float top-1 | integer top-1 | same prediction | compile | peak "
    "| size of fp32 | proofs | ONNX Runtime fp32 / ours |\n" + "|---" * 10 + "|"
)


def markdown(row: dict[str, Any]) -> str:
    """Format one row."""
    proofs = (
        row["integer_only"] and row["ranges_proved"] and row["golden_equal"]
        and row["float_instructions"] == 0
    )  # fmt: skip
    return (
        f"| {row['case']} | {row['n']} | {row['float_top1']:.2f} % | {row['top1']:.2f} % "
        f"| {row['agreement']:.2f} % | {row['compile_s']:.0f} s "
        f"| {row['peak_bytes'] / 2**30:.2f} GiB "
        f"| {row['size_percent']:.1f} % | {'all hold' if proofs else 'FAIL'} "
        f"| {row['peer_ms']:.1f} / {row['ms']:.1f} ms = {row['ratio']:.2f} |"
    )


def main() -> int:
    """Measure the named cases (default: all) and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    options = parser.parse_args()
    if unknown := set(options.case) - set(CASES):
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    if not DATA.is_dir():
        print(f"nothing to measure: {DATA} is not there; set VITQ_DATA", file=sys.stderr)
        return 2
    print(HEADER, flush=True)
    for key in options.case or CASES:
        with tempfile.TemporaryDirectory(prefix="vitq_") as folder:
            print(markdown(measure(CASES[key], Path(folder), options.samples)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
