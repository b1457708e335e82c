"""Folders that a device takes: a program built for it beside TVM's two runtime libraries."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from relay_passes.errors import VitqError

from .toolchain import compiler, include_folders, reason, runtime_libraries

__all__ = ["ARCHITECTURES", "add_runtime", "build_program", "write_folder"]

ARCHITECTURES = {"aarch64": "aarch64", "x86_64": "x86-64-v3"}
"""Those of the C++ header, each with a target that ``tvm-vitq compile`` builds for."""

_SOURCES = Path(__file__).with_name("cpp")


def write_folder(output: Path, fill: Callable[[Path], None]) -> dict[str, int]:
    """Make a folder, whole or not at all.

    Parameters
    ----------
    output
        The folder; it must not exist, or be empty.
    fill
        Makes the folder that it is given, and what is in it.

    Returns
    -------
    dict
        Bytes by the name of the file.

    Raises
    ------
    VitqError
        If the folder is in use or cannot be written, or as ``fill``.
    """
    _check(output)
    try:
        # Beside the output, so that a rename puts it there whole or not at all.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            draft = Path(scratch) / "draft"
            fill(draft)
            files = {str(path.relative_to(draft)): path.stat().st_size
                     for path in sorted(draft.rglob("*")) if path.is_file()}  # fmt: skip
            draft.replace(output)
    except OSError as why:
        raise VitqError(f"cannot write {output}: {why.strerror or why}") from why
    return files


def _check(output: Path) -> None:
    if not output.is_dir() and (output.exists() or output.is_symlink()):
        raise VitqError(f"cannot write {output}: it is a file; name a folder")
    if not output.parent.is_dir():
        raise VitqError(f"cannot write {output}: there is no folder {output.parent}; make it first")
    try:
        used = output.is_dir() and any(output.iterdir())
    except OSError as why:
        raise VitqError(f"cannot write {output}: {why.strerror}") from why
    if used:
        raise VitqError(f"cannot write {output}: the folder is not empty; name another or empty it")


def add_runtime(folder: Path, architecture: str) -> list[Path]:
    """Put TVM's runtime into ``lib/`` of a new folder; return the libraries, to link with."""
    compiler(architecture)  # without one nothing need be fetched
    libraries = runtime_libraries(architecture)
    (folder / "lib").mkdir(parents=True)
    for library in libraries:
        shutil.copyfile(library, folder / "lib" / library.name)
    return libraries


def build_program(
    program: Path, architecture: str, libraries: Sequence[Path], sources: Sequence[str],
    flags: Sequence[str] = (), include: Sequence[Path] = (), archives: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Build a program of ``tutorials/cpp`` that finds its libraries in ``lib/`` beside it.

    Parameters
    ----------
    program
        The file to write.
    architecture
        What to build for.
    libraries, archives
        Shared and static libraries to link.
    sources
        Names in ``tutorials/cpp``.
    flags, include
        Further ones, and further folders of headers.

    Raises
    ------
    VitqError
        If there is no compiler, or it fails.
    """
    command = [compiler(architecture), "-std=c++17", "-DNDEBUG", "-s", "-pthread", *flags]
    command += [f"-I{path}" for path in (_SOURCES / "include", *include_folders(), *include)]
    command += [str(_SOURCES / name) for name in sources]
    command += ["-o", str(program), "-Wl,-rpath,$ORIGIN/lib", "-Wl,--build-id=none"]
    # The runtime registers what is called by name: it must not be dropped as unused.
    command += ["-Wl,--no-as-needed", *map(str, libraries), "-Wl,--as-needed"]
    command += [*map(str, archives), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VitqError(f"{program.name} does not build for {architecture}: {reason(done.stderr)}")
