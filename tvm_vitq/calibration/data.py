"""Calibration images from a folder, a ``.npz`` or ``.npy`` file, an array or any iterable.

Everything becomes one tensor in the form that the model's input takes: float32 ``[N, C, H, W]``,
normalised, or uint8 ``[N, H, W, C]``. Image files, Pillow images and uint8 ``[H, W, C]`` arrays are
preprocessed as the module's ``vitq.model`` attribute says; float arrays are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from PIL import Image

from relay_passes.errors import VitqError
from tvm_vitq.preprocess import list_images, normalize_pixels, preprocess_image

__all__ = ["ImageFormat", "load_images"]

_ARRAY_NAMES = ("images", "x", "data", "calib", "arr_0")


class ImageFormat:
    """What the input of a module looks like.

    Attributes
    ----------
    shape : tuple of int
        Of one image, without batch.
    dtype : str
        float32 or uint8.
    preprocess : dict or None
        The preprocessing of the module's model, None if it has none.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        parameter = mod["main"].params[0]
        self.shape = tuple(int(s) for s in parameter.ty.shape)[1:]
        self.dtype = str(parameter.ty.dtype)
        model = mod.attrs.get("vitq.model") if mod.attrs is not None else None
        self.preprocess = json.loads(str(model)).get("preprocess") if model is not None else None

    def from_picture(self, picture: str | Path | Image.Image) -> np.ndarray:
        """Preprocess one image file or Pillow image."""
        if self.preprocess is None:
            raise VitqError(
                "calibration: the model has no preprocessing, so image files cannot be read; "
                "give its mean, std and size or calibrate from an .npy of input tensors"
            )
        return preprocess_image(picture, self.preprocess, self.dtype)

    def from_array(self, array: np.ndarray, where: str) -> np.ndarray:
        """Bring one array ``[n, ...]`` of images to the input's form, checking shape and values."""
        if array.dtype == np.uint8 and self.dtype == "float32" and array.ndim == 4:
            channels, height, width = self.shape
            if array.shape[1:] != (height, width, channels):
                raise self._wrong(array, where)
            if self.preprocess is None:
                raise VitqError(f"{where}: uint8 pixels need the model's mean and std; give floats")
            return normalize_pixels(array, self.preprocess)
        if array.shape[1:] != self.shape:
            raise self._wrong(array, where)
        if self.dtype == "uint8":
            if array.dtype != np.uint8:
                raise VitqError(f"{where}: the model takes uint8 pixels, not {array.dtype}")
            return array
        if not np.issubdtype(array.dtype, np.floating):
            raise VitqError(f"{where}: the model takes float32 images, not {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))[0])
            raise VitqError(f"{where}: image {bad} holds NaN or infinite values; remove it")
        return array

    def _wrong(self, array: np.ndarray, where: str) -> VitqError:
        return VitqError(
            f"{where}: images have shape {list(array.shape[1:])}, "
            f"the model expects {list(self.shape)} ({self.dtype})"
        )


def load_images(source: Any, mod: tvm.IRModule, limit: int = 512) -> torch.Tensor:
    """Load calibration images in the form of the module's input.

    Parameters
    ----------
    source
        Folder, image file, ``.npz`` or ``.npy``; array or tensor ``[N, ...]`` (or one image);
        or an iterable of paths, Pillow images, single images and batches.
    mod : tvm.IRModule
        The module to calibrate.
    limit : int
        At most this many images, spread evenly over the source.

    Returns
    -------
    torch.Tensor
        ``[N, *image shape]``, N >= 1.

    Raises
    ------
    VitqError
        If the source cannot be read, is empty, has the wrong shape or holds NaN or Inf.
    """
    form = ImageFormat(mod)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() in (".npz", ".npy"):
            source = _read_file(path)
        elif path.is_file():
            source = [path]
        else:
            source = list_images(path)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _pick(_batch(source, form), limit)
    if isinstance(source, dict | bytes) or not isinstance(source, Iterable):
        raise VitqError(
            f"calibration: cannot read images from a {type(source).__name__}; "
            "give a folder, .npz, .npy, array or iterable of images"
        )
    items = list(source)
    if len(items) > limit and all(isinstance(i, str | Path | Image.Image) for i in items):
        items = [items[i] for i in _spread(len(items), limit)]
    parts = [_item(item, index, form) for index, item in enumerate(items)]
    if not parts:
        raise VitqError("calibration: there are no images; give at least one")
    return _pick(np.concatenate(parts), limit)


def _spread(count: int, limit: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, limit).round().astype(int))


def _pick(images: np.ndarray, limit: int) -> torch.Tensor:
    if len(images) > limit:
        images = images[_spread(len(images), limit)]
    return torch.from_numpy(np.ascontiguousarray(images))


def _item(item: Any, index: int, form: ImageFormat) -> np.ndarray:
    if isinstance(item, str | Path | Image.Image):
        return form.from_picture(item)[None]
    if isinstance(item, tuple | list) and item and not np.isscalar(item[0]):
        item = item[0]  # (images, labels), as data loaders give them
    try:
        array = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item)
    except (TypeError, ValueError) as why:
        raise VitqError(f"calibration item {index}: not an image ({why})") from why
    return _batch(array, form, f"calibration item {index}")


def _batch(array: np.ndarray, form: ImageFormat, where: str = "calibration data") -> np.ndarray:
    if array.ndim == len(form.shape):
        array = array[None]
    if array.ndim != len(form.shape) + 1 or 0 in array.shape[1:]:
        raise VitqError(
            f"{where}: shape {list(array.shape)} is not [N, {', '.join(map(str, form.shape))}]"
        )
    if not len(array):
        raise VitqError(f"{where}: there are no images; give at least one")
    return form.from_array(array, where)


def _read_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise VitqError(f"no such calibration file: {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded.files)
            name = next((n for n in _ARRAY_NAMES if n in names), None)
            if name is None and len(names) == 1:
                name = names[0]
            if name is None:
                raise VitqError(
                    f"{path}: no array called {' or '.join(_ARRAY_NAMES[:3])}; it holds "
                    f"{', '.join(names) or 'nothing'}"
                )
            return loaded[name]
    except VitqError:
        raise
    except Exception as why:
        reason = str(why).splitlines()[0] if str(why) else type(why).__name__
        raise VitqError(f"cannot read {path} as calibration data: {reason}") from why
