"""Our artefact and its peers side by side in one run.

Every peer has its own pairs: one turn of ours, then one of the peer (A B A C A D ...), so that what
else the machine does meets both halves of a pair alike. The ratio is taken pair by pair.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from relay_passes.errors import VitqError

from .peer import FloatSource, Job, Peer
from .peers import choose
from .worker import Worker, cores

__all__ = ["OURS", "Runner", "compare", "float_source", "interleave", "summarise"]

OURS = "tvm-vitq"
Times = dict[str, np.ndarray]


class Runner(Protocol):
    """What :func:`interleave` needs of a runner."""

    def turn(self) -> float:
        """Run once and return the seconds it took."""


def interleave(
    ours: Runner, peers: Mapping[str, Runner], pairs: int, advance: Callable[[int], None]
) -> tuple[Times, Times]:
    """Time ours and each peer in turn.

    Parameters
    ----------
    ours, peers
        The runners, warmed up.
    pairs
        Pairs for each peer; without peers, turns of ours.
    advance
        Called with 1 after every round.

    Returns
    -------
    times, partners : dict of str to ndarray
        Seconds ``[pairs]`` of each peer, and of ours just before it; without peers, those of ours
        are ``partners["tvm-vitq"]``.
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    partners: dict[str, list[float]] = {name: [] for name in peers or [OURS]}
    for _ in range(pairs):
        for name in partners:
            partners[name].append(ours.turn())
            if name in peers:
                times[name].append(peers[name].turn())
        advance(1)
    return (
        {name: np.array(values) for name, values in times.items()},
        {name: np.array(values) for name, values in partners.items()},
    )


def summarise(seconds: np.ndarray, partner: np.ndarray | None = None) -> dict[str, float]:
    """Return medians and spread of a runner's times, and of its ratios to its partner's.

    Returns
    -------
    dict
        ``median_ms``, ``p10_ms``, ``p90_ms``, ``min_ms``, ``ratio`` (time over ours, median of the
        pairs), ``ratio_p10``, ``ratio_p90``, ``runs``.
    """
    low, middle, high = (float(v) * 1e3 for v in np.percentile(seconds, [10, 50, 90]))
    ratios = np.ones(1) if partner is None else seconds / partner
    ratio_low, ratio, ratio_high = (float(v) for v in np.percentile(ratios, [10, 50, 90]))
    return {
        "median_ms": round(middle, 4),
        "p10_ms": round(low, 4),
        "p90_ms": round(high, 4),
        "min_ms": round(float(seconds.min()) * 1e3, 4),
        "ratio": round(ratio, 4),
        "ratio_p10": round(ratio_low, 4),
        "ratio_p90": round(ratio_high, 4),
        "runs": len(seconds),
    }


def float_source(
    metadata: Mapping[str, Any], model: str | None = None, checkpoint: str | None = None
) -> tuple[FloatSource, str | None]:
    """Say how to build the float model, and what must be told about it.

    Parameters
    ----------
    metadata
        The artefact's.
    model, checkpoint
        What the user gave instead.

    Raises
    ------
    VitqError
        If neither says it.
    """
    factory = metadata["model"].get("factory") or {}
    source, kind = model or factory.get("source"), factory.get("kind")
    if not source or (model is None and kind == "module"):
        raise VitqError("the artefact does not say its float model; give it with --model")
    suffix = Path(source).suffix.lower()
    if suffix in (".onnx", ".pt2"):
        if not Path(source).is_file():
            raise VitqError(f"the float model {source} is not there; give it with --model")
        if checkpoint is not None:
            raise VitqError(f"{source} carries its own weights; --checkpoint does not go with it")
        return FloatSource(suffix[1:], str(Path(source).resolve())), None
    arguments = factory.get("arguments") if model is None else None
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise VitqError(f"--checkpoint: there is no file {checkpoint}")
    stored = factory.get("checkpoint") if model is None else None
    note = None
    if checkpoint is None and stored:
        if Path(stored).is_file():
            checkpoint = stored
        else:
            note = f"{stored} is not there: the peers' weights are random, their times the same"
    weights = None if checkpoint is None else str(Path(checkpoint).resolve())
    return FloatSource("torch", source, arguments, weights), note


