"""Calibration sources, and what each kind of unusable data is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relay_passes.errors import VitqError
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.calibration.data import load_images


@pytest.fixture(scope="module")
def module():
    return tiny_vit_module()


def pictures(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_every_source_gives_the_same_images(module, tmp_path: Path) -> None:
    folder = pictures(tmp_path, 3)
    images = load_images(folder, module)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    np.save(tmp_path / "a.npy", images.numpy())
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=np.arange(3))
    sources = [
        tmp_path / "a.npy",
        str(tmp_path / "a.npz"),
        images,
        images.numpy(),
        list(images),
        (image for image in images.numpy()),
        [(images[:2], torch.zeros(2)), (images[2:], torch.zeros(1))],
        sorted(folder.glob("*.png")),
        [Image.open(path) for path in sorted(folder.glob("*.png"))],
    ]
    for source in sources:
        assert torch.equal(load_images(source, module), images)


def test_uint8_pixels_are_normalised(module) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    loaded = load_images(pixels, module)
    np.testing.assert_allclose(loaded.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_limit_takes_images_spread_evenly(module) -> None:
    images = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 16, 16)
    assert load_images(images, module, 4)[:, 0, 0, 0].tolist() == [0.0, 3.0, 6.0, 9.0]


def broken(path: Path) -> Path:
    path.write_bytes(b"not an array")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "no such folder"),
        (lambda p: p / "absent.npz", "no such calibration file"),
        (lambda p: p, "no image in"),
        (lambda p: broken(p / "b.npz"), "cannot read"),
        (lambda p: broken(p / "b.npy"), "cannot read"),
        (lambda p: [broken(p / "b.png")], "as an image"),
        (lambda p: [], "no images"),
        (lambda p: np.zeros((0, 3, 16, 16), np.float32), "no images"),
        (lambda p: np.zeros((2, 3, 8, 8), np.float32), "the model expects"),
        (lambda p: np.zeros((2, 7), np.float32), "is not"),
        (lambda p: np.zeros((2, 3, 16, 16), np.int64), "float32 images"),
        (lambda p: np.full((2, 3, 16, 16), np.nan, np.float32), "NaN"),
        (lambda p: [torch.full((3, 16, 16), torch.inf)], "NaN or infinite"),
        (lambda p: ["no", "paths"], "no such image"),
        (lambda p: [object()], "not"),
        (lambda p: 7, "cannot read images from a int"),
        (lambda p: {"x": 1}, "cannot read images from a dict"),
    ],
)
def test_unusable_data_is_one_line(module, tmp_path: Path, make, message: str) -> None:
    with pytest.raises(VitqError, match=message) as caught:
        load_images(make(tmp_path), module)
    assert "\n" not in str(caught.value)


def test_archive_without_a_known_name_lists_what_it_holds(module, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", first=np.zeros(1), second=np.zeros(1))
    with pytest.raises(VitqError, match="first, second"):
        load_images(tmp_path / "a.npz", module)
