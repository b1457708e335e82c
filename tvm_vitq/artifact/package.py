"""Everything that a device takes to run an artefact, in one folder: no Python, nothing to install.

``vitq_classify`` and the artefact, ``lib/`` with TVM's two runtime libraries, which the program
finds beside itself wherever the folder lies, and ``run.sh``, which names the artefact. libjpeg and
libpng are linked into the program; the C and C++ libraries are the device's.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

from .device import ARCHITECTURES, add_runtime, build_program, write_folder
from .gpu import is_gpu
from .image_libraries import image_libraries
from .stored import StoredArtifact

__all__ = ["PROGRAM", "package"]

PROGRAM = "vitq_classify"
_VERSION = re.compile(rb"\0(GLIBC|GLIBCXX)_([0-9.]+)(?=\0)")
_RESERVED = (PROGRAM, "lib", "run.sh")
_RUN = """#!/bin/sh
# Classifies image files: ./run.sh PHOTO.jpg; ./run.sh --verify replays the golden vectors.
here=$(dirname "$(readlink -f "$0")")
exec "$here/{program}" "$here"/{artifact} "$@"
"""


def package(
    artifact: str | Path, output: str | Path, architecture: str | None = None
) -> dict[str, Any]:
    """Make the folder that a device takes.

    Parameters
    ----------
    artifact
        The artefact, of this or of another architecture.
    output
        The folder; it must not exist, or be empty.
    architecture
        Of the device, of :data:`tvm_vitq.artifact.device.ARCHITECTURES`; None is the artefact's.

    Returns
    -------
    dict
        ``artifact``, ``output``, ``architecture``, ``files`` (bytes by name), ``bytes`` of them
        all, and ``needs``: the least versions of the device's libraries, and its processor's
        features.

    Raises
    ------
    VitqError
        If the artefact is of another architecture or for a GPU, the folder is in use or cannot be
        written, or the compiler, TVM's runtime or the image libraries of that architecture are not
        to be had.
    """
    artifact, output = Path(artifact), Path(output)
    stored = StoredArtifact(artifact)
    machine, target = stored.machine, stored.metadata["target"]
    wanted = architecture or machine
    if wanted not in ARCHITECTURES:
        raise VitqError(f"cannot package for {wanted}; use {' or '.join(ARCHITECTURES)}")
    if is_gpu(target):
        raise VitqError(
            f"{artifact} is for an NVIDIA GPU ({target['arch']}) and what is packaged runs on a "
            f"processor; compile it again with --target {ARCHITECTURES[wanted]}"
        )
    if wanted != machine:
        raise VitqError(
            f"{artifact} was built for {machine}, not {wanted}; package it with --arch {machine}, "
            f"or compile it again with --target {ARCHITECTURES[wanted]}"
        )
    if artifact.name in _RESERVED:
        raise VitqError(f"{artifact} has the name of another file of the folder; rename it")
    features = target["features"]
    versions: dict[str, str] = {}

    def fill(folder: Path) -> None:
        _fill(folder, artifact, wanted)
        versions.update(_least_versions(folder))

    files = write_folder(output, fill)
    return {
        "artifact": str(artifact),
        "output": str(output),
        "architecture": wanted,
        "files": files,
        "bytes": sum(files.values()),
        "needs": {**versions, "features": features},
    }


def _fill(folder: Path, artifact: Path, architecture: str) -> None:
    libraries = add_runtime(folder, architecture)
    shutil.copyfile(artifact, folder / artifact.name)
    images = image_libraries(architecture)
    # The flags of the CMake project.
    build_program(folder / PROGRAM, architecture, libraries, [f"{PROGRAM}.cpp", "image_file.cpp"],
                  ["-O3", "-ffp-contract=off"], images.include, images.archives)  # fmt: skip
    run = folder / "run.sh"
    run.write_text(_RUN.format(program=PROGRAM, artifact=shlex.quote(artifact.name)))
    run.chmod(0o755)


def _least_versions(folder: Path) -> dict[str, str]:
    """Return the newest versions of the C and C++ libraries that the files ask for."""
    needed: dict[str, tuple[int, ...]] = {}
    for path in (folder / PROGRAM, *folder.rglob("*.so")):
        for library, version in _VERSION.findall(path.read_bytes()):
            numbers = tuple(int(part) for part in version.split(b"."))
            key = library.decode()
            needed[key] = max(needed.get(key, (0,)), numbers)
    return {key: ".".join(map(str, numbers)) for key, numbers in sorted(needed.items())}
