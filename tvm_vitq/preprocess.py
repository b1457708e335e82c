"""From an image file to a model's input: timm's evaluation transform with Pillow and NumPy alone.

A preprocessing specification is a plain dictionary (it is stored in the artefact as JSON):

``input_size``     ``[C, H, W]`` of the model's input
``crop_pct``       the image is resized to ``floor(size / crop_pct)`` before the crop
``resize``         optional ``int`` or ``[H, W]``: that size itself, instead of ``crop_pct``
``crop_mode``      ``center`` (short side to the size, then crop), ``squash`` (both sides) or
                   ``border`` (long side to the size, then pad with the mean colour)
``interpolation``  ``bilinear``, ``bicubic``, ``nearest``, ``lanczos``, ``box`` or ``hamming``
``mean``, ``std``  per channel, for pixel values in [0, 1]

The pixels equal those of ``timm.data.create_transform(is_training=False)`` bit for bit, because
both sides call the same Pillow routines; the float form is ``(u8 / 255 - mean) / std`` in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from relay_passes.errors import VitqError

__all__ = [
    "IMAGE_SUFFIXES",
    "check_preprocess",
    "list_images",
    "normalize_pixels",
    "preprocess_image",
    "preprocess_images",
]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

_INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
_MODES = {1: "L", 3: "RGB"}
_DEFAULT_CROP_PCT = 0.875


def check_preprocess(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Check a preprocessing specification and fill in what it leaves out.

    Parameters
    ----------
    spec
        See the module's description; only ``input_size`` is required.

    Returns
    -------
    dict
        The complete specification, made of JSON types only.

    Raises
    ------
    VitqError
        If a value is missing, unknown or of the wrong length.
    """
    try:
        channels, height, width = (int(v) for v in spec["input_size"])
    except (KeyError, TypeError, ValueError):
        raise VitqError(
            "preprocessing: input_size must be [channels, height, width], "
            f"got {spec.get('input_size')!r}"
        ) from None
    if channels not in _MODES or height < 1 or width < 1:
        raise VitqError(
            f"preprocessing: input_size {[channels, height, width]} must have 1 or 3 channels"
        )
    interpolation = str(spec.get("interpolation") or "bilinear").lower()
    if interpolation not in _INTERPOLATION:
        raise VitqError(
            f"preprocessing: unknown interpolation {interpolation!r}; "
            f"use one of {', '.join(_INTERPOLATION)}"
        )
    crop_mode = str(spec.get("crop_mode") or "center")
    if crop_mode not in _CROP_MODES:
        raise VitqError(
            f"preprocessing: unknown crop_mode {crop_mode!r}; use one of {', '.join(_CROP_MODES)}"
        )
    crop_pct = float(spec.get("crop_pct") or _DEFAULT_CROP_PCT)
    if not 0.0 < crop_pct <= 4.0:
        raise VitqError(f"preprocessing: crop_pct must be in (0, 4], got {crop_pct}")
    full: dict[str, Any] = {
        "input_size": [channels, height, width],
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": _per_channel("mean", spec.get("mean", 0.0), channels),
        "std": _per_channel("std", spec.get("std", 1.0), channels),
    }
    if not all(v > 0.0 for v in full["std"]):
        raise VitqError(f"preprocessing: std must be positive, got {full['std']}")
    resize = spec.get("resize")
    if resize is not None:
        sides = [int(v) for v in resize] if isinstance(resize, Sequence) else [int(resize)]
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise VitqError(
                f"preprocessing: resize must be one size or [height, width], not {resize!r}"
            )
        full["resize"] = sides if len(sides) == 2 else sides[0]
    return full


def _per_channel(name: str, value: Any, channels: int) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * channels
    if len(values) == 1:
        values = values * channels
    if len(values) != channels or not all(math.isfinite(v) for v in values):
        raise VitqError(f"preprocessing: {name} needs {channels} finite numbers, got {value!r}")
    return values


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder, or of its ``img/`` where it has one, sorted by name.

    Raises
    ------
    VitqError
        If the folder does not exist or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise VitqError(f"no such folder of images: {root}")
    inner = root / "img"
    for place in (inner, root) if inner.is_dir() else (root,):
        found = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if found:
            return found
    known = ", ".join(sorted(IMAGE_SUFFIXES))
    raise VitqError(f"no image in {root}; expected files ending in {known}")


