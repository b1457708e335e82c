"""Accuracy of an artefact on labelled images, paired with the float model on the same images."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_passes.errors import VitqError
from tvm_vitq.preprocess import list_images, normalize_pixels, preprocess_images

if TYPE_CHECKING:
    from tvm_vitq.artifact.load import Artifact

__all__ = [
    "Labelled",
    "best_classes",
    "evaluate",
    "float_model",
    "model_input",
    "read_labels",
    "read_names",
]

Labelled = list[tuple[Path, int | None]]
FloatModel = Callable[[np.ndarray], np.ndarray]

_CHUNK = 32
_MODEL_FILES = (".onnx", ".pt2")


def read_names(path: str | Path) -> list[str]:
    """Read class names: one a line, or a JSON list, or a JSON object from index to name.

    Raises
    ------
    VitqError
        If the file cannot be read or holds something else.
    """
    import json

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as why:
        raise VitqError(f"cannot read the labels {path}: {why}") from why
    if text.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as why:
            raise VitqError(f"{path} is not valid JSON: {why}") from why
        if isinstance(found, dict):
            found = [found.get(str(i)) for i in range(len(found))]
        names = [name[-1] if isinstance(name, list) and name else name for name in found]
        if not all(isinstance(name, str) for name in names):
            raise VitqError(f"{path} must be a list of names, or map 0 ... n-1 to names")
        return names
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise VitqError(f"{path} is empty; expected one class name a line")
    return names


def read_labels(images: str | Path, labels: str | Path | None, classes: int) -> Labelled:
    """Pair images with their classes.

    Parameters
    ----------
    images
        Folder that holds the images, or has them in ``img/``.
    labels
        CSV file with the columns ``image,label`` (0-based class); None takes ``labels.csv`` of the
        folder if it is there, else every image is without a label.
    classes
        Number of classes of the model.

    Raises
    ------
    VitqError
        If a file is missing or a label is no class of the model.
    """
    root = Path(images)
    if labels is None and (root / "labels.csv").is_file():
        labels = root / "labels.csv"
    if labels is None:
        return [(path, None) for path in list_images(root)]
    if not root.is_dir():
        raise VitqError(f"no such folder of images: {root}")
    try:
        with Path(labels).open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as why:
        raise VitqError(f"cannot read the labels {labels}: {why}") from why
    if not rows or not {"image", "label"} <= set(rows[0]):
        raise VitqError(f"{labels} must be CSV with a header 'image,label' and one row an image")
    pairs: Labelled = []
    for number, row in enumerate(rows, start=2):
        name, text = row["image"] or "", row["label"] or ""
        path = next((p for p in (root / "img" / name, root / name) if p.is_file()), None)
        if path is None:
            raise VitqError(
                f"{labels} line {number}: no image {name!r} in {root} or {root / 'img'}"
            )
        if not text.strip().isdigit() or int(text) >= classes:
            raise VitqError(
                f"{labels} line {number}: label {text!r} is not a class, 0 to {classes - 1}"
            )
        pairs.append((path, int(text)))
    return pairs


def float_model(artifact: Artifact, weights: str | Path) -> FloatModel:
    """Rebuild the float model that an artefact was made from.

    Parameters
    ----------
    artifact
        Its metadata says which timm model or factory it was.
    weights
        The checkpoint, or the ``.onnx`` or ``.pt2`` file itself.

    Returns
    -------
    callable
        From normalised ``float32 [N, C, H, W]`` to ``float32 [N, classes]``.

    Raises
    ------
    VitqError
        If the model cannot be rebuilt or has another input or number of classes.
    """
    import torch

    from tvm_vitq import load_model
    from tvm_vitq.reference.float_interpreter import Program

    weights = Path(weights)
    if not weights.is_file():
        raise VitqError(f"no such file: {weights}")
    meta = artifact.metadata
    factory = meta["model"].get("factory") or {}
    source, size = factory.get("source"), None
    if meta["preprocess"] is not None:
        size = meta["preprocess"]["input_size"]
    if weights.suffix.lower() in _MODEL_FILES:
        module = load_model(weights)
    elif factory.get("kind") in ("timm", "factory"):
        module = load_model(
            source, checkpoint=weights, arguments=factory.get("arguments"), input_size=size
        )
    else:
        raise VitqError(
            f"the artefact was made from {source or 'a module in memory'}, which no checkpoint "
            "rebuilds; give the .onnx or .pt2 file itself"
        )
    shape = [int(v) for v in module["main"].params[0].ty.shape.values]
    if size is not None and shape[1:] != list(size):
        raise VitqError(f"{weights} takes images {shape[1:]}, the artefact {list(size)}")
    program = Program(module)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return program(torch.from_numpy(x)).numpy()

    return run


def model_input(artifact: Artifact, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Read images as the artefact stores it: its own input, and the normalised float32 form."""
    spec = artifact.metadata["preprocess"]
    if spec is None:
        raise VitqError(
            f"{artifact.path} has no preprocessing; compile it with --mean, --std, --crop-pct ..."
        )
    pixels = preprocess_images(paths, spec, "uint8")
    floats = normalize_pixels(pixels, spec)
    return (pixels if artifact.input_dtype == "uint8" else floats), floats


