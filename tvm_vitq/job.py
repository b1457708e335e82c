"""The whole compile job as the command line runs it: load, calibrate, quantize, compile, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_passes.errors import VitqError
from tvm_vitq.artifact.output import check_output

if TYPE_CHECKING:
    import tvm

    from tvm_vitq.quantizers.recipe import Recipe

__all__ = ["CompileJob", "make_recipe", "parse_preprocess"]


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        raise VitqError(f"--{name}: {text!r} is not a number or numbers with commas") from None


def parse_preprocess(flags: dict[str, Any]) -> dict[str, Any]:
    """Turn preprocessing flags into the keywords of ``load_model``; absent flags are left out.

    Raises
    ------
    VitqError
        If a flag's text is not made of numbers or has a wrong length.
    """
    found = {key: value for key, value in flags.items() if value is not None}
    if "input_size" in found:
        sizes = _numbers("input-size", found["input_size"], int)
        if len(sizes) == 1:
            sizes = sizes * 2
        if len(sizes) == 2:
            sizes = [3, *sizes]
        if len(sizes) != 3 or min(sizes) < 1:
            raise VitqError(f"--input-size: {found['input_size']!r} is not S, H,W or C,H,W")
        found["input_size"] = sizes
    if "resize" in found:
        sizes = _numbers("resize", found["resize"], int)
        if len(sizes) > 2:
            raise VitqError(f"--resize: {found['resize']!r} is not S or H,W")
        found["resize"] = sizes[0] if len(sizes) == 1 else sizes
    for key in ("mean", "std"):
        if key in found:
            values = _numbers(key, found[key], float)
            if len(values) not in (1, 3):
                raise VitqError(f"--{key}: give one number or three, got {found[key]!r}")
            found[key] = values * 3 if len(values) == 1 else values
    return found


def make_recipe(source: str | None, choices: dict[str, Any]) -> Recipe:
    """Make a recipe from a preset's name or a JSON file, and single choices that override it.

    Raises
    ------
    VitqError
        If there is no such preset or file, or a value is not one of the recipe's.
    """
    from tvm_vitq.quantizers.recipe import PRESETS, Recipe, preset

    changes = {key: value for key, value in choices.items() if value is not None}
    if source is None or source in PRESETS:
        return preset(source or "default", **changes)
    path = Path(source)
    if not path.is_file():
        raise VitqError(f"--recipe: {source!r} is no file and no preset ({', '.join(PRESETS)})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        raise VitqError(f"--recipe: cannot read {source} as JSON: {why}") from why
    if not isinstance(values, dict):
        raise VitqError(f"--recipe: {source} must hold one JSON object of the recipe's fields")
    return Recipe.from_dict({**values, **changes})


_FILES = (".onnx", ".pt2", ".vitq", ".json", ".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".so")
"""Endings that no model's name has."""


