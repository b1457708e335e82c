"""The Pillow transform equals timm's evaluation transform, pixel for pixel and float for float."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from relay_passes.errors import VitqError
from tvm_vitq.preprocess import check_preprocess, list_images, preprocess_image

SIZES = [(227, 227), (300, 200), (199, 411), (64, 64), (20, 500), (248, 249), (32, 32)]
SPECS = [
    {"input_size": [3, size[0], size[1]], "crop_pct": pct, "interpolation": how, "crop_mode": mode}
    for size, pct, how, mode in [
        ((224, 224), 0.9, "bicubic", "center"),
        ((224, 224), 0.875, "bilinear", "center"),
        ((32, 32), 1.0, "bilinear", "center"),
        ((96, 64), 0.95, "bicubic", "center"),
        ((96, 96), 0.9, "bicubic", "squash"),
        ((97, 97), 0.9, "bicubic", "border"),
    ]
]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s['crop_mode']}-{s['input_size'][1]}")
def test_equals_timm(spec: dict) -> None:
    """Random images of odd shapes: uint8 pixels and float values are identical."""
    from timm.data import create_transform

    spec = {**spec, "mean": MEAN, "std": STD}
    make = create_transform(
        tuple(spec["input_size"]),
        is_training=False,
        interpolation=spec["interpolation"],
        mean=MEAN,
        std=STD,
        crop_pct=spec["crop_pct"],
        crop_mode=spec["crop_mode"],
    )
    pixels = create_transform(
        tuple(spec["input_size"]),
        is_training=False,
        interpolation=spec["interpolation"],
        mean=MEAN,
        std=STD,
        crop_pct=spec["crop_pct"],
        crop_mode=spec["crop_mode"],
        normalize=False,
    )
    rng = np.random.default_rng(0)
    for size in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        ours = preprocess_image(image, spec, "uint8")
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, np.moveaxis(pixels(image).numpy(), 0, -1))
        np.testing.assert_array_equal(preprocess_image(image, spec), make(image).numpy())


def test_resize_overrides_crop_pct() -> None:
    """An explicit size of the short side is the same as the crop share that gives it."""
    image = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    )
    by_share = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
    by_size = {"input_size": [3, 224, 224], "resize": 248, "interpolation": "bicubic"}
    np.testing.assert_array_equal(
        preprocess_image(image, by_share), preprocess_image(image, by_size)
    )


def test_other_image_modes_are_converted(tmp_path) -> None:
    """Grey, palette and alpha images become RGB; one channel models get grey."""
    pixels = np.random.default_rng(2).integers(0, 256, (40, 40), dtype=np.uint8)
    spec = {"input_size": [3, 32, 32], "crop_pct": 1.0}
    for mode in ("L", "P", "RGBA", "LA", "1"):
        assert preprocess_image(Image.fromarray(pixels).convert(mode), spec).shape == (3, 32, 32)
    grey = preprocess_image(Image.fromarray(pixels), {"input_size": [1, 32, 32]}, "uint8")
    assert grey.shape == (32, 32, 1)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({}, "input_size"),
        ({"input_size": [4, 8, 8]}, "channels"),
        ({"input_size": [3, 8, 8], "interpolation": "magic"}, "interpolation"),
        ({"input_size": [3, 8, 8], "crop_mode": "round"}, "crop_mode"),
        ({"input_size": [3, 8, 8], "mean": [0.1, 0.2]}, "mean"),
        ({"input_size": [3, 8, 8], "std": 0.0}, "std"),
        ({"input_size": [3, 8, 8], "crop_pct": -1}, "crop_pct"),
        ({"input_size": [3, 8, 8], "resize": [1, 2, 3]}, "resize"),
    ],
)
def test_wrong_specification(spec: dict, word: str) -> None:
    """Each wrong value is named."""
    with pytest.raises(VitqError, match=word):
        check_preprocess(spec)


def test_unreadable_images(tmp_path) -> None:
    """Missing, foreign and truncated files are one line each."""
    spec = {"input_size": [3, 16, 16]}
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        good
    )
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:600])
    foreign = tmp_path / "text.jpg"
    foreign.write_text("not an image")
    for path in (cut, foreign, tmp_path / "absent.png", tmp_path):
        with pytest.raises(VitqError) as caught:
            preprocess_image(path, spec)
        assert "\n" not in str(caught.value)


def test_list_images(tmp_path) -> None:
    """A folder, or its ``img/``; empty and absent folders are errors."""
    with pytest.raises(VitqError, match="no image"):
        list_images(tmp_path)
    with pytest.raises(VitqError, match="no such folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "img").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / "img" / name).write_bytes(b"")
    assert [p.name for p in list_images(tmp_path)] == ["a.JPG", "b.png"]
