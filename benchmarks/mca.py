"""Inner loops of the matmul kernels, as LLVM's machine model of a processor runs them.

Run: ``python -m benchmarks.mca [--json FILE]``. Each kernel is compiled for a processor (any),
the basic block with the most multiply instructions is cut out of its assembly, and ``llvm-mca`` (16
or newer; Debian's ``llvm-NN``) simulates it in a loop. The multiply issue limit is the time that
the processor needs to issue the block's multiply instructions alone; the share is that over the
time of the whole block. Loads are taken to hit the first-level cache, as the model does. Where
additions use the multipliers' ports (x86 but for VNNI), the limit cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schedules.dot import Dot
from schedules.isa import resolve_target
from tests.helpers.kernels import linear_case

__all__ = ["KERNELS", "Loop", "inner_loop", "mca", "measure", "multiplies_of"]

SHAPE = (197, 192, 192)
SHORT = "short"
"""int8 activations and weights that keep the sums of two groups within int16."""
KERNELS = [("znver3", SHORT), ("znver3", "int8"), ("skylake", SHORT), ("skylake-avx512", SHORT),
           ("icelake-server", "int8"), ("znver4", "int8"),
           ("cortex-a76", "int8"), ("cortex-a76", "int16"), ("neoverse-n1", "int8"),
           ("neoverse-n2", "int8"), ("neoverse-n2", "uint8"), ("neoverse-n2", "int16"),
           ("neoverse-v1", "int8"), ("cortex-a72", "int8"), ("cortex-a72", "int16"),
           ("cortex-a53", "int8")]
"""Processors and dtypes of the activations."""

_ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """One inner loop and what the model says of it, cycles by iteration."""

    cpu: str
    dot: str
    instructions: int
    multiplies: int
    cycles: float
    limit: float

    @property
    def share(self) -> float:
        """Share of the multiply issue limit that is reached."""
        return self.limit / self.cycles


def mca() -> str:
    """Return the newest ``llvm-mca`` that knows the processors, "" if there is none."""
    for version in range(40, 15, -1):
        if shutil.which(f"llvm-mca-{version}"):
            return f"llvm-mca-{version}"
    return ""


def multiplies_of(dot: Dot) -> tuple[str, ...]:
    """Return the multiply instructions of a dot sequence."""
    if dot.mnemonic == "smlal":
        return ("smull", "smull2", "smlal", "smlal2")
    if getattr(dot, "widen", ""):
        return (dot.mnemonic, "vpmaddwd")
    return (dot.mnemonic,)


def inner_loop(asm: str, multiplies: Sequence[str]) -> list[str]:
    """Return the instructions of the basic block with the most multiplies, its branch included."""
    blocks: list[list[str]] = [[]]
    for line in asm.splitlines():
        # x86 writes registers with %, and comments behind #, which are immediates on AArch64.
        word = line.split("#" if "%" in line else "//")[0].strip()
        if re.match(r"[\w.$]+:", word):
            blocks.append([])
        elif word and not word.startswith("."):
            blocks[-1].append(word)
            if re.match(r"(b|b\.\w+|cbn?z|tbn?z|ret|j\w+)\s", word):
                blocks.append([])
    return max(blocks, key=lambda block: sum(word.split()[0] in multiplies for word in block))


def measure(cpu: str, dtype: str, tool: str) -> Loop:
    """Compile the weight matmul for a processor and simulate its inner loop.

    Parameters
    ----------
    cpu
        LLVM's name of the processor.
    dtype
        Of the activations, or :data:`SHORT`.
    tool
        What :func:`mca` found.
    """
    short = dtype == SHORT
    case = linear_case(*SHAPE, cpu, dtype="int8" if short else dtype,
                       largest_weight=31 if short else 127)
    x86 = "x86_64" in str(resolve_target(cpu).attrs.get("mtriple", "x86_64"))
    triple = "x86_64-linux-gnu" if x86 else "aarch64-linux-gnu"
    multiplies = multiplies_of(case.plan.dot)
    block = inner_loop(case.build().asm, multiplies)
    command = [tool, f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={_ITERATIONS}",
               "--json", "-"]
    done = subprocess.run(command, input="\n".join(block), capture_output=True, text=True,
                          check=True)
    (region,) = json.loads(done.stdout)["CodeRegions"]
    views: dict[str, Any] = region
    costs = views["InstructionInfoView"]["InstructionList"]
    names = [text.split()[0] for text in views["Instructions"]]
    limit = sum(cost["RThroughput"] for name, cost in zip(names, costs, strict=True)
                if name in multiplies)
    cycles = views["SummaryView"]["TotalCycles"] / _ITERATIONS
    count = Counter(names)
    return Loop(cpu, case.plan.dot.name, len(names), sum(count[name] for name in multiplies),
                cycles, limit)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tool = mca()
    if not tool:
        raise SystemExit("no llvm-mca of LLVM 16 or newer; on Debian: apt-get install llvm-19")
    print(f"weight matmul {SHAPE}, inner loop, {tool}")
    print(f"{'processor':14s} {'sequence':13s} {'instructions':>12s} {'multiplies':>10s} "
          f"{'cycles':>8s} {'limit':>8s} {'share':>7s}")
    rows = [measure(cpu, dtype, tool) for cpu, dtype in KERNELS]
    for row in rows:
        print(f"{row.cpu:14s} {row.dot:13s} {row.instructions:12d} {row.multiplies:10d} "
              f"{row.cycles:8.1f} {row.limit:8.1f} {row.share:7.1%}")
    if options.json:
        options.json.write_text(json.dumps([{**vars(row), "share": row.share} for row in rows]))


if __name__ == "__main__":
    main()
