"""Time an artefact on a board, by the board's clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.errors import VitqError
from tvm_vitq.bench.compare import OURS, summarise

from .artifact import RemoteArtifact
from .session import Session

__all__ = ["bench"]


def bench(
    path: str | Path,
    session: Session,
    threads: int = 1,
    batch: int | None = None,
    runs: int = 30,
    warmup: int = 10,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure an artefact on a board.

    Parameters
    ----------
    path
        The artefact.
    session
        Of the board.
    threads
        Threads of its kernels there.
    batch
        Must be the artefact's; None takes it.
    runs, warmup
        Timed runs, each just after one that is not; runs before them all.
    advance
        Progress: called with 1 after every timed run.

    Returns
    -------
    dict
        ``results`` (one entry, as those of :func:`tvm_vitq.bench.compare.compare`), ``server`` and
        ``board``, and what was measured.

    Raises
    ------
    VitqError
        If the artefact has another batch, or the board cannot run it.
    """
    artifact = RemoteArtifact(path, session, threads)
    meta = artifact.metadata
    if batch is not None and batch != artifact.batch:
        raise VitqError(
            f"{path} is compiled for batch {artifact.batch}, not {batch}: compile one with "
            f"'tvm-vitq compile MODEL --batch {batch} -o FILE'"
        )
    rng = np.random.default_rng(0)
    shape = (artifact.batch, *artifact.input_shape)
    artifact.set_input("main", rng.integers(0, 256, shape, dtype=np.uint8)
                       if artifact.input_dtype == "uint8"
                       else rng.standard_normal(shape).astype(np.float32))  # fmt: skip
    for _ in range(-(-warmup // 2)):
        artifact.time("main")  # two runs
    seconds = []
    for _ in range(runs):
        seconds.append(artifact.time("main"))
        advance(1)
    found = {key: value for key, value in summarise(np.array(seconds)).items()
             if not key.startswith("ratio")}  # fmt: skip
    board = session.board
    entry = {"runner": OURS, "precision": "int8", "threads": threads, "batch": artifact.batch,
             "version": str(meta["versions"]["tvm_vitq"]), **found}  # fmt: skip
    return {
        "artifact": str(path),
        "model": meta["model"].get("name"),
        "target": meta["target"]["name"],
        "server": session.where,
        "board": {"architecture": board.architecture, "cores": board.cores},
        "threads": threads,
        "batch": artifact.batch,
        "pairs": runs,
        "warmup": warmup,
        "results": [entry],
        "note": "measured alone, by the board's clock: the peers run on this machine only",
    }
