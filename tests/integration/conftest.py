"""Whole models, built once for all workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration import models

BuildOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def digits_built(build_once: BuildOnce) -> models.Built:
    """Return the embedded digits model, with the default recipe."""
    return models.Built(build_once("digits", lambda folder: models.build_digits(folder) and None))


@pytest.fixture(scope="session")
def deit_built(build_once: BuildOnce, data_dir: Path) -> models.Built:
    """Return DeiT-Ti."""
    made = build_once("deit", lambda folder: models.build_deit(folder, data_dir) and None)
    return models.Built(made)


@pytest.fixture(scope="session")
def swin_built(build_once: BuildOnce, data_dir: Path) -> models.Built:
    """Return the small Swin calibrated on 64 images."""

    def make(folder: Path) -> None:
        images = sorted((data_dir / "images" / "cifar10_calib500" / "img").iterdir())[::8][:64]
        models.build(folder, models.swin_micro(data_dir), images)

    return models.Built(build_once("swin", make))


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """Return ``noise(n, *shape)``: seeded standard normal float32 images."""

    def make(n: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)

    return make
