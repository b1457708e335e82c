"""Make the bundle: artefacts, expected logits, TVM's runtime, the runner; one folder, one archive.

The archive is xz with a window that spans several artefacts: those of one network for several
batches hold the same weights, and so does what :mod:`benchmarks.gpu.networks` draws.
"""

from __future__ import annotations

import datetime
import json
import lzma
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.errors import VitqError
from schedules.cuda.nvcc import find_nvcc
from schedules.cuda.target import is_cuda_name
from tvm_vitq.saved import load_quantized

from .networks import Network, Quantized, prepare
from .rebatch import rebatch
from .runner.inputs import derive
from .runner.models import blocks_of
from .runner.session import bound
from .runner.tasks import digest

__all__ = ["LIMIT", "add_network", "archive", "finish", "make"]

LIMIT = 60 << 20
"""Bytes that the archive may have."""

_HERE = Path(__file__).resolve().parent
_CHECK_BATCH = 8
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 192 << 20, "mf": lzma.MF_HC4}]
_PACKAGES = ("tvm-vitq", "apache-tvm", "apache-tvm-ffi")


def make(
    output: Path, networks: Mapping[str, Network], batches: Sequence[int], arch: str,
    inputs: int = 64, samples: int = 128, kept: Path | None = None,
    verify_with: str | None = None, say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Make a bundle.

    Parameters
    ----------
    output
        Folder to make; the archive is beside it, with ``.tar.xz`` added to its name.
    networks
        By the name that the results will have.
    batches
        Images per call: one artefact each.
    arch
        Target of ``tvm-vitq compile``: ``sm_90``; a processor's name makes a bundle that the runner
        is tried with.
    inputs
        Derived inputs that the bundle knows the logits of.
    samples
        Calibration images of networks with real weights.
    kept
        Folder of quantized modules, to be used again.
    verify_with
        Emulator for the artefacts, see ``tvm-vitq compile``.
    say
        Progress.

    Returns
    -------
    Path
        The archive.

    Raises
    ------
    VitqError
        If the folder is in use, something does not compile, or the archive is too large. The
        folder is made whole or not at all.
    """
    output = Path(output).resolve()
    arch = _check(output, batches, arch, inputs, samples, verify_with)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as why:
        raise VitqError(f"cannot write {output}: {why.strerror}") from why
    (draft / "artifacts").mkdir()
    (draft / "checks").mkdir()
    models: dict[str, Any] = {}
    try:
        for name, network in networks.items():
            with tempfile.TemporaryDirectory() as folder:
                say(f"{name}: quantize")
                module = (kept or Path(folder)) / f"{name}.vitq"
                module.parent.mkdir(parents=True, exist_ok=True)
                quantized = apart(prepare, network, samples, module)
                say(f"{name}: {quantized.weights} weights")
                models[name] = add_network(draft, name, network, quantized, module, batches, arch,
                                           inputs, verify_with, say)  # fmt: skip
        finish(draft, models, arch)
        output.mkdir(exist_ok=True)
        for part in draft.iterdir():
            shutil.move(part, output / part.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    say("compress")
    return archive(output)


def _check(
    output: Path, batches: Sequence[int], arch: str, inputs: int, samples: int,
    verify_with: str | None,
) -> str:  # fmt: skip
    """Refuse at once what would fail after the first network; return the architecture's name."""
    from tvm_vitq.artifact.emulate import find_emulator
    from tvm_vitq.compiler import resolve

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VitqError(f"{output} is there already; name another folder or remove it")
    packed = _archive_of(output)
    if packed.exists():
        raise VitqError(f"{packed} is there already; name another folder or remove it")
    counts = {"--batch": min(batches), "--inputs": inputs, "--samples": samples}
    for option, least in counts.items():
        if least < 1:
            raise VitqError(f"{option} {least}: it must be at least 1")
    _, target = resolve(arch)
    if target.kind.name == "cuda":
        try:
            find_nvcc()
        except ValueError as why:
            raise VitqError(str(why)) from why
    if verify_with is not None:
        find_emulator(verify_with, target.kind.name == "cuda")
    return str(target.attrs["arch"]) if target.kind.name == "cuda" else arch


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: what compiling took is free again afterwards.

    Raises
    ------
    VitqError
        If the process dies; besides, what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_apart, args=(there, os.getpid(), function, arguments))
    process.start()
    there.close()
    try:
        made, value = here.recv()
    except EOFError:
        raise VitqError("a process that compiled has died; is there enough memory?") from None
    finally:
        process.kill()
        process.join()
    if not made:
        raise value
    return value


