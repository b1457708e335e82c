"""A quantized network that is small enough to be tuned in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm

from relay_passes.pipeline import lower
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.quantizers import quantize
from tvm_vitq.saved import load_quantized, save_quantized


def _make(folder: Path) -> None:
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype("float32")
    save_quantized(quantize(tiny_vit_module(depth=2), images), folder / "tiny.vitq")


@pytest.fixture(scope="session")
def tiny(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a saved quantized ViT of two blocks."""
    return build_once("tuning_tiny", _make) / "tiny.vitq"


@pytest.fixture(scope="session")
def integer(tiny: Path) -> tvm.IRModule:
    """Return it in the integer dialect."""
    return lower(load_quantized(tiny))
