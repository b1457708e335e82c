"""A server for boards without Python: ``vitq_rpc_server`` and TVM's runtime in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tvm_vitq.artifact.device import ARCHITECTURES, add_runtime, build_program, write_folder

__all__ = ["PROGRAM", "package_server"]

PROGRAM = "vitq_rpc_server"


def package_server(output: str | Path, architecture: str | None = None) -> dict[str, Any]:
    """Build the server for an architecture and put TVM's runtime libraries beside it.

    Parameters
    ----------
    output
        The folder; it must not exist, or be empty.
    architecture
        Of the board, one of :data:`tvm_vitq.artifact.device.ARCHITECTURES`; None is this machine's.

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

    def fill(folder: Path) -> None:
        libraries = add_runtime(folder, wanted)
        build_program(folder / PROGRAM, wanted, libraries, [f"{PROGRAM}.cpp"], ["-O2"])

    files = write_folder(output, fill)
    return {
        "output": str(output),
        "architecture": wanted,
        "files": files,
        "bytes": sum(files.values()),
    }
