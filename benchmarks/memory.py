"""Memory of a run above the weights: what the compiler plans, and what a process really takes.

``python -m benchmarks.memory MODEL [--target T] [--samples N]`` compiles a module that
``tvm-vitq compile --save-quantized`` wrote and prints Markdown. *Planned* is the storage that the
static plan gives to activations, which the virtual machine's pool hands out again at every run,
and the largest scratch of one kernel, once a thread. *Measured* is what the resident memory of a
fresh process grows by at its first run and over the runs after it; the weights are resident
before, since loading an artefact copies them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

__all__ = ["main", "measure", "planned"]

MIB = float(1 << 20)

_CHILD = """
import json, sys
import numpy as np
from tvm_vitq.artifact.load import load

def resident(key="VmRSS"):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

artifact = load(sys.argv[1], threads=int(sys.argv[2]))
image = np.zeros((artifact.batch, *artifact.input_shape), artifact.input_dtype)
loaded = resident()
artifact.run(image)
first = resident()
for _ in range(int(sys.argv[3])):
    artifact.run(image)
later, peak = resident(), resident("VmHWM")
print(json.dumps({"loaded": loaded, "first_run": first - loaded, "later_runs": later - first,
                  "peak": max(peak - loaded, 0)}))
"""


def _bytes(shape: Sequence[Any], dtype: str) -> int:
    return math.prod(int(extent) for extent in shape) * (tvm.DataType(dtype).bits // 8)


def planned(mod: tvm.IRModule) -> dict[str, int]:
    """Return the memory that a VM-ready module plans for one run.

    Parameters
    ----------
    mod
        What ``relay_passes.pipeline.build_passes`` made.

    Returns
    -------
    dict
        ``storage``: bytes of activations, ``pieces`` the number of allocations that they are in;
        ``scratch``: bytes of the kernel that takes the most, per thread.

    Raises
    ------
    ValueError
        If a size is not known when compiling: then the plan is not static.
    """
    sizes: list[int] = []

    def storage(node: Any) -> None:
        if isinstance(node, relax.Call) and isinstance(node.op, tvm.ir.Op):
            if node.op.name == "relax.builtin.alloc_tensor":
                raise ValueError(f"{node.op.name}: a tensor outside of the static plan")
            if node.op.name == "relax.vm.alloc_storage":
                extents = list(node.args[0].values)
                if not all(isinstance(extent, tirx.IntImm) for extent in extents):
                    raise ValueError(f"storage of unknown size {extents}")
                sizes.append(_bytes(extents, str(node.args[2].value)))

    scratch = [0]
    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function.body, storage)
        elif isinstance(function, tirx.PrimFunc):
            scratch.append(_scratch(function))
    return {"storage": sum(sizes), "pieces": len(sizes), "scratch": max(scratch)}


def _scratch(function: tirx.PrimFunc) -> int:
    """Bytes of all buffers that a kernel allocates."""
    sizes: dict[Any, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tirx.AllocBuffer):
            sizes[node.buffer] = _bytes(node.buffer.shape, str(node.buffer.dtype))
        elif isinstance(node, s_tir.SBlock):
            sizes.update({b: _bytes(b.shape, str(b.dtype)) for b in node.alloc_buffers})

    tvm_ffi.structural_walk(function, (object, visit))
    return sum(sizes.values())


def measure(artifact: str | Path, threads: int = 1, runs: int = 20) -> dict[str, int]:
    """Run an artefact in a fresh process and return what its resident memory does, in bytes.

    Returns
    -------
    dict
        ``loaded``: before the first run; ``first_run`` and ``later_runs``: growth; ``peak``: the
        most at any time above ``loaded``.
    """
    line = [sys.executable, "-c", _CHILD, str(artifact), str(threads), str(runs)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Compile a saved module, print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="quantized module, from compile --save-quantized")
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    from relay_passes.pipeline import build_passes, lower
    from schedules.isa import isa_for
    from tvm_vitq.compiler import compile_module, resolve
    from tvm_vitq.saved import load_quantized

    quantized, (_, target) = load_quantized(options.model), resolve(options.target)
    with target:
        kernels = tvm.transform.Sequential(build_passes(isa_for(target)))(lower(quantized))
    plan = planned(kernels)
    with tempfile.TemporaryDirectory(prefix="vitq_") as folder:
        path = Path(folder) / "model.so"
        compile_module(quantized, options.target, path)
        found = measure(path, options.threads)
    total = plan["storage"] + options.threads * plan["scratch"]
    print("| planned storage | kernel scratch | together | first run | later runs | peak |")
    print("|---" * 6 + "|")
    cells = [plan["storage"], plan["scratch"], total, *list(found.values())[1:]]
    print("| " + " | ".join(f"{value / MIB:.2f} MiB" for value in cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