def _percent(part: int, whole: int) -> float:
    return round(100.0 * part / whole, 4)


def _chunks(pairs: Labelled, size: int) -> Iterator[Labelled]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def evaluate(
    artifact: Artifact,
    pairs: Labelled,
    against: FloatModel | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run an artefact, and the float model if given, over the same images.

    Parameters
    ----------
    artifact
        The loaded artefact; its stored preprocessing is used for both.
    pairs
        What :func:`read_labels` returned.
    against
        The float model, see :func:`float_model`.
    progress
        Called with the number of images done since the last call.

    Returns
    -------
    dict
        ``n``; ``top1``, ``top5``, ``float_top1``, ``float_top5`` and ``agreement`` (share of images
        with the same prediction) in percent, None where there are no labels or no float model;
        ``changed`` predictions, of which ``lost`` were right in float only and ``won`` in integers
        only.
    """
    labels = np.array([-1 if label is None else label for _, label in pairs])
    ours, theirs = [], []
    for chunk in _chunks(pairs, max(_CHUNK // artifact.batch, 1) * artifact.batch):
        x, floats = model_input(artifact, [path for path, _ in chunk])
        ours.append(artifact.run(x))
        if against is not None:
            theirs.append(np.asarray(against(floats)))
        if progress is not None:
            progress(len(chunk))
    logits, n = np.concatenate(ours), len(pairs)
    labelled = bool((labels >= 0).all())
    result: dict[str, Any] = {"n": n}
    for prefix, values in (("", logits), ("float_", np.concatenate(theirs) if theirs else None)):
        if values is not None and values.shape != logits.shape:
            raise VitqError(
                f"the float model gives {values.shape[-1]} classes, the artefact {logits.shape[-1]}"
            )
        for k in (1, 5):
            hits = None
            if labelled and values is not None:
                best = np.argsort(-values, axis=-1, kind="stable")[:, :k]
                hits = _percent(int((best == labels[:, None]).any(axis=-1).sum()), n)
            result[f"{prefix}top{k}"] = hits
    if not theirs:
        return {**result, "agreement": None, "changed": None, "lost": None, "won": None}
    guess, float_guess = logits.argmax(-1), np.concatenate(theirs).argmax(-1)
    same, right, float_right = guess == float_guess, guess == labels, float_guess == labels
    return {
        **result,
        "agreement": _percent(int(same.sum()), n),
        "changed": int((~same).sum()),
        "lost": int((float_right & ~right).sum()) if labelled else None,
        "won": int((right & ~float_right).sum()) if labelled else None,
    }


def best_classes(
    logits: np.ndarray, count: int, labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return the most likely classes of one image: class, label, logit and softmax probability."""
    exps = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-logits, kind="stable")[:count]
    return [
        {
            "class": int(i),
            "label": labels[i] if labels else None,
            "logit": float(logits[i]),
            "probability": float(exps[i] / exps.sum()),
        }
        for i in order
    ]
