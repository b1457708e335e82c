"""AArch64 gives the logits of the reference, bit for bit, on three instruction set levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from tests.helpers.arm import LEVELS, emulator, needs_qemu
from tests.integration import models
from tvm_vitq.artifact.disassemble import count_float_instructions
from tvm_vitq.artifact.emulate import run
from tvm_vitq.reference.interpreter import Interpreter

pytestmark = needs_qemu
BuildOnce = Callable[..., Path]


def assert_exact(
    built: models.Built, images: np.ndarray, target: str, folder: Path, build_once: BuildOnce
) -> None:
    """Cross-compile, run under qemu, compare all logits as bits with the reference's."""
    path = folder / f"{target}.so"
    tvm_vitq.compile(built.quantized(), target, path)
    found = run(emulator(build_once, LEVELS[target]), path, "main", images, 1)
    expected = Interpreter(built.integer())(images)
    assert found.dtype == expected.dtype == np.float32
    assert int((found.view(np.int32) != expected.view(np.int32)).sum()) == 0
    assert len(np.unique(found)) > min(8, found.shape[-1] // 2), "the logits say nothing"
    census = count_float_instructions(path)
    assert census.instructions > 1000
    assert census.elsewhere == {}, f"floating-point arithmetic outside the boundary: {census}"


@pytest.mark.parametrize("target", LEVELS)
def test_digits(
    target: str, digits_built: models.Built, tmp_path: Path, build_once: BuildOnce
) -> None:
    from tvm_vitq import demo

    images = demo.normalise(demo.pixels(demo.digits("test")[0][:2]))
    assert_exact(digits_built, images, target, tmp_path, build_once)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("target", LEVELS)
def test_deit_tiny(target: str, deit_built: models.Built, data_dir: Path, tmp_path: Path,
                   build_once: BuildOnce) -> None:
    images, _ = models.labelled(data_dir / "images/nips500", deit_built.preprocess(), 8)
    assert_exact(deit_built, images, target, tmp_path, build_once)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("target", LEVELS)
def test_swin_micro(target: str, swin_built: models.Built, data_dir: Path, tmp_path: Path,
                    build_once: BuildOnce) -> None:
    images, _ = models.labelled(data_dir / "images/cifar10_test2000", swin_built.preprocess(), 8)
    assert_exact(swin_built, images, target, tmp_path, build_once)
