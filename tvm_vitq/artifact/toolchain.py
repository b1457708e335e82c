"""What building and running for an architecture takes: its compiler, its runtime libraries.

The runtime of another architecture comes from the wheels of the very versions of ``apache-tvm`` and
``apache-tvm-ffi`` that are installed here; of them only two libraries are kept, in a cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata, util
from pathlib import Path

from relay_passes.errors import VitqError
from schedules.host import host_architecture

__all__ = ["cache_folder", "compiler", "include_folders", "reason", "runtime_libraries"]

LIBRARIES = {"apache-tvm": "tvm/lib/libtvm_runtime.so",
             "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}  # fmt: skip
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014")


def compiler(architecture: str) -> str:
    """Return the name of a C++ compiler for an architecture.

    Raises
    ------
    VitqError
        If there is none; for a foreign architecture it names Debian's package.
    """
    if architecture == host_architecture():
        names = [os.environ.get("CXX") or "c++", "c++", "g++", "clang++", "cc", "gcc", "clang"]
        package = "g++"
    else:
        names = [f"{architecture}-linux-gnu-g++"]
        package = f"g++-{architecture.replace('_', '-')}-linux-gnu"
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        raise VitqError(
            f"no compiler to link for {architecture} ({names[0]}); install one, on Debian and "
            f"Ubuntu: apt-get install {package}"
        )
    return found


def include_folders() -> list[Path]:
    """Return the folders of the headers that a C++ program over the TVM FFI includes."""
    return [_package("tvm_ffi") / "include"]


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise VitqError(f"the Python package {name} is not installed")
    return Path(spec.origin).parent


def reason(output: str) -> str:
    """Return the line of a failed program's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if "error: " in line.lower()]
    return (errors or lines[-1:])[0]


def cache_folder() -> Path:
    """Return the folder of what was fetched once, for each user; it is made if need be.

    Raises
    ------
    VitqError
        If it cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "tvm-vitq"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as why:
        raise VitqError(
            f"cannot write {folder}: {why.strerror}; give another folder for what is fetched as "
            "XDG_CACHE_HOME"
        ) from why
    return folder


def runtime_libraries(architecture: str) -> list[Path]:
    """Return ``libtvm_runtime.so`` and ``libtvm_ffi.so`` for an architecture.

    This machine's are the installed ones; others are fetched through pip, once for each version.

    Raises
    ------
    VitqError
        If they cannot be fetched.
    """
    if architecture == host_architecture():
        return [_package(path.split("/")[0]) / path.partition("/")[2]
                for path in LIBRARIES.values()]  # fmt: skip
    versions = {package: metadata.version(package) for package in LIBRARIES}
    folder = cache_folder() / "-".join(["runtime", architecture, *versions.values()])
    found = [folder / Path(path).name for path in LIBRARIES.values()]
    if not all(path.is_file() for path in found):
        folder.mkdir(parents=True, exist_ok=True)
        for package, path in LIBRARIES.items():
            _fetch(package, versions[package], architecture, path, folder)
    return found


def _fetch(package: str, version: str, architecture: str, member: str, folder: Path) -> None:
    """Take one file out of a wheel for another architecture."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary=:all:", "--disable-pip-version-check", "--dest", scratch,
                   f"{package}=={version}"]  # fmt: skip
        for platform in _PLATFORMS:
            command += ["--platform", f"{platform}_{architecture}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise VitqError(
                f"pip cannot fetch {package} {version} for {architecture}: {reason(done.stderr)}; "
                "see to the network or to pip's index"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            draft = Path(wheel.extract(member, scratch))
        draft.replace(folder / Path(member).name)