def _open(source: str | Path | Image.Image, mode: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return _convert(source, mode, "the image")
    path = Path(source)
    if not path.is_file():
        raise VitqError(f"no such image: {path}")
    try:
        with Image.open(path) as image:
            return _convert(image, mode, str(path))
    except VitqError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
        raise VitqError(f"cannot read {path} as an image: {_reason(why)}") from why


def _reason(why: Exception) -> str:
    return (str(why) or type(why).__name__).splitlines()[0]


def _convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise VitqError(f"{name} has {image.mode} pixels; save it with 8 bits per channel")
    return image.convert(mode)


def _resize(image: Image.Image, height: int, width: int, how: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), how)


def _crop_or_pad(
    image: Image.Image, height: int, width: int, fill: int | tuple[int, ...]
) -> Image.Image:
    """Cut the centre; pad first where the image is smaller (the rounding is torchvision's)."""
    pad_w, pad_h = max(width - image.width, 0), max(height - image.height, 0)
    if pad_w or pad_h:
        border = (pad_w // 2, pad_h // 2, (pad_w + 1) // 2, (pad_h + 1) // 2)
        image = ImageOps.expand(image, border=border, fill=fill)
    top = round((image.height - height) / 2.0)
    left = round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _pixels(image: Image.Image, spec: Mapping[str, Any]) -> Image.Image:
    channels, height, width = spec["input_size"]
    how = _INTERPOLATION[spec["interpolation"]]
    fill: int | tuple[int, ...] = 0
    scale = spec.get("resize")
    if scale is None:
        pct = spec["crop_pct"]
        scale_h, scale_w = math.floor(height / pct), math.floor(width / pct)
    else:
        scale_h, scale_w = scale if isinstance(scale, Sequence) else (scale, scale)
    if spec["crop_mode"] == "squash":
        image = _resize(image, scale_h, scale_w, how)
    elif spec["crop_mode"] == "border" or scale_h != scale_w:
        ratios = image.height / scale_h, image.width / scale_w
        ratio = max(ratios) if spec["crop_mode"] == "border" else min(ratios)
        image = _resize(image, round(image.height / ratio), round(image.width / ratio), how)
    elif image.width <= image.height:
        image = _resize(image, int(scale_h * image.height / image.width), scale_h, how)
    else:
        image = _resize(image, scale_h, int(scale_h * image.width / image.height), how)
    if spec["crop_mode"] == "border":
        colour = tuple(round(255 * v) for v in spec["mean"])
        fill = colour if channels > 1 else colour[0]
    return _crop_or_pad(image, height, width, fill)


def normalize_pixels(pixels: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """Turn ``uint8 [..., H, W, C]`` into ``float32 [..., C, H, W]``: ``(u8/255 - mean)/std``."""
    mean = np.asarray(spec["mean"], dtype=np.float32)
    std = np.asarray(spec["std"], dtype=np.float32)
    scaled = (pixels.astype(np.float32) / np.float32(255.0) - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def preprocess_image(
    source: str | Path | Image.Image, spec: Mapping[str, Any], dtype: str = "float32"
) -> np.ndarray:
    """Resize, crop and (for float) normalise one image exactly as timm's evaluation transform does.

    Parameters
    ----------
    source
        Path of an image file, or a Pillow image; it is converted to RGB (or grey for one channel).
    spec
        Preprocessing specification, see the module's description.
    dtype
        ``"float32"`` or ``"uint8"``: the form that the model's input takes.

    Returns
    -------
    numpy.ndarray
        ``float32 [C, H, W]``, normalised, or ``uint8 [H, W, C]`` raw pixels.

    Raises
    ------
    VitqError
        If the file cannot be read as an image or the specification is wrong.
    """
    if dtype not in ("float32", "uint8"):
        raise VitqError(f"an image becomes float32 or uint8, not {dtype!r}")
    full = check_preprocess(spec)
    image = _pixels(_open(source, _MODES[full["input_size"][0]]), full)
    pixels = np.asarray(image, dtype=np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.ascontiguousarray(pixels) if dtype == "uint8" else normalize_pixels(pixels, full)


def preprocess_images(
    sources: Sequence[str | Path | Image.Image], spec: Mapping[str, Any], dtype: str = "float32"
) -> np.ndarray:
    """Preprocess and stack images: ``[N, C, H, W]`` float32 or ``[N, H, W, C]`` uint8."""
    return np.stack([preprocess_image(s, spec, dtype) for s in sources])