@dataclass
class CompileJob:
    """One ``tvm-vitq compile``; the fields are its options."""

    model: str
    output: Path
    checkpoint: str | None = None
    calib: str | None = None
    samples: int = 128
    recipe: str | None = None
    choices: dict[str, Any] = field(default_factory=dict)
    input_form: str = "float32"
    batch: int | None = None
    target: str = "native"
    save_quantized: Path | None = None
    labels: Path | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    dump_ir: Path | None = None
    threads: int | None = None
    verify_with: str | None = None
    records: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    phases = 7
    """Number of phases that :meth:`run` reports."""

    def run(self, advance: Callable[[int], None], say: Callable[[str], None]) -> dict[str, Any]:
        """Do the job.

        Parameters
        ----------
        advance, say
            Report progress: phases done since the last call (of :attr:`phases`), the phase begun.

        Returns
        -------
        dict
            ``artifact``, ``size_bytes``, ``size_percent``, the results of the proofs and of the
            replayed golden vectors, and ``seconds`` by phase.

        Raises
        ------
        VitqError
            Before any long work if an option, an input file or the output cannot be used.
        """
        from tvm_vitq.saved import is_saved_module

        check_output(self.output)
        saving = self.save_quantized
        if saving is not None and check_output(saving) == check_output(self.output):
            raise VitqError("--save-quantized and --output name the same file")
        dump = None if self.dump_ir is None else Path(self.dump_ir)
        if dump is not None and dump.exists() and not dump.is_dir():
            raise VitqError(f"cannot write the IR to {dump}: it is a file; name a folder")
        preprocess = parse_preprocess(self.preprocess)
        saved = is_saved_module(self.model)
        self._check_options(saved, preprocess)
        from tvm_vitq.artifact.emulate import check_architecture, find_emulator
        from tvm_vitq.artifact.gpu import GPU_EMULATOR
        from tvm_vitq.artifact.toolchain import compiler

        # What can be known before TVM is imported, which takes seconds.
        if self.verify_with is not None:
            find_emulator(self.verify_with, self.verify_with == GPU_EMULATOR)
        if self.target.partition("+")[0] == "aarch64":
            compiler("aarch64")
        from schedules.isa import architecture_of
        from tvm_vitq.compiler import compile_module, resolve
        from tvm_vitq.evaluate import read_names

        _, target = resolve(self.target)
        if self.verify_with is not None:
            find_emulator(self.verify_with, target.kind.name == "cuda")
            check_architecture(self.verify_with, architecture_of(target),
                               f"code for {self.target}", "--verify-with")  # fmt: skip
        if target.kind.name == "cuda" and (self.threads or 1) > 1:
            raise VitqError("--threads is for processors, and the target is a GPU")
        labels = read_names(self.labels) if self.labels is not None else None
        if self.threads is not None:
            from tvm_vitq.artifact.threads import set_threads

            set_threads(self.threads)

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            say(name)
            start = time.perf_counter()
            yield
            self.seconds[name] = round(time.perf_counter() - start, 3)
            advance(1)

        quantized, golden = (
            self._from_saved(phase) if saved else self._from_model(phase, preprocess)
        )
        artifact = compile_module(
            quantized,
            self.target,
            self.output,
            golden,
            labels=labels,
            dump_ir=self.dump_ir,
            phase=phase,
            verify_with=self.verify_with,
            records=self.records,
            threads=self.threads or 1,
        )
        return self._report(artifact)

    def quantized(self) -> tvm.IRModule:
        """Return the quantized module, and do nothing else."""
        from tvm_vitq.saved import is_saved_module

        preprocess = parse_preprocess(self.preprocess)
        saved = is_saved_module(self.model)
        self._check_options(saved, preprocess)

        def phase(_name: str) -> nullcontext[None]:
            return nullcontext()

        made, _ = self._from_saved(phase) if saved else self._from_model(phase, preprocess)
        return made

    def _check_model(self) -> None:
        """Refuse a file that is not there, or that no front end reads; names are left to them."""
        path = Path(self.model)
        if ":" in self.model or (path.suffix not in _FILES and "/" not in self.model):
            return
        if not path.exists():
            raise VitqError(f"there is no file {path}")
        if path.suffix not in (".onnx", ".pt2"):
            raise VitqError(
                f"{path} is no model: give a timm name (with --checkpoint), a factory "
                "'package.module:function', .pt2, .onnx, or what --save-quantized wrote"
            )

    def _check_options(self, saved: bool, preprocess: dict[str, Any]) -> None:
        if not saved:
            self._check_model()
        if not saved and self.calib is None:
            raise VitqError("--calib is missing: give a folder of images, an .npz or an .npy")
        if self.calib is not None and not Path(self.calib).exists():
            raise VitqError(f"--calib: there is no {self.calib}; give a folder, .npz or .npy")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise VitqError(f"--checkpoint: there is no file {self.checkpoint}")
        if saved:
            given = [f"--{k}" for k, v in self.choices.items() if v is not None]
            given += ["--recipe"] * (self.recipe is not None)
            given += ["--checkpoint"] * (self.checkpoint is not None)
            given += ["--" + k.replace("_", "-") for k in preprocess]
            given += ["--batch"] * (self.batch is not None) + ["--input"] * (
                self.input_form != "float32"
            )
            if given:
                raise VitqError(
                    f"{self.model} is quantized already; {', '.join(given)} cannot change it: "
                    f"compile the model itself with {' and '.join(given)}, and --save-quantized"
                )

    def _from_saved(self, phase: Any) -> tuple[tvm.IRModule, np.ndarray | None]:
        from tvm_vitq.saved import load_quantized

        with phase("load"):
            quantized = load_quantized(self.model)
            golden = None
            if self.calib is not None:
                from tvm_vitq.calibration.data import load_images

                golden = load_images(self.calib, quantized, 2).numpy()
        return quantized, golden

    def _from_model(
        self, phase: Any, preprocess: dict[str, Any]
    ) -> tuple[tvm.IRModule, np.ndarray]:
        from tvm_vitq import load_model, quantize
        from tvm_vitq.calibration.data import load_images
        from tvm_vitq.saved import save_quantized

        recipe = make_recipe(self.recipe, {**self.choices, "images": self.samples})
        with phase("load"):
            module = load_model(
                self.model,
                checkpoint=self.checkpoint,
                batch=self.batch,
                input=self.input_form,
                **preprocess,
            )
        with phase("calibration images"):
            images = load_images(self.calib, module, self.samples)
        with phase("quantize"):
            quantized = quantize(module, images, recipe)
        if self.save_quantized is not None:
            save_quantized(quantized, self.save_quantized)
        return quantized, images[:2].numpy()

    def _report(self, artifact: Any) -> dict[str, Any]:
        meta = artifact.metadata
        size, fp32 = artifact.path.stat().st_size, 4 * int(meta["parameters"])
        return {
            "artifact": str(self.output),
            "model": meta["model"].get("name"),
            "target": meta["target"]["name"],
            "size_bytes": size,
            "size_percent": round(100 * size / fp32, 2) if fp32 else None,
            "integer_only": meta["analysis"]["integer_only"],
            "ranges_proved": meta["analysis"]["ranges_proved"],
            **artifact.verify(),
            "schedules": meta["schedules"],
            "seconds": self.seconds,
        }
