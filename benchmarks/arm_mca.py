"""Inner loops of the AArch64 matmul kernels, as LLVM's machine model of a processor runs them.

Run: ``python -m benchmarks.arm_mca [--json FILE]``. Each kernel is cross-compiled for a processor,
the basic block with the most multiply instructions is cut out of its assembly, and ``llvm-mca`` (16
or newer; Debian's ``llvm-NN``) simulates it in a loop. The multiply issue limit is the time that
the processor needs to issue the block's multiply instructions alone; the share is that over the
time of the whole block. Loads are taken to hit the first-level cache, as the model does.
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
from tests.helpers.kernels import linear_case

__all__ = ["KERNELS", "Loop", "inner_loop", "mca", "measure", "multiplies_of"]

SHAPE = (197, 192, 192)
KERNELS = [("cortex-a76", "int8"), ("cortex-a76", "int16"), ("neoverse-n1", "int8"),
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
    return (dot.mnemonic,)


def inner_loop(asm: str, multiplies: Sequence[str]) -> list[str]:
    """Return the instructions of the basic block with the most multiplies, its branch included."""
    blocks: list[list[str]] = [[]]
    for line in asm.splitlines():
        word = line.split("//")[0].strip()
        if re.match(r"[\w.$]+:", word):
            blocks.append([])
        elif word and not word.startswith("."):
            blocks[-1].append(word)
            if re.match(r"(b|b\.\w+|cbn?z|tbn?z|ret)\s", word):
                blocks.append([])
    return max(blocks, key=lambda block: sum(word.split()[0] in multiplies for word in block))


def measure(cpu: str, dtype: str, tool: str) -> Loop:
    """Compile the weight matmul for a processor and simulate its inner loop.

    Parameters
    ----------
    cpu
        LLVM's name of the processor.
    dtype
        Of the activations.
    tool
        What :func:`mca` found.
    """
    case = linear_case(*SHAPE, cpu, dtype=dtype)
    multiplies = multiplies_of(case.plan.dot)
    block = inner_loop(case.build().asm, multiplies)
    command = [tool, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", f"-iterations={_ITERATIONS}",
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
    print(f"{'processor':14s} {'sequence':9s} {'instructions':>12s} {'multiplies':>10s} "
          f"{'cycles':>8s} {'limit':>8s} {'share':>7s}")
    rows = [measure(cpu, dtype, tool) for cpu, dtype in KERNELS]
    for row in rows:
        print(f"{row.cpu:14s} {row.dot:9s} {row.instructions:12d} {row.multiplies:10d} "
              f"{row.cycles:8.1f} {row.limit:8.1f} {row.share:7.1%}")
    if options.json:
        options.json.write_text(json.dumps([{**vars(row), "share": row.share} for row in rows]))


if __name__ == "__main__":
    main()
