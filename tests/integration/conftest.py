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
    from tvm_vitq import demo

    calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))
    return models.Built(
        build_once("digits", lambda f: models.build(f, "tvm_vitq.demo:digits_vit", calibration))
    )


@pytest.fixture(scope="session")
def deit_built(build_once: BuildOnce, data_dir: Path) -> models.Built:
    """Return DeiT-Ti calibrated on 32 images: enough for exactness and coarse accuracy."""

    def make(folder: Path) -> None:
        images = sorted((data_dir / "images" / "calib512" / "img").iterdir())[:32]
        models.build(folder, models.DEIT, images, checkpoint=weights_of(data_dir, models.DEIT))

    return models.Built(build_once("deit", make))


@pytest.fixture(scope="session")
def swin_built(build_once: BuildOnce, data_dir: Path) -> models.Built:
    """Return the small Swin calibrated on 64 images."""

    def make(folder: Path) -> None:
        images = sorted((data_dir / "images" / "cifar10_calib500" / "img").iterdir())[::8][:64]
        models.build(folder, models.swin_micro(data_dir), images)

    return models.Built(build_once("swin", make))


def weights_of(data: Path, name: str) -> Path:
    """Return the path of a checkpoint of the data."""
    return data / "weights" / f"{name}.safetensors"


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """Return ``noise(n, *shape)``: seeded standard normal float32 images."""

    def make(n: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)

    return make
