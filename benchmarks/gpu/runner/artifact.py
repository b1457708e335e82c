"""An artefact in the runtime: its metadata, its golden vectors, its compiled functions."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .ffi import Handle, Runtime

__all__ = ["Artifact"]


class Artifact:
    """A loaded artefact.

    Attributes
    ----------
    metadata
        What ``compile`` stored, with ``recipe`` and ``kernels`` (symbol to operator and shape).
    batch
        Images per call.
    """

    def __init__(self, path: Path, runtime: Runtime) -> None:
        """Load ``path`` on the runtime's device."""
        self.path, self.runtime = Path(path), runtime
        self._machine = runtime.load(path)
        self.metadata: dict[str, Any] = json.loads(self._stored("vitq_metadata").tobytes())
        self.metadata.update(json.loads(zlib.decompress(self._stored("vitq_details").tobytes())))
        self.batch = int(self.metadata["input"]["shape"][0])
        self._main = runtime.member(self._machine, "main")
        self._codes = runtime.member(self._machine, "main_codes")

    def _stored(self, name: str) -> np.ndarray:
        result: np.ndarray = self.runtime.member(self._machine, name)().numpy()
        return result

    def run(self, images: Handle) -> Handle:
        """Start the whole network on device memory; returns before it is done."""
        return self._main(images)  # type: ignore[no-any-return]

    def run_codes(self, codes: np.ndarray) -> np.ndarray:
        """Return the logit codes ``[N, classes]`` of input codes ``[N, ...]``."""
        found = []
        for start in range(0, len(codes), self.batch):
            part = codes[start : start + self.batch]
            missing = self.batch - len(part)
            # An incomplete group is filled up; no operator mixes images.
            whole = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            found.append(self._codes(self.runtime.tensor(whole)).numpy()[: len(part)])
        return np.concatenate(found)

    def golden(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored input codes and the logit codes they must give."""
        shift = int(self.metadata.get("golden", {}).get("shift", 0))
        stored = self._stored("vitq_golden_inputs").astype(np.int64) << shift
        codes = stored.astype(self.metadata["input"]["codes"]["dtype"])
        return codes, self._stored("vitq_golden_logits")

    def calls(self, images: np.ndarray) -> list[str]:
        """Return the symbols of the kernels that one call of the network runs, in their order.

        Kernels that a CUDA graph replays are not seen: ask an artefact that has not run yet.
        """
        names: list[str] = []

        def seen(arguments: list[Any]) -> int:
            # (function, symbol, before it runs, ...); the virtual machine's own are left out.
            if arguments[2] and arguments[1] in self.metadata["kernels"]:
                names.append(arguments[1])
            return 0

        watch = self.runtime.callback(seen)
        instrument = self.runtime.member(self._machine, "set_instrument")
        instrument(watch)
        self._main(self.runtime.tensor(images)).numpy()
        instrument(None)
        return names
