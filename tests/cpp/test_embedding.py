"""Wrong use of ``vitq.hpp`` is an error, right use is safe: under the sanitizers, in numbers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from schedules.host import host_architecture
from tests.artifact.toy import toy_artifact
from tests.helpers.arm import needs_compiler
from tvm_vitq.artifact.toolchain import runtime_libraries

# The order of vitq::Code.
CODES = ("cannot read", "no artefact", "truncated", "architecture", "processor", "format", "input",
         "not equal", "runtime")  # fmt: skip


def _run(folder: Path, command: str, *words: object) -> list[str]:
    """Return the lines of a command; a finding of a sanitizer, a leak too, fails it."""
    done = subprocess.run(
        [str(folder / "vitq_program"), command, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def _refusals(folder: Path, *paths: Path) -> list[str]:
    lines = _run(folder, "refuse", *paths)
    for path, line in zip(paths, lines, strict=True):
        assert str(path) in line
    return [CODES[int(line.split()[0])] for line in lines]


def test_files_that_are_no_artefacts(sanitized: Path, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    (tmp_path / "empty.so").touch()
    foreign = [sanitized / "vitq_program", *runtime_libraries(host_architecture())]
    assert _refusals(sanitized, tmp_path / "absent.so", tmp_path, tmp_path / "text.so",
                     tmp_path / "empty.so", *foreign) == [
        "cannot read", "cannot read", *["no artefact"] * 5]  # fmt: skip


def test_truncated_anywhere(sanitized: Path, toy: Path, tmp_path: Path) -> None:
    whole = toy.read_bytes()
    rng = np.random.default_rng(0)
    lengths = [1, 4, 15, 16, 63, 64, 65, len(whole) - 1, *rng.integers(1, len(whole), 40)]
    paths = [tmp_path / f"{i}.so" for i in range(len(lengths))]
    for path, length in zip(paths, lengths, strict=True):
        path.write_bytes(whole[:length])
    assert set(_refusals(sanitized, *paths)) == {"truncated"}


def test_headers_that_lie(sanitized: Path, toy: Path, tmp_path: Path) -> None:
    """Any eight bytes of the ELF header as 0xff: refused, or (ignored fields) opened, no crash."""
    whole = toy.read_bytes()
    paths = []
    for offset in (16, 18, 40, 58, 60):  # type, machine, section table: place, entry, count
        paths.append(tmp_path / f"{offset}.so")
        paths[-1].write_bytes(whole[:offset] + b"\xff" * 2 + whole[offset + 2 :])
    assert _refusals(sanitized, *paths) == [
        "no artefact", "architecture", "truncated", "no artefact", "truncated"]  # fmt: skip


@needs_compiler
def test_another_architecture(sanitized: Path, tmp_path: Path) -> None:
    import tvm_vitq
    from tests.artifact.toy import toy_quantized

    foreign = tmp_path / "arm.so"
    tvm_vitq.compile(toy_quantized(), "aarch64", foreign)
    assert _refusals(sanitized, foreign) == ["architecture"]


def test_another_format_and_processor(sanitized: Path, tmp_path: Path) -> None:
    new = toy_artifact(tmp_path / "new.so", change={"format": 99})
    target = {"name": "t", "architecture": "x86_64", "features": ["sse4_1", "quantum-8"]}
    strange = toy_artifact(tmp_path / "strange.so", change={"target": target})
    odd = toy_artifact(tmp_path / "odd.so", change={"input": {"shape": "large"}})
    assert _refusals(sanitized, new, strange, odd) == ["format", "processor", "format"]


@pytest.mark.parametrize("kind", ["toy", "toy_uint8"])
def test_wrong_inputs(sanitized: Path, kind: str, request: pytest.FixtureRequest) -> None:
    lines = _run(sanitized, "inputs", request.getfixturevalue(kind))
    refused = 11 if kind == "toy" else 9
    assert all(CODES[int(line.split()[0])] == "input" for line in lines[:refused])
    assert "383 numbers; one image has 384" in lines[0] or "191 numbers" in lines[0]
    assert lines[refused:] == ["accepted", "accepted", "5 0"]


def test_two_models_at_once(sanitized: Path, toy: Path, toy_uint8: Path, digits: Path) -> None:
    for pair in ((toy, toy_uint8), (toy, toy), (digits, toy)):
        assert _run(sanitized, "two", *pair) == ["0 different"]


@pytest.mark.parametrize("how", ["shared", "own"])
@pytest.mark.parametrize("kind", ["toy", "digits"])
def test_four_threads(
    sanitized: Path, kind: str, how: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    assert _run(sanitized, "threads", path, how) == ["0 different"] * 4


def test_memory_does_not_grow(release: Path, digits: Path) -> None:
    """Of 10,000 runs the last 9,000 take no memory, nor does opening again and again."""
    for command, count in (("loop", 10_000), ("reopen", 300)):
        before, after = map(int, _run(release, command, digits, count)[0].split())
        assert after - before <= 256, (command, before, after)  # KiB


def test_no_leak_in_many_runs(sanitized: Path, toy: Path, digits: Path) -> None:
    for path in (toy, digits):
        _run(sanitized, "loop", path, 500)
        _run(sanitized, "reopen", path, 20)


def test_only_or_throw_throws(sanitized: Path) -> None:
    done = subprocess.run([sanitized / "vitq_program", "loop", "absent.so", "1"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("vitq::Exception 0 cannot read absent.so")
