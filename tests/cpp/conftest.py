"""Builds the C++ project once per test run; skips where what it needs is absent, and says what."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from schedules.host import host_architecture
from tests.artifact.toy import toy_artifact
from tests.integration import models

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "tutorials" / "cpp"
PROGRAM = Path(__file__).with_name("embed.cpp")
NEEDED = {"cmake": "cmake", "make": "make", "c++": "g++"}
Build = Callable[..., Path]


def _missing() -> list[str]:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if not missing:
        for header, package in {"jpeglib.h": "libjpeg-dev", "png.h": "libpng-dev"}.items():
            source = f"#include <stdio.h>\n#include <{header}>\n"
            command = ["c++", "-x", "c++", "-fsyntax-only", "-"]
            asked = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
            missing += [package] if asked.returncode else []
    return missing


def quiet(*command: object, **options: str) -> None:
    """Run a command; what it prints is shown if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def _build(folder: Path, *options: str, only: Sequence[str] = ()) -> None:
    quiet("cmake", "-S", PROJECT, "-B", folder, f"-DVITQ_PYTHON={sys.executable}",
          f"-DVITQ_PROGRAM={PROGRAM}", *options, cwd=str(ROOT))  # fmt: skip
    quiet("cmake", "--build", folder, "--parallel", "2", *(("--target", *only) if only else ()))


@pytest.fixture(scope="session")
def _tools() -> None:
    missing = _missing()
    if missing:
        pytest.skip(f"the C++ project is not built: no {', '.join(missing)} (Debian's packages)")


@pytest.fixture(scope="session")
def release(build_once: Build, _tools: None) -> Path:
    """Return the folder of ``vitq_classify`` and ``vitq_program``, as a user builds them."""
    only = ("vitq_classify", "vitq_program")
    return build_once("cpp_release", lambda f: _build(f, "-DCMAKE_BUILD_TYPE=Release", only=only))


@pytest.fixture(scope="session")
def sanitized(build_once: Build, _tools: None) -> Path:
    """Return the folder of all programs, with the address and undefined-behaviour sanitizers."""
    options = ("-DCMAKE_BUILD_TYPE=Debug", "-DVITQ_SANITIZE=ON")
    return build_once("cpp_sanitized", lambda f: _build(f, *options))


@pytest.fixture(scope="session")
def toy(build_once: Build) -> Path:
    """Return an artefact with float32 input and batch 2."""
    return build_once("cpp_toy", lambda f: toy_artifact(f / "toy.so")) / "toy.so"


@pytest.fixture(scope="session")
def toy_uint8(build_once: Build) -> Path:
    """Return an artefact with uint8 input and batch 1."""
    made = build_once("cpp_toy8", lambda f: toy_artifact(f / "t8.so", dtype="uint8", batch=1))
    return made / "t8.so"


@pytest.fixture(scope="session")
def digits(build_once: Build) -> Path:
    """Return the embedded digits model, for any processor that valgrind and CI may have."""
    import tvm_vitq

    built = models.Built(build_once("digits", lambda folder: models.build_digits(folder) and None))
    target = "x86-64-v3" if host_architecture() == "x86_64" else "native"
    made = build_once("cpp_digits", lambda folder: tvm_vitq.compile(
        built.quantized(), target, folder / "digits.so") and None)  # fmt: skip
    return made / "digits.so"
