"""``tvm-vitq package``: what is wrong is one line, and no part of a folder is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from schedules.host import host_architecture
from tests.artifact.toy import toy_artifact
from tvm_vitq.artifact import device, image_libraries, package, toolchain

Refused = Callable[..., str]
HERE = host_architecture()
ELSEWHERE = {"x86_64": "aarch64", "aarch64": "x86_64"}.get(HERE, "x86_64")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a path in a folder of its own, to see what is left there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def _nothing_at(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def test_usage(refused: Refused, toy: Path) -> None:
    assert "--output" in refused("package", toy)
    refused("package")


@pytest.mark.parametrize("kind", ["absent", "text", "truncated", "foreign", "folder"])
def test_bad_artefacts(refused: Refused, toy: Path, out: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.so"
    if kind == "text":
        path.write_text("not a library")
    elif kind == "truncated":
        path.write_bytes(toy.read_bytes()[:-100])
    elif kind == "foreign":
        path = toolchain.runtime_libraries(HERE)[0]
    elif kind == "folder":
        path.mkdir()
    assert str(path) in refused("package", path, "-o", out, "--json")
    assert _nothing_at(out)


def test_code_for_a_gpu(refused: Refused, out: Path, tmp_path: Path) -> None:
    target = {"name": "cuda", "kind": "cuda", "arch": "sm_80", "architecture": HERE,
              "features": []}  # fmt: skip
    path = toy_artifact(tmp_path / "gpu.so", change={"target": target})
    line = refused("package", path, "-o", out)
    assert "is for an NVIDIA GPU (sm_80)" in line and "compile it again with --target" in line


def test_another_format(refused: Refused, out: Path, tmp_path: Path) -> None:
    new = toy_artifact(tmp_path / "new.so", change={"format": 99})
    assert "artefact format 99" in refused("package", new, "-o", out)


def test_wrong_architecture(refused: Refused, toy: Path, out: Path) -> None:
    line = refused("package", toy, "--arch", ELSEWHERE, "-o", out)
    target = device.ARCHITECTURES[ELSEWHERE]
    assert f"built for {HERE}, not {ELSEWHERE}" in line and f"--target {target}" in line
    assert "aarch64 or x86_64" in refused("package", toy, "--arch", "z80", "-o", out)
    assert _nothing_at(out)


def test_output_in_use(refused: Refused, toy: Path, out: Path, tmp_path: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "not empty" in refused("package", toy, "-o", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert "it is a file" in refused("package", toy, "-o", out / "mine.txt")
    assert "no folder" in refused("package", toy, "-o", tmp_path / "no" / "bundle")
    assert "cannot write /proc" in refused("package", toy, "-o", "/proc/bundle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    assert "it is a file" in refused("package", toy, "-o", tmp_path / "nowhere")


def test_names_that_the_folder_has(refused: Refused, toy: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_bytes(toy.read_bytes())
    assert "rename it" in refused("package", tmp_path / "run.sh", "-o", out)


def test_no_compiler(
    refused: Refused, toy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda _name: None)
    assert "apt-get install g++" in refused("package", toy, "-o", out)
    assert _nothing_at(out)


def test_a_compiler_that_fails(
    refused: Refused, toy: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: stdio.h: no' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found = image_libraries.ImageLibraries((), ())
    monkeypatch.setattr(package, "image_libraries", lambda _architecture: found)
    line = refused("package", toy, "-o", out)
    assert f"does not build for {HERE}: x.cpp:1: fatal error: stdio.h" in line
    assert _nothing_at(out)


def test_no_image_libraries(
    refused: Refused, toy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_libraries, "_installed", lambda _command: None)
    assert "apt-get install libjpeg-dev libpng-dev" in refused("package", toy, "-o", out)
    assert _nothing_at(out)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this machine another one's packager that has fetched nothing; return the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (toolchain, image_libraries):
        monkeypatch.setattr(module, "host_architecture", lambda: ELSEWHERE)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path / "cache" / "tvm-vitq"


def test_no_network(
    refused: Refused, toy: Path, out: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = refused("package", toy, "-o", out)
    assert "pip cannot fetch apache-tvm " in line and "see to the network" in line
    assert _nothing_at(out) and not list(foreign.rglob("*.so"))


def test_a_cache_that_cannot_be_written(
    refused: Refused, toy: Path, out: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert "cannot write /proc/tvm-vitq" in refused("package", toy, "-o", out)
    assert _nothing_at(out)


@pytest.mark.parametrize("program", ["absent", "failing"])
def test_image_libraries_that_cannot_be_fetched(
    refused: Refused, toy: Path, out: Path, foreign: Path, tmp_path: Path, program: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "runtime_libraries", lambda _architecture: [])
    monkeypatch.setattr(image_libraries, "_installed", lambda _command: None)
    if program == "absent":
        kept = image_libraries.shutil.which
        monkeypatch.setattr(image_libraries.shutil, "which",
                            lambda name: None if name == "apt-get" else kept(name))  # fmt: skip
    else:
        for name in ("apt-get", "dpkg-deb"):
            (tmp_path / name).write_text("#!/bin/sh\necho 'E: no package' >&2\nexit 100\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    line = refused("package", toy, "-o", out)
    assert ("no Debian" if program == "absent" else "E: no package") in line
    assert "dpkg --add-architecture" in line and "libjpeg-dev:" in line
    assert _nothing_at(out) and list(foreign.iterdir()) == []
