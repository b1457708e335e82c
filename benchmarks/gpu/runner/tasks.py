"""What the runner does, in pieces: each loads what it needs, adds to the results, and lets go."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import Artifact
from .device import clocks, peaks
from .ffi import Runtime
from .inputs import derive
from .results import Results, damaged, read_json

__all__ = [
    "OURS", "STAGES", "TOOLS", "Bundle", "Ruined", "Task", "check", "perform", "tasks", "verdict",
]  # fmt: skip

OURS = "ours"
STAGES = ("check", "peaks", "quick", "kernels", "compile", "int8", "ort", "sanitize")
"""In the order of their importance."""
EXPECTED = {"check": 20, "peaks": 20, "quick": 30, "kernels": 20, "compile": 120, "int8": 120,
            "ort": 60, "sanitize": 120}  # fmt: skip
"""Seconds that a task of a stage is first thought to take."""
LONGEST = {"check": 120, "peaks": 120, "quick": 150, "kernels": 120, "compile": 420, "int8": 420,
           "ort": 240, "sanitize": 420}  # fmt: skip
"""Seconds after which a task is ended as stuck."""
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SETS, _GROUP_SECONDS = 4, 8.0
_BATCHES = (8, 1, 64)  # the first decides most bars


class Ruined(Exception):
    """The CUDA context is no longer good; why stands in the results, the task may begin anew."""


@dataclass(frozen=True)
class Task:
    """One piece of work; ``model`` is empty and ``batch`` 0 where it has none."""

    stage: str
    model: str = ""
    batch: int = 0

    @property
    def key(self) -> str:
        """Name in the results."""
        return "/".join([self.stage, *([self.model] if self.model else []),
                         *([f"b{self.batch}"] if self.batch else [])])  # fmt: skip


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


class Bundle:
    """The folder that ``python -m benchmarks.gpu bundle`` made.

    Attributes
    ----------
    device
        ``cuda``, or ``cpu`` for a bundle that the runner itself is tried with.
    manifest
        ``bundle.json``: ``made``, ``arch``, ``versions`` and ``models``: for each ``architecture``,
        ``blocks`` (how many), ``weights`` (real or random), ``recipe``, ``checks`` (file of
        expected logits), ``artifacts`` (by batch) and ``bars`` (whether the bars speak of it);
        ``sha256`` of files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "bundle.json", "the bundle's description")
        self.device = str(self.manifest["device"])
        self.models: dict[str, dict[str, Any]] = self.manifest["models"]

    def check_files(self) -> None:
        """Refuse a file that has changed since the bundle was made, or is missing.

        Raises
        ------
        ValueError
            Names the first.
        """
        for name, expected in self.manifest.get("sha256", {}).items():
            path = self.folder / name
            if not path.is_file() or digest(path) != expected:
                raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}: unpack "
                                 "or copy the bundle again")

    def artifact(self, model: str, batch: int) -> Path:
        """Return the path of an artefact."""
        return self.folder / str(self.models[model]["artifacts"][str(batch)])

    def identity(self) -> dict[str, Any]:
        """Return what the results say of the bundle."""
        kept = ("made", "arch", "versions")
        told = ("architecture", "weights", "recipe", "blocks", "bars")
        models = {name: {key: model[key] for key in told} for name, model in self.models.items()}
        return {**{key: self.manifest[key] for key in kept}, "models": models}


def tasks(
    bundle: Bundle, stages: Iterable[str], models: Iterable[str] | None = None,
    batches: Iterable[int] | None = None, tools: Iterable[str] = (),
) -> list[Task]:  # fmt: skip
    """Return the tasks of some stages, most important first."""
    names = [name for name in bundle.models if models is None or name in set(models)]
    sizes = {int(b) for model in bundle.models.values() for b in model["artifacts"]}
    order = [b for b in (*_BATCHES, *sorted(sizes - set(_BATCHES))) if b in sizes]
    wanted = order if batches is None else [b for b in order if b in set(batches)]
    found = []
    for stage in STAGES:
        if stage not in set(stages):
            continue
        if stage == "peaks":
            found.append(Task("peaks"))
            continue
        if stage == "sanitize":
            least = {name: min(map(int, bundle.models[name]["artifacts"])) for name in names}
            found += [Task(f"sanitize-{tool}", name, least[name])
                      for tool in tools for name in names]  # fmt: skip
            continue
        pairs = [(name, b) for b in wanted for name in names
                 if str(b) in bundle.models[name]["artifacts"]]  # fmt: skip
        found += [Task(stage, name, b) for name, b in pairs]
    return found


