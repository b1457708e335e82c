"""Instructions executed for one inference on AArch64, counted under qemu.

Run: ``python -m benchmarks.arm_instructions ARTEFACT [--cpu neoverse-n1]``; for any other program
``python -m benchmarks.arm_instructions --command "PROGRAM … {n}"``, which must do ``n`` inferences.
The difference between two inferences and one is reported, so starting up costs nothing. Counts are
exact and do not depend on the machine; they say nothing of how long an instruction takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from tvm_vitq.artifact.emulate import Emulator, write_tensor

__all__ = ["count", "count_artifact"]

_PLUGIN = Path(__file__).with_name("qemu_count.c")


def count(command: list[str], cpu: str, scratch: Path, sysroot: str) -> int:
    """Return how many instructions an AArch64 program executes.

    Parameters
    ----------
    command
        The program and its arguments.
    cpu
        qemu's name of the processor.
    scratch
        A folder for the plugin and what it writes.
    sysroot
        Folder of the program's C library.
    """
    plugin, out = scratch / "count.so", scratch / "count.txt"
    if not plugin.exists():
        build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(plugin), str(_PLUGIN)]
        subprocess.run(build, check=True)
    environment = {**os.environ, "COUNT_OUT": str(out), "TVM_NUM_THREADS": "1"}
    start = ["qemu-aarch64", "-L", sysroot, "-cpu", cpu, "-plugin", str(plugin)]
    subprocess.run([*start, *command], env=environment, check=True, capture_output=True)
    rows = [line.split() for line in out.read_text().splitlines()]
    return sum(int(size) * int(runs) for _, size, runs in rows)


def count_artifact(path: str, cpu: str, scratch: Path, sysroot: str) -> int:
    """Return the instructions of one inference (``main_codes``) of an artefact."""
    emulator = Emulator("qemu-aarch64", "aarch64", scratch)
    (codes,) = emulator.call(path, [("vitq_golden_inputs", [])])
    (raw,) = emulator.call(path, [("vitq_metadata", [])])
    spec = json.loads(raw.tobytes())["input"]["codes"]
    write_tensor(scratch / "codes.in", codes[: spec["shape"][0]].astype(spec["dtype"]))
    call = f"main_codes={scratch / 'codes.in'}"
    program = [str(emulator.program), str(Path(path).resolve()), str(scratch)]
    one, two = (count([*program, *[call] * n], cpu, scratch, sysroot) for n in (1, 2))
    return two - one


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", nargs="?")
    parser.add_argument("--command")
    parser.add_argument("--cpu", default="neoverse-n1")
    parser.add_argument("--sysroot", default="/usr/aarch64-linux-gnu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.command:
            words = [shlex.split(options.command.format(n=n)) for n in (1, 2)]
            one, two = (count(w, options.cpu, scratch, options.sysroot) for w in words)
            total = two - one
        else:
            total = count_artifact(options.artefact, options.cpu, scratch, options.sysroot)
    print(f"{total / 1e6:.1f} million instructions for one inference on {options.cpu}")


if __name__ == "__main__":
    main()
