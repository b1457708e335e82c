"""The embedded default: a small Vision Transformer for handwritten digits, and its images.

Weights (``digits_vit.safetensors``) and images (``digits.npz``) lie in the package, so that the
demonstration, the tutorials and the tests need no download. ``train_digits.py`` made both from
scikit-learn's copy of the UCI handwritten digits (1,797 images of 8 x 8 pixels, 17 grey levels).

Splits: ``train`` (1,200 images), ``test`` (597, disjoint from ``train``) and ``calib`` (128 images
drawn from ``train``, without their labels' help: any unlabelled images would do).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = [
    "ARCHITECTURE",
    "MEAN",
    "PIXELS",
    "STD",
    "data_file",
    "digits",
    "digits_vit",
    "normalise",
    "pixels",
    "write_images",
]

PIXELS = 32
"""Height and width that the model reads, in pixels."""
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

ARCHITECTURE: dict[str, Any] = {
    "img_size": PIXELS,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
}
"""Arguments of timm's ``VisionTransformer``: 65 tokens of 64 channels, four blocks."""


def data_file(name: str) -> Path:
    """Return the path of a file that the package carries (``digits_vit.safetensors``, ...)."""
    return Path(str(resources.files(__package__).joinpath(name)))


def digits_vit(pretrained: bool = True) -> VisionTransformer:
    """Make the digits model, in evaluation mode: ``float32 [B, 3, 32, 32]`` to 10 logits.

    ``tvm-vitq compile tvm_vitq.demo:digits_vit ...`` takes it as a factory.

    Parameters
    ----------
    pretrained : bool
        Load the weights of the package; False leaves timm's random initialisation.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**ARCHITECTURE)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "digits_vit",
        "input_size": (3, PIXELS, PIXELS),
        "num_classes": ARCHITECTURE["num_classes"],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
        "label_names": [str(digit) for digit in range(10)],
    }
    if pretrained:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(data_file("digits_vit.safetensors")))
    return model.eval()


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return one split as grey levels ``uint8 [N, 8, 8]`` in 0 ... 16 and labels ``int64 [N]``.

    Parameters
    ----------
    split : str
        ``"test"`` or ``"calib"``; the rest of ``"train"`` is not in the package.

    Raises
    ------
    ValueError
        For any other split.
    """
    if split not in ("test", "calib"):
        raise ValueError(f"no split {split!r} in the package: use 'test' or 'calib'")
    with np.load(data_file("digits.npz")) as archive:
        return archive[f"{split}_images"], archive[f"{split}_labels"].astype(np.int64)


def pixels(images: np.ndarray) -> np.ndarray:
    """Enlarge grey levels ``[N, 8, 8]`` (0 ... 16) to RGB pixels ``uint8 [N, 32, 32, 3]``.

    Bilinear interpolation with aligned centres and repeated edges, in float64 with one rounding
    (half up), so that the pixels are the same on every machine.
    """
    side = images.shape[-1]
    where = np.clip((np.arange(PIXELS) + 0.5) * side / PIXELS - 0.5, 0, side - 1)
    low = np.minimum(where.astype(int), side - 2)
    weight = np.zeros((PIXELS, side))
    weight[np.arange(PIXELS), low] = 1 - (where - low)
    weight[np.arange(PIXELS), low + 1] += where - low
    large = weight @ (images.astype(np.float64) * (255 / 16)) @ weight.T
    grey: np.ndarray = np.floor(large + 0.5).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def normalise(rgb: np.ndarray) -> np.ndarray:
    """Turn pixels ``uint8 [N, H, W, 3]`` into the model's input ``float32 [N, 3, H, W]``."""
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    scaled = (rgb.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def write_images(split: str, folder: Path | str, limit: int | None = None) -> Path:
    """Write one split as PNG files with a ``labels.csv`` (``image,label``), as ``eval`` reads them.

    Parameters
    ----------
    split : str
        See :func:`digits`.
    folder : path
        Receives ``labels.csv`` and ``img/*.png``; made if absent.
    limit : int, optional
        Write the first images only.

    Returns
    -------
    Path
        The folder.
    """
    from PIL import Image

    folder = Path(folder)
    (folder / "img").mkdir(parents=True, exist_ok=True)
    images, labels = digits(split)
    rows = ["image,label"]
    for index, picture in enumerate(pixels(images[:limit])):
        name = f"{split}_{index:04d}.png"
        Image.fromarray(picture).save(folder / "img" / name)
        rows.append(f"{name},{labels[index]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
