"""The demonstration's pictures: digits with both predictions, and all logits against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["draw_digits", "draw_logits", "hardest"]

FLOAT, INTEGER, WRONG, INK, FAINT = "#4c78a8", "#e4572e", "#b00020", "#222222", "#8a8a8a"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of ``logits`` [N, classes], row by row."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def hardest(
    labels: np.ndarray, float_logits: np.ndarray, integer_logits: np.ndarray, n: int
) -> np.ndarray:
    """Return ``n`` indices: changed and wrong predictions first, then the least certain ones."""
    margins = []
    for logits in (float_logits, integer_logits):
        top = np.sort(softmax(logits), axis=-1)
        margins.append(top[:, -1] - top[:, -2])
    changed = float_logits.argmax(-1) != integer_logits.argmax(-1)
    wrong = (float_logits.argmax(-1) != labels) | (integer_logits.argmax(-1) != labels)
    return np.argsort(np.minimum(*margins) - 2 * changed - wrong, kind="stable")[:n]


def draw_digits(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    float_logits: np.ndarray,
    integer_logits: np.ndarray,
    columns: int = 6,
    rows: int = 4,
) -> Path:
    """Draw digits with the float and the integer prediction and both sets of probabilities.

    The first half are the images whose prediction changed or is wrong and those that the models are
    least sure of; the rest are the first of the test set.

    Parameters
    ----------
    path : Path
        PNG file to write.
    images : ndarray
        Grey levels ``[N, 8, 8]`` in 0 ... 16.
    labels : ndarray
        True classes ``int [N]``.
    float_logits, integer_logits : ndarray
        Logits ``[N, 10]`` of the float and of the compiled model.
    columns, rows : int
        The grid.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    hard = hardest(labels, float_logits, integer_logits, columns * rows // 2)
    easy = np.setdiff1d(np.arange(len(labels)), hard)[: columns * rows - len(hard)]
    chosen = np.concatenate([hard, easy])
    p_float, p_integer = softmax(float_logits), softmax(integer_logits)

    figure = plt.figure(figsize=(2.15 * columns, 2.6 * rows + 1.1), facecolor="white")
    height = 2.6 * rows + 1.1
    grid = figure.add_gridspec(
        rows, columns, left=0.03, right=0.97, top=1 - 1.25 / height, bottom=0.25 / height,
        wspace=0.28, hspace=0.22,
    )  # fmt: skip
    for place, index in enumerate(chosen):
        inner = grid[divmod(place, columns)].subgridspec(2, 1, height_ratios=[3, 1.15], hspace=0.30)
        shown = figure.add_subplot(inner[0])
        shown.imshow(images[index], cmap="gray_r", vmin=0, vmax=16, interpolation="nearest")
        shown.set_xticks([]), shown.set_yticks([])
        for spine in shown.spines.values():
            spine.set_color("#dddddd")
        predictions = (int(float_logits[index].argmax()), int(integer_logits[index].argmax()))
        right = [guess == labels[index] for guess in predictions]
        for x, align, guess, colour, good in zip(
            (-0.11, 1.11), ("left", "right"), predictions, (FLOAT, INTEGER), right, strict=True
        ):
            name = "float" if colour == FLOAT else "integer"
            shown.text(
                x, 1.04, f"{name} {guess}{'' if good else ' ✗'}", transform=shown.transAxes,
                ha=align, va="bottom", fontsize=9, color=colour,
                weight="bold" if good else "normal",
            )  # fmt: skip
        if not all(right):
            shown.text(
                0.5, -0.03, f"label {labels[index]}", transform=shown.transAxes, ha="center",
                va="top", fontsize=8.5, color=WRONG,
            )  # fmt: skip
        bars = figure.add_subplot(inner[1])
        where = np.arange(p_float.shape[1])
        bars.bar(where - 0.2, p_float[index], 0.4, color=FLOAT)
        bars.bar(where + 0.2, p_integer[index], 0.4, color=INTEGER)
        bars.set_ylim(0, 1), bars.set_xlim(-0.6, 9.6), bars.set_yticks([])
        bars.set_xticks(where, [str(digit) for digit in where], fontsize=6.5, color=FAINT)
        bars.tick_params(length=0, pad=1)
        for side in ("top", "left", "right"):
            bars.spines[side].set_visible(False)
        bars.spines["bottom"].set_color("#bbbbbb")

    same = (float_logits.argmax(-1) == integer_logits.argmax(-1)).mean() * 100
    tops = [(logits.argmax(-1) == labels).mean() * 100 for logits in (float_logits, integer_logits)]
    figure.text(
        0.03, 1 - 0.30 / height, "Handwritten digits through the same Vision Transformer, twice",
        fontsize=15, weight="bold", color=INK, va="center",
    )  # fmt: skip
    figure.text(
        0.03, 1 - 0.70 / height,
        f"float32 (torch) {tops[0]:.2f} % right     integer-only (.so) {tops[1]:.2f} % right     "
        f"same prediction on {same:.2f} % of {len(labels)} test digits\n"
        f"Bars: probabilities of the ten classes. The first {len(hard)} digits are the hardest of "
        f"the set: wrong, changed or least certain.",
        fontsize=9.5, color=INK, va="center", linespacing=1.5,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_logits(path: Path, float_logits: np.ndarray, integer_logits: np.ndarray) -> Path:
    """Draw every logit of the compiled model against the float model's, and the differences.

    Parameters
    ----------
    path : Path
        PNG file to write.
    float_logits, integer_logits : ndarray
        Logits ``[N, classes]``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    bounds = [min(float_logits.min(), integer_logits.min()), float(float_logits.max())]
    left.plot(bounds, bounds, color="#bbbbbb", linewidth=1, zorder=0)
    left.scatter(float_logits, integer_logits, s=5, alpha=0.35, color=INTEGER, linewidths=0)
    left.set(
        xlabel="float32 logit", ylabel="integer-only logit", title="Every logit of the test set"
    )
    difference = (integer_logits - float_logits).ravel()
    right.hist(difference, bins=80, color=FLOAT)
    noise = float(np.square(difference).mean())
    ratio = 10 * np.log10(np.square(float_logits).mean() / max(noise, 1e-30))
    right.set(
        xlabel="integer-only minus float32",
        title=f"Differences: rms {noise**0.5:.3f}, signal to noise {ratio:.1f} dB",
        yticks=[],
    )
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
