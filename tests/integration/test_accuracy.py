"""Paired accuracy of compiled artefacts against their float models, on the shared images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tvm_vitq
from tests.integration import models

ImageSets = tuple[str, ...]
IMAGENET: ImageSets = ("val650", "nips500")
CIFAR: ImageSets = ("cifar10_test2000",)


def paired(
    built: models.Built, model: torch.nn.Module, data: Path, sets: ImageSets, limit: int | None
) -> tuple[float, float]:
    """Return (top-1 drop in points, same prediction in percent) on the union of the image sets."""
    artifact, spec = built.artifact(), built.preprocess()
    right, float_right, same = [], [], []
    for name in sets:
        images, labels = models.labelled(data / "images" / name, spec, limit)
        guess = artifact.run(images).argmax(-1)
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in torch.from_numpy(images).split(16)])
        float_guess = logits.argmax(-1).numpy()
        right.append(guess == labels)
        float_right.append(float_guess == labels)
        same.append(guess == float_guess)

    def percent(parts: list[np.ndarray]) -> float:
        return float(np.concatenate(parts).mean() * 100)

    return percent(float_right) - percent(right), percent(same)


def test_digits(digits_built: models.Built) -> None:
    from tvm_vitq import demo

    images, labels = demo.digits("test")
    x = demo.normalise(demo.pixels(images))
    guess = digits_built.artifact().run(x).argmax(-1)
    with torch.inference_mode():
        float_guess = demo.digits_vit()(torch.from_numpy(x)).argmax(-1).numpy()
    assert (float_guess == labels).mean() - (guess == labels).mean() <= 0.005
    assert (guess == float_guess).mean() >= 0.99


@pytest.mark.data
def test_deit_tiny_on_a_few_images(deit_built: models.Built, data_dir: Path) -> None:
    drop, same = paired(deit_built, models.deit_tiny(data_dir), data_dir, ("val650",), 100)
    assert drop <= 2.0 and same >= 93.0


@pytest.mark.data
def test_swin_micro_on_a_few_images(swin_built: models.Built, data_dir: Path) -> None:
    drop, same = paired(swin_built, models.swin_micro(data_dir), data_dir, CIFAR, 400)
    assert drop <= 1.5 and same >= 96.0


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("nonlinear", "most_drop", "least_same"), [(None, 0.5, 97.0), ("shift", 1.5, 0.0)]
)
def test_deit_tiny_bar(
    nonlinear: str | None, most_drop: float, least_same: float, data_dir: Path, tmp_path: Path
) -> None:
    images = sorted((data_dir / "images/calib512/img").iterdir())[:128]
    recipe = None if nonlinear is None else tvm_vitq.Recipe(nonlinear=nonlinear)
    checkpoint = data_dir / "weights" / f"{models.DEIT}.safetensors"
    built = models.build(tmp_path, models.DEIT, images, recipe, checkpoint=checkpoint)
    drop, same = paired(built, models.deit_tiny(data_dir), data_dir, IMAGENET, None)
    assert drop <= most_drop and same >= least_same


@pytest.mark.slow
@pytest.mark.data
def test_swin_micro_bar(data_dir: Path, build_once: Callable[..., Path], tmp_path: Path) -> None:
    images = sorted((data_dir / "images/cifar10_calib500/img").iterdir())[::4][:128]
    model = models.swin_micro(data_dir)
    drop, same = paired(models.build(tmp_path, model, images), model, data_dir, CIFAR, None)
    assert drop <= 0.5 and same >= 98.0