def check(
    bundle: Bundle, model: str, batch: int, runtime: Runtime, inputs: int | None = None,
    replays: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Compare an artefact's logits with those of the reference, bit for bit.

    Parameters
    ----------
    inputs
        How many of the derived inputs; None takes all that the bundle has logits of.
    replays
        How often the golden vectors are replayed once more.

    Returns
    -------
    dict
        ``golden``, ``derived`` and ``repeated`` (the golden vectors several times over, which shows
        races): each ``inputs``, ``logits`` and ``different``; ``equal``: nothing differs.
    """
    artifact = Artifact(bundle.artifact(model, batch), runtime)
    codes, expected = artifact.golden()
    limits = (int(artifact.metadata["input"]["codes"][key]) for key in ("qmin", "qmax"))
    path = bundle.folder / bundle.models[model]["checks"]
    with damaged(path), np.load(path) as file:
        logits = file["logits"][:inputs]
    found: dict[str, Any] = {}

    def compare(name: str, given: np.ndarray, wanted: np.ndarray) -> None:
        entry = found.setdefault(name, {"inputs": 0, "logits": 0, "different": 0})
        entry["inputs"] += len(given)
        entry["logits"] += int(wanted.size)
        entry["different"] += int((artifact.run_codes(given) != wanted).sum())

    compare("golden", codes, expected)
    compare("derived", derive(codes, len(logits), *limits), logits)
    found["repeated"] = {"inputs": 0, "logits": 0, "different": 0}
    for _ in range(replays):
        compare("repeated", codes, expected)
    found["equal"] = all(entry["different"] == 0 for entry in found.values())
    return found


def perform(
    task: Task, bundle: Bundle, results: Results, device: str, say: Callable[[str], None]
) -> None:
    """Do a task and add what it finds to the results (which are not saved here)."""
    if task.stage == "check":
        runtime = Runtime(bundle.folder / "lib", device)
        found = check(bundle, task.model, task.batch, runtime)
        results.place("checks", task.model, task.batch).update(found)
        different = sum(found[name]["different"] for name in ("golden", "derived", "repeated"))
        compared = sum(found[name]["logits"] for name in ("golden", "derived", "repeated"))
        say(f"{different} of {compared} logits different")
    elif task.stage == "peaks":
        sizes = (4096, 8192, 12288) if device == "cuda" else (64,)
        results.document["peaks"] = found = peaks(sizes, device)
        say(f"int8 {found['int8_peak_tops']} TOP/s, bf16 {found['bf16_peak_tops']} TFLOP/s")
    elif task.stage == "kernels":
        _kernels(task, bundle, results, device, say)
    elif task.stage.startswith("sanitize-"):
        _sanitize(task, bundle, results, say)
    else:
        _times(task, bundle, results, device, say)
    gc.collect()
    if device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def _images(artifact: Artifact) -> list[np.ndarray]:
    """Return input sets of random images in the artefact's input form."""
    rng = np.random.default_rng(0)
    spec = artifact.metadata["input"]
    if spec["dtype"] == "uint8":
        return [rng.integers(0, 256, spec["shape"], dtype=np.uint8) for _ in range(_SETS)]
    return [rng.standard_normal(spec["shape"], dtype=np.float32) for _ in range(_SETS)]


def _ours(task: Task, bundle: Bundle, device: str) -> tuple[Artifact, list[np.ndarray], Any]:
    runtime = Runtime(bundle.folder / "lib", device)
    artifact = Artifact(bundle.artifact(task.model, task.batch), runtime)
    images = _images(artifact)
    placed = [runtime.tensor(x) for x in images]
    return artifact, images, lambda i: artifact.run(placed[i])


def _times(
    task: Task, bundle: Bundle, results: Results, device: str, say: Callable[[str], None]
) -> None:
    import torch

    from .peers import PEERS, Unavailable
    from .timing import Clock, interleave, repeats, summarise

    architecture = bundle.models[task.model]["architecture"]
    _, images, ours = _ours(task, bundle, device)
    if images[0].dtype == np.uint8:
        images = [x.transpose(0, 3, 1, 2).astype(np.float32) / 64 - 2 for x in images]
    on_device = [torch.from_numpy(x).to(device) for x in images]
    runners: dict[str, Any] = {OURS: ours}
    failed = results.document["tasks"]["failed"]
    for peer in PEERS:
        key = f"{task.key}: {peer.name}"
        if peer.stage != task.stage or key in failed or not peer.suits(architecture):
            continue
        try:
            runners[peer.name] = peer.prepare(architecture, on_device)
        except Unavailable as why:
            results.document["tasks"]["skipped"][key] = str(why)
        except Exception as why:
            lines = [line for line in str(why).splitlines() if line.strip()] or ["no message"]
            failed[key] = lines[0][:300]
            say(f"{peer.name} failed: {lines[0][:100]}")
            if "CUDA error" in str(why):
                raise Ruined(key) from why
    if len(runners) == 1 and task.stage != "quick":
        return
    clock = Clock(device)
    turn = 0.0
    for run in runners.values():
        once = clock.seconds(run, _SETS, _SETS)
        turn += once * (repeats(once, _SETS) + 1)
    rounds = max(9, min(31, int(_GROUP_SECONDS / turn)))
    before = clocks()
    seconds = interleave(runners, rounds, _SETS, clock)
    state = {"before": before, "after": clocks()}
    entry = results.place("times", task.model, task.batch)
    for name, values in seconds.items():
        known = {peer.name: peer.kind for peer in PEERS}
        summary = {**summarise(values, seconds[OURS]), "kind": known.get(name, OURS),
                   "group": task.stage}  # fmt: skip
        if name != OURS or task.stage == "quick":
            entry.setdefault("runners", {})[name] = summary
        if name != OURS:
            say(f"{name:28s} {summary['median_us']:10.1f} us  {summary['ratio']:6.2f}x ours")
    entry.setdefault("clocks", {})[task.stage] = state
    say(f"{OURS:28s} {1e6 * float(np.median(seconds[OURS])):10.1f} us")


def _kernels(
    task: Task, bundle: Bundle, results: Results, device: str, say: Callable[[str], None]
) -> None:
    artifact, images, run = _ours(task, bundle, device)
    entry = results.place("kernels", task.model, task.batch)
    if device != "cuda":
        entry["launches"] = len(artifact.calls(images[0]))
        return
    from .kernels import device_times, rows_of

    passes = 2 * _SETS
    found = rows_of(device_times(run, _SETS, passes), passes, artifact.metadata["kernels"])
    entry.update(found)
    total = sum(row["us"] for row in found["rows"])
    large = f", large matmuls {found['large']['tops']} TOP/s" if "large" in found else ""
    say(f"{found['launches']:.0f} launches, {total:.1f} us in kernels{large}")


def _sanitize(
    task: Task, bundle: Bundle, results: Results, say: Callable[[str], None]
) -> None:
    tool = task.stage.partition("-")[2]
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        results.document["tasks"]["skipped"][task.key] = "compute-sanitizer is not installed"
        return
    done = subprocess.run(
        [program, "--tool", tool, "--print-limit", "20", sys.executable, "-m",
         __package__ or "runner", "check", "--bundle", str(bundle.folder), "--models", task.model,
         "--batches", str(task.batch), "--inputs", "1", "--replays", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = verdict(done.stdout + done.stderr, done.returncode)
    results.document["sanitize"].setdefault(tool, {})[f"{task.model} b{task.batch}"] = found
    say(f"{'clean' if found['clean'] else 'NOT clean'}: {found['summary']}")


def verdict(output: str, status: int) -> dict[str, Any]:
    """Read what compute-sanitizer printed.

    Returns
    -------
    dict
        ``clean``: it found nothing and the logits were right; ``summary``, its last line; and if
        it isn't clean ``output``, the end of what was printed.
    """
    marked = [line.lstrip("= ").strip() for line in output.splitlines() if "SUMMARY" in line]
    summary = marked[-1] if marked else f"no summary; status {status}"
    nothing = summary.startswith(("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards"))
    clean = bool(marked) and nothing and status == 0
    return {"clean": clean, "summary": summary, **({} if clean else {"output": output[-4000:]})}
