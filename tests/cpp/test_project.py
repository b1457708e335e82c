"""The CMake project as its README says: for AArch64, and in an application's own project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
from PIL import Image

import tvm_vitq
from relay_passes.errors import VitqError
from tests.artifact.toy import toy_quantized
from tests.cpp.conftest import PROGRAM, PROJECT, ROOT, quiet
from tests.helpers.arm import QEMU, needs_qemu
from tvm_vitq.artifact.image_libraries import image_libraries

SYSROOT = "/usr/aarch64-linux-gnu"
APPLICATION = """
cmake_minimum_required(VERSION 3.18)
project(mine CXX)
add_subdirectory({project} vitq)
add_executable(mine mine.cpp)
target_link_libraries(mine PRIVATE vitq)
"""
SOURCE = """
#include <cstdio>
#include "vitq.hpp"
int main(int, char** argv) {
  vitq::Result<vitq::Model> model = vitq::Model::Open(argv[1]);
  if (!model) return std::fprintf(stderr, "%s\\n", model.error().message.c_str()), 2;
  vitq::Result<vitq::Verification> found = model->Verify();
  return found && found->equal() ? 0 : 1;
}
"""
PROBE = """
#include <iostream>
#include "vitq/file.hpp"
int main() { std::cout << vitq::detail::MissingFeatures({"i8mm", "asimddp"}); }
"""


@needs_qemu
def test_cross_compiled(
    _tools: None, build_once: Callable[..., Path], tmp_path: Path
) -> None:
    try:
        image_libraries("aarch64")
    except VitqError as why:
        pytest.skip(f"vitq_classify is not built for AArch64: {why}")

    def build(folder: Path) -> None:
        quiet("cmake", "-S", PROJECT, "-B", folder, f"-DVITQ_PYTHON={sys.executable}",
              "-DCMAKE_TOOLCHAIN_FILE=toolchain-aarch64.cmake", f"-DVITQ_PROGRAM={PROGRAM}",
              "-DCMAKE_CXX_FLAGS_RELEASE=-O0", cwd=str(ROOT))  # fmt: skip
        quiet("cmake", "--build", folder)

    folder = build_once("cpp_aarch64", build)
    artifact, image = tmp_path / "toy.so", tmp_path / "grey.png"
    tvm_vitq.compile(toy_quantized(), "aarch64", artifact)
    Image.new("L", (9, 9), 90).save(image)

    def run(program: str, *words: object) -> str:
        done = subprocess.run([QEMU, "-L", SYSROOT, str(folder / program), *map(str, words)],
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout

    assert "equal: 2 golden vectors" in run("vitq_classify", artifact, "--verify", image)
    assert run("vitq_program", "threads", artifact, "own").count("0 different") == 4
    assert run("vitq_program", "refuse", sys.executable).startswith("1 ")


@needs_qemu
def test_a_processor_that_lacks_a_feature(tmp_path: Path) -> None:
    """What the processor has is asked of the kernel: under qemu /proc/cpuinfo is the host's."""
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(PROBE)
    quiet("aarch64-linux-gnu-g++", "-std=c++17", "-I", PROJECT / "include", source, "-o", program)
    for cpu, expected in {"cortex-a53": "i8mm, asimddp", "neoverse-n1": "i8mm", "max": ""}.items():
        done = subprocess.run([QEMU, "-L", SYSROOT, "-cpu", cpu, str(program)],
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.strip() == expected


def test_in_an_application(_tools: None, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(APPLICATION.format(project=PROJECT))
    (tmp_path / "mine.cpp").write_text(SOURCE)
    build = tmp_path / "build"
    quiet("cmake", "-S", tmp_path, "-B", build, f"-DVITQ_PYTHON={sys.executable}")
    quiet("cmake", "--build", build)
    assert not (build / "vitq" / "vitq_classify").exists()
    for path, status in ((toy, 0), (tmp_path / "absent.so", 2)):
        done = subprocess.run([build / "mine", path], capture_output=True, text=True,
                              env={**os.environ, "TVM_NUM_THREADS": "1"}, check=False)  # fmt: skip
        assert done.returncode == status, done.stderr


def test_without_cmake(_tools: None, toy: Path, tmp_path: Path) -> None:
    """The README's command, word for word."""
    (command,) = re.findall(r"^(g\+\+ (?:.*\\\n)*.*)$", (PROJECT / "README.md").read_text(), re.M)
    site = Path(util.find_spec("tvm").origin).parents[1]
    shutil.copytree(PROJECT / "include", tmp_path / "include")
    (tmp_path / "app.cpp").write_text(SOURCE)
    quiet("sh", "-c", command.replace("SITE", str(site)), cwd=str(tmp_path))
    for path, status in ((toy, 0), (tmp_path / "absent.so", 2)):
        assert subprocess.run([tmp_path / "app", path], check=False).returncode == status


def test_a_python_without_the_package(_tools: None, tmp_path: Path) -> None:
    done = subprocess.run(["cmake", "-S", PROJECT, "-B", tmp_path, "-DVITQ_PYTHON=/bin/false"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "with -DVITQ_PYTHON a Python that has tvm-vitq" in said
    assert "/bin/false was asked for TVM's libraries and answered: (1)" in said
    done = subprocess.run(["cmake", "-S", PROJECT, "-B", tmp_path, "-DVITQ_PYTHON=/no/python"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert "/no/python was asked" in done.stderr and "No such file" in done.stderr
