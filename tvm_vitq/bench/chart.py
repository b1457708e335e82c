"""The bar chart of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

__all__ = ["draw"]

_COLOURS = {"ours": "#1b7f5c", "int8": "#5b7db1", "fp32": "#b4b8bf"}


def draw(document: Mapping[str, Any], path: str | Path) -> Path:
    """Draw medians as bars, with whiskers from the 10th to the 90th percentile.

    Parameters
    ----------
    document
        What :func:`tvm_vitq.bench.compare.compare` returns.
    path
        The PNG to write.

    Raises
    ------
    VitqError
        If the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = sorted(document["results"], key=lambda r: -r["median_ms"])
    medians = [r["median_ms"] for r in rows]
    whiskers = [
        [r["median_ms"] - r["p10_ms"] for r in rows],
        [r["p90_ms"] - r["median_ms"] for r in rows],
    ]
    kinds = ["ours" if r["runner"] == "tvm-vitq" else r["precision"] for r in rows]
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes.barh(
        [r["runner"] for r in rows], medians, color=[_COLOURS[kind] for kind in kinds],
        xerr=whiskers, error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"}, height=0.7,
    )  # fmt: skip
    reach = max(r["p90_ms"] for r in rows)
    for place, row in enumerate(rows):
        text = f"{row['median_ms']:.3g} ms"
        if kinds[place] != "ours":
            text += f"  ({row['ratio']:.2f}×)"
        axes.text(max(row["median_ms"], row["p90_ms"]) + 0.015 * reach, place, text,
                  va="center", fontsize=9)  # fmt: skip
    axes.set_xlim(0, 1.25 * reach)
    axes.set_xlabel("latency in ms: median, 10th to 90th percentile (× our time, pair by pair)")
    threads = f"{document['threads']} thread" + "s" * (document["threads"] > 1)
    axes.set_title(f"{document['model']}, batch {document['batch']}, {threads}\n"
                   f"{document['processor']}", fontsize=10, loc="left")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    names = {"ours": "tvm-vitq, int8", "int8": "int8 peers", "fp32": "fp32 peers"}
    axes.legend(handles=[Patch(color=_COLOURS[k], label=names[k]) for k in _COLOURS if k in kinds],
                fontsize=8, loc="upper right", frameon=False)  # fmt: skip
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as why:
        raise VitqError(f"cannot write the chart {path}: {why.strerror}") from why
    finally:
        pyplot.close(figure)
    return Path(path)
