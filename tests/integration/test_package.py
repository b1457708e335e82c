"""Bundles of ``tvm-vitq package`` run from any folder without Python, as an installation does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tvm_vitq
from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tests.helpers.arm import QEMU, needs_qemu
from tests.integration import models
from tvm_vitq.artifact.image_libraries import image_libraries
from tvm_vitq.artifact.package import package
from tvm_vitq.evaluate import best_classes, model_input

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000
pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="foreign is AArch64 here")
ARM = pytest.param("aarch64", marks=needs_qemu)


def _needs_libraries(architecture: str) -> None:
    try:
        image_libraries(architecture)
    except VitqError as why:
        pytest.skip(f"no bundle for {architecture}: {why}")


def _bundle(built: models.Built, architecture: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Package a model for an architecture, and move the bundle away from where it was made."""
    _needs_libraries(architecture)
    artifact = built.library
    if architecture != host_architecture():
        artifact = folder / "model.so"
        tvm_vitq.compile(built.quantized(), architecture, artifact)
    report = package(artifact, folder / "made here", architecture)
    place = folder / "somewhere else"
    (folder / "made here").rename(place)
    return place, report


def _run(bundle: Path, architecture: str, tools: Path, *words: object) -> str:
    """Run a bundle from another folder; its PATH has what ``run.sh`` calls and nothing more."""
    tools.mkdir(exist_ok=True)
    for name in ("dirname", "readlink"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tools), "TVM_NUM_THREADS": "1"}
    command = [str(bundle / "run.sh")]
    if architecture != host_architecture():
        environment["QEMU_LD_PREFIX"] = f"/usr/{architecture}-linux-gnu"
        command = [str(shutil.which(QEMU)), str(bundle / "vitq_classify"), str(bundle / "model.so")]
    done = subprocess.run([*command, *map(str, words)], cwd="/", env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _agrees(built: models.Built, bundle: Path, architecture: str, images: list[Path]) -> None:
    """Compare top-5 and their logits with Python's, bit for bit, and replay the golden vectors."""
    tools = bundle.parent / "tools"
    found = json.loads(_run(bundle, architecture, tools, "--json", "--verify", *images))
    assert found["equal"] is True and found["vectors"] >= 1
    artifact = built.artifact()
    for image, shown in zip(images, found["images"], strict=True):
        logits = artifact.run(model_input(artifact, [image])[0])[0]
        expected = best_classes(logits, 5, artifact.labels)
        for ours, theirs in zip(shown["top"], expected, strict=True):
            assert (ours["class"], ours["logit"]) == (theirs["class"], theirs["logit"]), image


def _libraries_are_those_beside(bundle: Path) -> None:
    traced = subprocess.run([bundle / "vitq_classify"], env={"LD_TRACE_LOADED_OBJECTS": "1"},
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    for line in traced.splitlines():
        name = line.split()[0]
        assert "python" not in line and "not found" not in line, line
        assert ("tvm" in name) == (str(bundle / "lib") in line), line
        assert not name.startswith(("libjpeg", "libpng")), line


@pytest.mark.parametrize("architecture", ["x86_64", ARM])
def test_digits(architecture: str, digits_built: models.Built, tmp_path: Path) -> None:
    from tvm_vitq import demo

    images = []
    for i, pixels in enumerate(demo.pixels(demo.digits("test")[0][:20])):
        images.append(tmp_path / f"{i}.{('png', 'jpg')[i % 2]}")
        Image.fromarray(pixels).save(images[-1])
    bundle, report = _bundle(digits_built, architecture, tmp_path)
    files = {str(p.relative_to(bundle)): p.stat().st_size for p in bundle.rglob("*") if p.is_file()}
    assert files == report["files"] and set(files) == {
        "lib/libtvm_ffi.so", "lib/libtvm_runtime.so", "model.so", "run.sh", "vitq_classify"}
    # Beside DeiT-Ti, at most 30 % of its 22.9 MB of fp32 weights, it stays below 20 MB.
    assert sum(files.values()) - files["model.so"] <= 10 * MB
    needs = tuple(map(int, report["needs"]["GLIBC"].split(".")))
    assert needs >= (2, 17)  # of the oldest wheels
    if architecture == host_architecture():
        here = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1]
        assert needs <= tuple(map(int, here.split(".")))
    _agrees(digits_built, bundle, architecture, images)
    if architecture == host_architecture():
        _libraries_are_those_beside(bundle)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("architecture", ["x86_64", ARM])
def test_deit_tiny(
    architecture: str, deit_built: models.Built, data_dir: Path, tmp_path: Path
) -> None:
    photographs = sorted((data_dir / "images/nips500/img").iterdir())[:24]
    for i in (3, 9):
        shown = tmp_path / f"{i}.png"
        Image.open(photographs[i]).convert("RGB").save(shown)
        photographs[i] = shown
    bundle, report = _bundle(deit_built, architecture, tmp_path)
    assert report["bytes"] <= 20 * MB
    _agrees(deit_built, bundle, architecture, photographs)


def test_from_an_installation(digits_built: models.Built, tmp_path: Path) -> None:
    """A wheel has the sources of the program; none of the checkout is needed."""
    _needs_libraries(host_architecture())
    checkout, wheels, site = (tmp_path / name for name in ("checkout", "wheels", "site"))
    for part in ("tvm_vitq", "relay_passes", "schedules", "tutorials"):
        shutil.copytree(ROOT / part, checkout / part, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for part in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, checkout)
    here = int(metadata.version("setuptools").split(".")[0]) >= 77
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                            *(["--no-build-isolation"] if here else []), "--wheel-dir", wheels,
                            checkout], capture_output=True, text=True, check=False)  # fmt: skip
    assert built.returncode == 0, built.stderr
    shutil.rmtree(checkout)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    project = ROOT / "tutorials/cpp"
    carried = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    installed = site / "tvm_vitq/artifact/cpp"
    assert carried == {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    quick = tmp_path / "quick-c++"
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    bundle = tmp_path / "bundle"
    done = subprocess.run(
        [sys.executable, "-m", "tvm_vitq.cli", "package", digits_built.library, "-o", bundle,
         "--json"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "CXX": str(quick)},
        capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == host_architecture()
    assert "equal" in _run(bundle, host_architecture(), tmp_path / "tools", "--verify")
