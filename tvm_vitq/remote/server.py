"""A server for boards without Python: ``vitq_rpc_server`` and TVM's runtime in one folder."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tvm_vitq.artifact.toolchain import compiler, include_folders, reason, runtime_libraries

__all__ = ["ARCHITECTURES", "PROGRAM", "package_server"]

ARCHITECTURES = ("aarch64", "x86_64")
PROGRAM = "vitq_rpc_server"
_SOURCES = Path(__file__).parents[1] / "artifact" / "cpp"


def package_server(output: str | Path, architecture: str | None = None) -> dict[str, Any]:
    """Build the server for an architecture and put TVM's runtime libraries beside it.

    Parameters
    ----------
    output
        The folder; it must not exist, or be empty.
    architecture
        Of the board, one of :data:`ARCHITECTURES`; None is this machine's.

    Returns
    -------
    dict
        ``output``, ``architecture``, ``files`` (bytes by name) and ``bytes`` of them all.

    Raises
    ------
    VitqError
        If the folder is in use or cannot be written, or the compiler or TVM's runtime of that
        architecture is not to be had.
    """
    output, wanted = Path(output), architecture or host_architecture()
    if wanted not in ARCHITECTURES:
        raise VitqError(f"there is no server for {wanted}; use {' or '.join(ARCHITECTURES)}")
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise VitqError(f"cannot write {output}: it is there already; name another folder")
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            draft = Path(scratch) / "server"
            _fill(draft, wanted)
            files = {str(path.relative_to(draft)): path.stat().st_size
                     for path in sorted(draft.rglob("*")) if path.is_file()}  # fmt: skip
            draft.replace(output)
    except OSError as why:
        raise VitqError(f"cannot write {output}: {why.strerror or why}") from why
    return {
        "output": str(output),
        "architecture": wanted,
        "files": files,
        "bytes": sum(files.values()),
    }


def _fill(folder: Path, architecture: str) -> None:
    command = [compiler(architecture), "-std=c++17", "-O2", "-DNDEBUG", "-s", "-pthread"]
    libraries = runtime_libraries(architecture)
    (folder / "lib").mkdir(parents=True)
    for library in libraries:
        shutil.copyfile(library, folder / "lib" / library.name)
    command += [f"-I{path}" for path in (_SOURCES / "include", *include_folders())]
    command += [str(_SOURCES / f"{PROGRAM}.cpp"), "-o", str(folder / PROGRAM)]
    # The runtime registers what is called by name: it must not be dropped as unused.
    command += ["-Wl,-rpath,$ORIGIN/lib", "-Wl,--no-as-needed", *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VitqError(f"{PROGRAM} does not build for {architecture}: {reason(done.stderr)}")