def _apart(pipe: Any, parent: int, function: Callable[..., Any], arguments: Any) -> None:
    bound(parent)
    try:
        pipe.send((True, function(*arguments)))
    except Exception as why:
        pipe.send((False, why if isinstance(why, VitqError) else VitqError(str(why))))


def compile_batch(
    module: Path, golden: np.ndarray | None, batch: int, arch: str, output: Path,
    verify_with: str | None,
) -> None:  # fmt: skip
    """Compile a quantized network for a batch."""
    from tvm_vitq.compiler import compile_module

    mod = load_quantized(module)
    compile_module(rebatch(mod, batch), arch, output, golden, verify_with=verify_with,
                   reference=rebatch(mod, 2))  # fmt: skip


def known_logits(module: Path, golden: np.ndarray | None, inputs: int) -> np.ndarray:
    """Return the logit codes of derived inputs.

    They are those of the artefact for this machine's processor, which compile has compared with the
    reference interpreter's.
    """
    from tvm_vitq.artifact.load import Artifact

    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "native.so"
        compile_batch(module, golden, _CHECK_BATCH, "native", native, None)
        known = Artifact(native)
        codes, _ = known.golden
        spec = known.metadata["input"]["codes"]
        return known.run_codes(derive(codes, inputs, spec["qmin"], spec["qmax"]))


def add_network(
    output: Path, name: str, network: Network, quantized: Quantized, module: Path,
    batches: Sequence[int], arch: str, inputs: int, verify_with: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Compile a network for every batch, and note the logits that it must give."""
    found: dict[str, str] = {}
    for batch in batches:
        place = f"artifacts/{name}_b{batch}.so"
        say(f"{name}: compile for batch {batch}")
        apart(compile_batch, module, quantized.golden, batch, arch, output / place, verify_with)
        found[str(batch)] = place
    say(f"{name}: logits of {inputs} inputs")
    logits = apart(known_logits, module, quantized.golden, inputs)
    checks = f"checks/{name}.npz"
    np.savez_compressed(output / checks, logits=logits)
    architecture = dict(network.architecture)
    return {
        "architecture": architecture, "blocks": blocks_of(architecture),
        "weights": quantized.weights, "recipe": quantized.recipe, "bars": network.bars,
        "checks": checks, "artifacts": found,
    }  # fmt: skip


def finish(output: Path, models: Mapping[str, Any], arch: str) -> None:
    """Add the runtime's libraries, the runner and ``bundle.json``."""
    on_gpu = is_cuda_name(arch)
    names = ["tvm_ffi/lib/libtvm_ffi.so", "tvm/lib/libtvm_runtime.so"]
    names += ["tvm/lib/libtvm_runtime_cuda.so"] if on_gpu else []
    (output / "lib").mkdir()
    for name in names:
        package, _, path = name.partition("/")
        spec = util.find_spec(package)
        if spec is None or spec.origin is None:
            raise VitqError(f"the Python package {package} is not installed")
        shutil.copyfile(Path(spec.origin).parent / path, output / "lib" / Path(path).name)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_HERE / "runner", output / "runner", ignore=skip)
    shutil.copyfile(_HERE / "README.md", output / "README.md")
    shutil.copyfile(_HERE.parents[1] / "LICENSE", output / "LICENSE")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    document = {
        "format": 1, "made": now, "arch": arch, "device": "cuda" if on_gpu else "cpu",
        "versions": {name: metadata.version(name) for name in _PACKAGES}, "models": dict(models),
        "sha256": {str(path.relative_to(output)): digest(path)
                   for folder in ("artifacts", "checks", "lib")
                   for path in sorted((output / folder).iterdir())},
    }  # fmt: skip
    text = json.dumps(document, indent=1) + "\n"
    (output / "bundle.json").write_text(text, encoding="utf-8")


def _archive_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tar.xz")


def archive(folder: Path, limit: int = LIMIT) -> Path:
    """Compress a bundle.

    Raises
    ------
    VitqError
        If the archive is larger than ``limit`` bytes; it is left there.
    """
    path = _archive_of(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with lzma.open(path, "wb", filters=_FILTERS) as packed, tarfile.open(
        fileobj=packed, mode="w"
    ) as tar:  # fmt: skip
        for file in files:
            tar.add(file, f"{folder.name}/{file.relative_to(folder)}")
    size = path.stat().st_size
    if size > limit:
        raise VitqError(
            f"{path} has {size / 2**20:.1f} MiB, more than {limit / 2**20:.0f}: leave out models "
            "or batches"
        )
    return path