def export_onnx(job: Job, path: Path) -> None:
    """Write the float model as ONNX, for the job's batch.

    Raises
    ------
    VitqError
        If it cannot be exported.
    """
    if job.model.kind == "onnx":
        import onnx

        proto = onnx.load(job.model.source)
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = job.shape[0]
        onnx.save(proto, str(path))
        return
    import torch

    torch.set_num_threads(job.threads)
    try:
        torch.onnx.export(
            job.model.torch_module(), (torch.from_numpy(job.x),), str(path), dynamo=True,
            verbose=False,
        )  # fmt: skip
    except VitqError:
        raise
    except Exception as why:
        lines = str(why).strip().splitlines() or [type(why).__name__]
        raise VitqError(
            f"{job.model.source} cannot be exported to ONNX for the peers: {lines[-1][:200]}"
        ) from why


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def compare(
    path: str | Path,
    peers: str = "all",
    threads: int = 1,
    batch: int | None = None,
    pairs: int = 30,
    warmup: int = 10,
    model: str | None = None,
    checkpoint: str | None = None,
    per_layer: bool = False,
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure an artefact and its peers.

    Parameters
    ----------
    path
        The artefact.
    peers
        ``"all"``, ``"none"`` or names with commas; see :mod:`tvm_vitq.bench.peers`.
    threads
        Threads of every runner, pinned to as many cores.
    batch
        Must be the artefact's; None takes it.
    pairs, warmup
        Timed pairs for each peer; runs of each runner before them.
    model, checkpoint
        The float model of the peers, if not the one that the artefact names.
    per_layer
        Add ``layers``: what :func:`tvm_vitq.bench.layers.profile` returns.
    say, advance
        Progress: what is being done, and steps (one for each pair).

    Returns
    -------
    dict
        ``results`` (one entry a runner: ``runner, precision, threads, batch, median_ms, ratio`` and
        spread), ``skipped`` (``runner, reason``), and what was measured where.

    Raises
    ------
    VitqError
        If the artefact cannot be read or has another batch, or a peer asked for by name cannot run.
    """
    from tvm_vitq.artifact.load import load

    chosen, skipped = choose(peers)
    places = cores(threads)
    artifact = load(path)
    meta = artifact.metadata
    if batch is not None and batch != artifact.batch:
        raise VitqError(
            f"{path} is compiled for batch {artifact.batch}, not {batch}: compile one with "
            f"'tvm-vitq compile MODEL --batch {batch} -o FILE'"
        )
    shape = list(artifact.input_shape)
    if artifact.input_dtype == "uint8":
        shape = [shape[2], *shape[:2]]
    shape = [artifact.batch, *shape]
    source, note = float_source(meta, model, checkpoint) if chosen else (None, None)
    common = {"threads": threads, "cores": places, "shape": shape}
    named = peers not in ("all", "none")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitq_bench_")))
        onnx = None
        if source is not None and any(peer.needs_onnx for peer in chosen):
            say("export to ONNX")
            onnx = folder / "model.onnx"
            export_onnx(Job(source, None, tuple(shape), threads, folder), onnx)

        def start(name: str, **more: Any) -> Worker:
            say(f"prepare {name}")
            spec = {"runner": name, "folder": str(folder / name), **common, **more}
            worker = stack.enter_context(Worker(name, spec))
            worker.ask("warm", runs=warmup)
            return worker

        ours = start(OURS, artifact=str(Path(path).resolve()))
        runners: dict[str, Worker] = {}
        described: dict[str, Peer] = {}
        for peer in chosen:
            assert source is not None
            try:
                runners[peer.name] = start(
                    peer.name, model=asdict(source), onnx=None if onnx is None else str(onnx)
                )
                described[peer.name] = peer
            except VitqError as why:
                if named:
                    raise
                skipped.append({"runner": peer.name, "reason": f"failed: {why}"})
        say("measure")
        load_before = os.getloadavg()[0]
        times, partners = interleave(ours, runners, pairs, advance)
        layers = None
        if per_layer:
            say("kernels")
            layers = ours.ask("layers", runs=pairs)

    def entry(name: str, precision: str, version: str, found: dict[str, float]) -> dict[str, Any]:
        return {"runner": name, "precision": precision, "threads": threads,
                "batch": artifact.batch, "version": version, **found}  # fmt: skip

    own = np.concatenate(list(partners.values()))
    results = [entry(OURS, "int8", str(meta["versions"]["tvm_vitq"]), summarise(own))]
    for name, peer in described.items():
        found = summarise(times[name], partners[name])
        results.append(entry(name, peer.precision, peer.version(), found))
    document: dict[str, Any] = {
        "artifact": str(path),
        "model": meta["model"].get("name"),
        "target": meta["target"]["name"],
        "processor": _processor(),
        "cores": places,
        "load_average": load_before,
        "threads": threads,
        "batch": artifact.batch,
        "pairs": pairs,
        "warmup": warmup,
        "results": results,
        "skipped": skipped,
        "fastest": _fastest(results),
    }
    if note is not None:
        document["note"] = note
    if layers is not None:
        document["layers"] = layers
    return document


def _fastest(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, for each precision, the fastest peer and how many times our time it takes."""
    found: dict[str, Any] = {}
    for result in results[1:]:
        known = found.get(result["precision"])
        if known is None or result["ratio"] < known["ratio"]:
            found[result["precision"]] = {"runner": result["runner"], "ratio": result["ratio"]}
    return found
