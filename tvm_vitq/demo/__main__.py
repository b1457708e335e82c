"""The main job on the embedded model: quantize, compile, prove, evaluate, time, draw.

``python -m tvm_vitq.demo [--output FOLDER]`` (``make demo``). Ends with status 1 if a proof fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# One thread for both sides, set before torch and tvm start their pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from tvm_vitq.demo import data_file, digits, digits_vit, normalise, pixels, write_images

__all__ = ["interleaved", "main", "run_demo"]

ARTIFACT, DIGITS, LOGITS = "digits_vit.so", "digits.png", "logits.png"


def interleaved(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> np.ndarray:
    """Time two functions in turn (A B A B ...) and return seconds ``[pairs, 2]``.

    Whatever else the machine does meets both alike, so the median of the pairs' ratios is worth
    more than either time. It is not the ratio of the medians.
    """
    seconds = np.empty((pairs, 2))
    for _ in range(10):
        first(), second()
    for row in seconds:
        for column, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            row[column] = time.perf_counter() - start
    return seconds


def run_demo(folder: Path, pairs: int = 200) -> dict[str, Any]:
    """Do the whole job with the digits model and return its figures.

    Parameters
    ----------
    folder : Path
        Receives the artefact, the pictures and the test digits as PNG files; made if absent.
    pairs : int
        Timed pairs of one float and one integer run.

    Returns
    -------
    dict
        ``n, float_top1, top1, agreement`` (percent), ``float_ms, ms`` (medians, batch 1, one
        thread), ``ratio`` (median of the pairs' ratios), ``float_bytes, size_bytes``,
        ``integer_only, ranges_proved, float_instructions, equal, vectors`` and ``seconds`` by
        phase.
    """
    import torch

    import tvm_vitq
    from tvm_vitq.demo.picture import draw_digits, draw_logits

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    clock = {"start": time.perf_counter()}

    calibration = normalise(pixels(digits("calib")[0]))
    module = tvm_vitq.load_model("tvm_vitq.demo:digits_vit")
    clock["import the model"] = time.perf_counter()
    quantized = tvm_vitq.quantize(module, calibration)
    clock["quantize"] = time.perf_counter()
    tvm_vitq.compile(quantized, output=folder / ARTIFACT, golden=calibration)
    clock["compile and prove"] = time.perf_counter()

    artifact = tvm_vitq.load(folder / ARTIFACT)
    proofs, golden = artifact.inspect(), artifact.verify()
    clock["inspect and verify"] = time.perf_counter()

    images, labels = digits("test")
    x = normalise(pixels(images))
    model = digits_vit()
    with torch.inference_mode():
        float_logits = model(torch.from_numpy(x)).numpy()
        logits = np.concatenate([artifact.run(one[None]) for one in x])
        one = torch.from_numpy(x[:1])
        times = interleaved(lambda: model(one), lambda: artifact.run(x[:1]), pairs)
    clock["evaluate and time"] = time.perf_counter()

    draw_digits(folder / DIGITS, images, labels, float_logits, logits)
    draw_logits(folder / LOGITS, float_logits, logits)
    write_images("test", folder / "digits", limit=32)
    clock["draw"] = time.perf_counter()

    guess, float_guess = logits.argmax(-1), float_logits.argmax(-1)
    names = list(clock)
    return {
        "n": len(labels),
        "float_top1": float((float_guess == labels).mean() * 100),
        "top1": float((guess == labels).mean() * 100),
        "agreement": float((guess == float_guess).mean() * 100),
        "float_ms": float(np.median(times[:, 0]) * 1e3),
        "ms": float(np.median(times[:, 1]) * 1e3),
        "ratio": float(np.median(times[:, 0] / times[:, 1])),
        "float_bytes": data_file("digits_vit.safetensors").stat().st_size,
        "size_bytes": (folder / ARTIFACT).stat().st_size,
        "integer_only": proofs["integer_only"],
        "ranges_proved": proofs["ranges_proved"],
        "float_instructions": proofs["float_instructions"],
        "equal": golden["equal"],
        "vectors": golden["vectors"],
        "logits_compared": golden["logits_compared"],
        "seconds": {b: clock[b] - clock[a] for a, b in pairwise(names)},
    }


def passed(figures: dict[str, Any]) -> bool:
    """Whether every proof of ``figures`` holds."""
    return bool(
        figures["integer_only"]
        and figures["ranges_proved"]
        and figures["float_instructions"] == 0
        and figures["equal"]
    )


def tables(figures: dict[str, Any]) -> list[Table]:
    """Lay ``figures`` out as two tables: float against integer, and the proofs."""
    versus = Table(title=f"Digits ViT, {figures['n']} test images", title_justify="left")
    versus.add_column("")
    for heading in ("float32 (torch)", "integer-only (.so)", ""):
        versus.add_column(heading, justify="right")
    versus.add_row(
        "top-1",
        f"{figures['float_top1']:.2f} %",
        f"{figures['top1']:.2f} %",
        f"{figures['top1'] - figures['float_top1']:+.2f} points",
    )
    versus.add_row("same prediction", "", f"{figures['agreement']:.2f} %", "")
    versus.add_row(
        "latency, batch 1, one thread",
        f"{figures['float_ms']:.3f} ms",
        f"{figures['ms']:.3f} ms",
        f"{figures['ratio']:.2f} x as fast, pair by pair",
    )
    share = figures["size_bytes"] / figures["float_bytes"] * 100
    versus.add_row(
        "size (weights / whole library)",
        f"{figures['float_bytes'] / 1e3:.0f} kB",
        f"{figures['size_bytes'] / 1e3:.0f} kB",
        f"{share:.0f} %, kernels included",
    )

    def verdict(holds: bool) -> str:
        return "[green]yes[/]" if holds else "[red]NO[/]"

    proofs = Table(title="Proofs", title_justify="left")
    proofs.add_column("claim")
    proofs.add_column("holds")
    proofs.add_column("how")
    proofs.add_row(
        "no float between input codes and logits",
        verdict(figures["integer_only"]),
        "dtype of every tensor and kernel in the IR",
    )
    proofs.add_row(
        "nothing can overflow",
        verdict(figures["ranges_proved"]),
        "intervals from the actual weights and code ranges",
    )
    proofs.add_row(
        "no floating-point instruction",
        verdict(figures["float_instructions"] == 0),
        f"disassembly of the library, boundary aside: {figures['float_instructions']}",
    )
    proofs.add_row(
        "compiled equals the reference",
        verdict(figures["equal"]),
        f"{figures['vectors']} golden vectors, {figures['logits_compared']} logits, bit for bit",
    )
    return [versus, proofs]


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration, print its tables and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tvm_vitq.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the results")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    start = time.perf_counter()
    with console.status("quantizing, compiling and running the digits model ..."):
        figures = run_demo(options.output)
    console.print()
    for table in tables(figures):
        console.print(table)
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in figures["seconds"].items())
    console.print(f"{phases}; {time.perf_counter() - start:.1f} s in all", style="dim")
    console.print("written:", *(str(options.output / name) for name in (ARTIFACT, DIGITS, LOGITS)))
    console.print(
        "try next:\n"
        f"  tvm-vitq run {options.output / ARTIFACT} {options.output}/digits/img/test_0000.png\n"
        f"  tvm-vitq inspect {options.output / ARTIFACT}",
        highlight=False,
    )
    return 0 if passed(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
