"""memcheck finds neither an error nor a leak in an application over ``vitq.hpp``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tvm_vitq
from schedules.host import host_architecture
from tests.artifact.toy import toy_artifact
from tests.integration import models

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind (Debian: valgrind)"),
    pytest.mark.skipif(host_architecture() != "x86_64", reason="an x86-64 test"),
]
KINDS = "definite,indirect,possible"
# Kernels are one long block: whole, it is more than valgrind's translator holds.
MEMCHECK = ["valgrind", "--error-exitcode=9", "--leak-check=full", f"--show-leak-kinds={KINDS}",
            f"--errors-for-leak-kinds={KINDS}", "--vex-guest-max-insns=25",
            "--vex-guest-chase=no"]  # fmt: skip


def _clean(folder: Path, *words: object) -> list[str]:
    command = [*MEMCHECK, str(folder / "vitq_program"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors from 0 contexts (suppressed: 0 " in done.stderr
    return done.stdout.splitlines()


def test_open_run_verify_close(release: Path, digits: Path) -> None:
    assert "not equal" not in _clean(release, "reopen", digits, 3)


def test_two_models_and_four_threads(release: Path, digits: Path) -> None:
    assert _clean(release, "two", digits, digits, 5) == ["0 different"]
    assert _clean(release, "threads", digits, "own", 6) == ["0 different"] * 4


def test_refusals(release: Path, digits: Path, tmp_path: Path) -> None:
    whole = digits.read_bytes()
    for length in (0, 10, 63, 64, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"{length}.so").write_bytes(whole[:length])
    new = toy_artifact(tmp_path / "new.so", change={"format": 99})
    cut = sorted(tmp_path.glob("[0-9]*.so"))
    lines = _clean(release, "refuse", tmp_path / "absent.so", *cut, new)
    assert len(lines) == 8 and not {"accepted"} & set(lines)
    assert len(_clean(release, "inputs", digits)) == 14


@pytest.mark.slow
@pytest.mark.data
def test_deit_tiny(
    release: Path, build_once: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    built = models.Built(build_once("deit", lambda f: models.build_deit(f, data_dir) and None))
    path = tmp_path / "deit.so"
    tvm_vitq.compile(built.quantized(), "x86-64-v3", path)  # valgrind has no AVX-512
    assert "not equal" not in _clean(release, "reopen", path, 1)
