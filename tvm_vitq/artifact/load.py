"""Open an artefact, run it, replay its golden vectors; nothing but tvm and numpy is needed.

An artefact is compiled for one batch size B. :meth:`Artifact.run` takes any number of images: it
runs them B at a time and fills the last group up, which changes no image's logits, because no
operator of the dialect mixes images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.errors import VitqError

from .elf import check_artifact_file
from .golden import expand
from .gpu import is_gpu, open_without_gpu, reason_not_here
from .seal import check_seal
from .stored import check_format
from .threads import set_threads

__all__ = ["Artifact", "load", "missing_features"]

_WITHOUT_GPU = "replay it with 'tvm-vitq verify --with emulator', or compile it for this processor"


class Artifact:
    """A loaded artefact.

    Attributes
    ----------
    path
        Where it was loaded from.
    metadata
        Model, input and output specification, preprocessing, labels, target, recipe, versions and
        analysis results, as ``compile`` stored them.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, *, describe_only: bool = False
    ) -> None:
        """Load ``path``; see :func:`load`.

        With ``describe_only`` the code for a GPU need not be able to run on this machine; then what
        the artefact stores can be read, and no more.
        """
        self.path = Path(path)
        check_artifact_file(self.path)
        if threads is not None:
            set_threads(threads)
        import tvm
        from tvm import relax

        self._device = tvm.cpu()
        self._tensor = tvm.runtime.tensor
        open_without_gpu()
        try:
            module = _load_module(self.path.resolve())
            self._vm = relax.VirtualMachine(module, self._device)
            details = self._read_metadata()
        except VitqError:
            raise
        except Exception as why:
            lines = str(why).strip().splitlines() or [type(why).__name__]
            raise VitqError(
                f"{self.path} cannot be loaded by TVM {tvm.__version__}; compile it again with "
                f"this version of tvm-vitq ({lines[-1][:200]})"
            ) from why
        check_format(self.path, self.metadata)
        self._check_cpu()
        self.metadata |= details
        if is_gpu(self.metadata["target"]) and not describe_only:
            reason = reason_not_here(self.metadata["target"])
            if reason:
                raise VitqError(f"{self.path} cannot run here: {reason}; {_WITHOUT_GPU}")
            self._device = tvm.cuda()
            self._vm = relax.VirtualMachine(module, self._device)
        self._main = self._vm["main"]
        self._main_codes = self._vm["main_codes"]

    def _read_metadata(self) -> dict[str, Any]:
        """Read the metadata; return the part of it that is stored compressed."""
        raw = self._stored("vitq_metadata").tobytes()
        self.metadata: dict[str, Any] = json.loads(raw.decode())
        details: dict[str, Any] = self._compressed("vitq_details")
        return details

    def _check_cpu(self) -> None:
        missing = missing_features(self.metadata["target"].get("features", []))
        if missing:
            raise VitqError(
                f"{self.path} needs a processor with {', '.join(missing)}; compile it with "
                "--target native on this machine or with --target x86-64-v2"
            )

    # -- what it takes and gives ----------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Number of images that one call of the compiled function takes."""
        return int(self.metadata["input"]["shape"][0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image: ``(C, H, W)`` for float32 input, ``(H, W, C)`` for uint8."""
        return tuple(self.metadata["input"]["shape"][1:])

    @property
    def input_dtype(self) -> str:
        """``float32`` (normalised) or ``uint8`` (raw pixels)."""
        return str(self.metadata["input"]["dtype"])

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes, if they were given."""
        return self.metadata.get("labels")

    # -- running ---------------------------------------------------------------------------------
    def run(self, x: np.ndarray) -> np.ndarray:
        """Compute the logits of one or more images.

        Parameters
        ----------
        x
            ``[N, *input_shape]`` or one image ``[*input_shape]``, of the artefact's input dtype
            (float64 and float16 are taken as float32).

        Returns
        -------
        numpy.ndarray
            float32 logits ``[N, classes]``, or ``[classes]`` for one image.

        Raises
        ------
        VitqError
            If the shape or dtype is wrong, or a value is NaN or infinite.
        """
        x = np.asarray(x)
        if self.input_dtype == "float32":
            if x.dtype.kind != "f":
                raise VitqError(
                    f"the input is {x.dtype}; this artefact takes normalised float32 "
                    f"{self._wanted()}"
                )
            x = x.astype(np.float32, copy=False)
        elif x.dtype != np.uint8:
            raise VitqError(f"the input is {x.dtype}; this artefact takes uint8 {self._wanted()}")
        x, single = self._images(x, self.input_shape)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            bad = np.argwhere(~np.isfinite(x))[0]
            raise VitqError(
                f"the input has NaN or Inf, first at index {tuple(int(i) for i in bad)}"
            )
        logits = self._batches(self._main, x)
        return logits[0] if single else logits

    def run_codes(self, codes: np.ndarray) -> np.ndarray:
        """Compute logit codes from input codes, without a single floating-point operation.

        Parameters
        ----------
        codes
            ``[N, *code shape]`` of the dtype in ``metadata["input"]["codes"]``; for uint8 input
            these are the pixels themselves.

        Returns
        -------
        numpy.ndarray
            Integer logits ``[N, classes]``: real value = ``scale * (code - zero_point)`` with the
            numbers in ``metadata["output"]``.
        """
        spec = self.metadata["input"]["codes"]
        codes = np.asarray(codes)
        if str(codes.dtype) != spec["dtype"]:
            raise VitqError(
                f"the input codes are {codes.dtype}; this artefact takes {spec['dtype']}"
            )
        codes, single = self._images(codes, tuple(spec["shape"][1:]))
        logits = self._batches(self._main_codes, codes)
        return logits[0] if single else logits

    def _wanted(self) -> str:
        return "[N, " + ", ".join(str(v) for v in self.input_shape) + "]"

    def _images(self, x: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        single = x.shape == shape
        if single:
            x = x[None]
        if x.shape[1:] != shape or x.ndim != len(shape) + 1 or len(x) == 0:
            wanted = "[N, " + ", ".join(str(v) for v in shape) + "]"
            raise VitqError(
                f"the input has shape {list(x.shape)}; this artefact takes {wanted}, N >= 1"
            )
        return x, single

    def _batches(self, function: Any, x: np.ndarray) -> np.ndarray:
        size, out = self.batch, []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            missing = size - len(part)
            if missing:
                part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            out.append(self._call(function, np.ascontiguousarray(part))[: size - missing])
        return np.concatenate(out)

    def _call(self, function: Any, part: np.ndarray) -> np.ndarray:
        result: np.ndarray = function(self._tensor(part, self._device)).numpy()
        return result

    def _stored(self, function: str) -> np.ndarray:
        """Return a tensor that the artefact holds."""
        result: np.ndarray = self._vm[function]().numpy()
        return result

    # -- proof -----------------------------------------------------------------------------------
    @property
    def golden(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored input codes ``[V, ...]`` and the logit codes ``[V, classes]`` they must give."""
        stored = self._stored("vitq_golden_inputs")
        shift = int(self.metadata.get("golden", {}).get("shift", 0))
        codes = expand(stored, shift, self.metadata["input"]["codes"]["dtype"])
        return codes, self._stored("vitq_golden_logits")

    @property
    def bounds(self) -> list[dict[str, Any]]:
        """Rows of the range proof: binding, op, quantity, lo, hi, dtype, headroom_bits."""
        rows: list[dict[str, Any]] = self._compressed("vitq_bounds")
        return rows

    def _compressed(self, function: str) -> Any:
        try:
            return json.loads(zlib.decompress(self._stored(function).tobytes()))
        except (zlib.error, ValueError):
            part = function.removeprefix("vitq_")
            raise VitqError(
                f"{self.path} is damaged: its {part} cannot be read; copy it again or compile it "
                "again"
            ) from None

    def verify(self) -> dict[str, Any]:
        """Replay the golden vectors and compare the logit codes, bit for bit.

        Returns
        -------
        dict
            ``equal`` (bool), ``vectors``, ``logits_compared`` and ``logits_different``.
        """
        check_seal(self.path, self.metadata)
        codes, expected = self.golden
        different = int((self.run_codes(codes) != expected).sum())
        return {
            "equal": different == 0,
            "vectors": len(codes),
            "logits_compared": int(expected.size),
            "logits_different": different,
        }

    def inspect(self) -> dict[str, Any]:
        """Describe the artefact: see :func:`tvm_vitq.artifact.inspect.inspect_artifact`."""
        from .inspect import inspect_artifact

        check_seal(self.path, self.metadata)
        return inspect_artifact(self)


def load(path: str | Path, threads: int | None = None) -> Artifact:
    """Load an artefact that ``compile`` wrote.

    Parameters
    ----------
    path
        The ``.so`` file.
    threads
        Number of threads of this process's kernels; None leaves TVM's choice
        (``TVM_NUM_THREADS``, else the number of physical cores).

    Raises
    ------
    VitqError
        If the file is missing, truncated, foreign, from an older version, or for another machine;
        if there are more threads than the machine has a use for.
    """
    return Artifact(path, threads)


_LOADED: dict[Path, tuple[int, ...]] = {}


def _load_module(path: Path) -> Any:
    """Load a library; a changed file at a path loaded before gets a name of its own.

    The dynamic loader gives a name that it knows the library that it has, whatever the file is now.
    """
    import tvm

    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if _LOADED.setdefault(path, identity) == identity:
        return tvm.runtime.load_module(str(path))
    with tempfile.TemporaryDirectory(prefix="tvm-vitq-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        return tvm.runtime.load_module(str(copy))


def missing_features(needed: Sequence[str]) -> list[str]:
    """Return the features that this processor lacks; nothing where its features are unknown."""
    have = _cpu_flags()
    return [f for f in needed if have and f.replace("-", "").replace("_", "") not in have]


def _cpu_flags() -> frozenset[str]:
    """Return the processor's features as Linux lists them, without ``_``; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(flag.replace("_", "") for flag in value.split())
    return frozenset()
