"""A GPU for TVM's CUDA runtime on a machine without one: see ``driver.cpp``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["replay", "tune"]

_HERE = Path(__file__).resolve().parent
_CUDART, _CUDA = "libcudart.so.13", "libcuda.so.1"


def _driver(folder: Path) -> None:
    version = folder / "version.map"
    version.write_text(f"{_CUDART} {{ global: *; }};\n")
    empty = folder / "empty.cpp"
    empty.write_text("int vitq_empty;\n")
    # All is in libcudart; libcuda is there because it is asked for.
    for name, source, more in ((_CUDART, _HERE / "driver.cpp", [f"-Wl,--version-script={version}"]),
                               (_CUDA, empty, [])):
        subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{name}",
                        *more, "-o", str(folder / name), str(source), "-ldl"], check=True)


def _run(script: str, folder: Path, *arguments: Path) -> dict[str, Any]:
    """Return what a script tells; ``folder`` receives the driver."""
    _driver(folder)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder),
                   "PYTHONPATH": str(_HERE.parents[2])}
    done = subprocess.run([sys.executable, str(_HERE / script), *map(str, arguments)],
                          capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def replay(artifact: Path, folder: Path) -> dict[str, Any]:
    """Return what ``replay.py`` tells of an artefact."""
    return _run("replay.py", folder, artifact)


def tune(module: Path, records: Path, folder: Path) -> dict[str, Any]:
    """Return what ``tune.py`` tells of a quantized module."""
    return _run("tune.py", folder, module, records)
