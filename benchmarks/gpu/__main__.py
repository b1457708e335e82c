"""``python -m benchmarks.gpu``: make a bundle here, run it on a machine with a GPU, show results.

``bundle`` compiles the networks and packs everything that the runner needs; ``table`` prints kept
results and the bars. What the runner does is in ``benchmarks/gpu/README.md``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from relay_passes.errors import VitqError

from .runner.report import load_results, tables

__all__ = ["RESULTS", "main"]

RESULTS = Path(__file__).resolve().parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    bundle = verbs.add_parser("bundle", help="make a folder and an archive that travel")
    bundle.add_argument("-o", "--output", type=Path, required=True,
                        help="folder to make; the archive is beside it")  # fmt: skip
    bundle.add_argument("--models", nargs="+", help="[all]")
    bundle.add_argument("--batch", nargs="+", type=int, default=[8, 1, 64], help="[8 1 64]")
    bundle.add_argument("--arch", default="sm_90a",
                        help="target of tvm-vitq compile [sm_90a: H100 and H200]")  # fmt: skip
    bundle.add_argument("--inputs", type=int, default=64, help="inputs with known logits [64]")
    bundle.add_argument("--samples", type=int, default=128, help="calibration images [128]")
    bundle.add_argument("--quantized", type=Path, help="folder to keep quantized models in")
    bundle.add_argument("--verify-with", metavar="emulator",
                        help="replay golden vectors: emulator, of a GPU")  # fmt: skip
    table = verbs.add_parser("table", help="print results and bars")
    table.add_argument("files", nargs="*", type=Path, help="[benchmarks/gpu/results/*.json]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.verb == "table":
            files = options.files or sorted(RESULTS.glob("*.json"))
            if not files:
                print("no results yet: see benchmarks/gpu/README.md")
            print("\n\n".join(f"{path}\n{tables(load_results(path))}" for path in files))
            return 0
        return _bundle(options)
    except (VitqError, OSError, ValueError) as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130


def _bundle(options: argparse.Namespace) -> int:
    from .bundle import LIMIT, make
    from .networks import NETWORKS

    names = options.models or list(NETWORKS)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise VitqError(f"no model {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {text}", flush=True)

    chosen = {name: NETWORKS[name] for name in names}
    path = make(options.output, chosen, options.batch, options.arch, options.inputs,
                options.samples, options.quantized, options.verify_with, say)  # fmt: skip
    say(f"{path}: {path.stat().st_size / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
