"""Best-so-far curves: how much faster each task became, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relay_passes.errors import VitqError

from .state import TaskState

__all__ = ["draw"]

_MOST = 8


def draw(states: Sequence[TaskState], title: str, path: str | Path) -> Path:
    """Draw the default's time over the best's against time, for the tasks that gained most in it.

    Parameters
    ----------
    states
        The tasks after a run.
    title
        Of the chart.
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

    tried = [state for state in states if any(ratio < 1 for _, _, ratio in state.curve)]
    shown = sorted(tried, key=lambda s: s.total * (1 / s.ratio - 1), reverse=True)[:_MOST]
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for state in shown:
        seconds = [0.0, *(at for at, _, _ in state.curve)]
        gains = [1 / state.start, *(1 / ratio for _, _, ratio in state.curve)]
        axes.step(seconds, gains, where="post",
                  label=f"{state.job.task} (× {state.job.calls})")  # fmt: skip
    axes.set_xlabel("seconds of tuning")
    axes.set_ylabel("time of the default schedule over the best's")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    if shown:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.text(0.5, 0.5, "nothing faster than the default was found in this run", ha="center",
                  va="center", transform=axes.transAxes)  # fmt: skip
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as why:
        raise VitqError(f"cannot write the chart {path}: {why.strerror}") from why
    finally:
        pyplot.close(figure)
    return Path(path)
