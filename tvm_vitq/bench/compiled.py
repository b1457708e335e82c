"""Our runner: an artefact's compiled function on an input that is in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.artifact.load import load

__all__ = ["Compiled"]


class Compiled:
    """An artefact and one input for it.

    Attributes
    ----------
    kernels
        What the artefact says of its kernels (:mod:`tvm_vitq.artifact.kernels`), by symbol.
    """

    def __init__(self, path: str | Path, threads: int) -> None:
        """Load ``path``."""
        import tvm

        self.artifact = load(path, threads)
        self.kernels: dict[str, dict[str, Any]] = self.artifact.metadata.get("kernels") or {}
        shape = (self.artifact.batch, *self.artifact.input_shape)
        rng = np.random.default_rng(0)
        if self.artifact.input_dtype == "uint8":
            x = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            x = rng.standard_normal(shape).astype(np.float32)
        self._x = tvm.runtime.tensor(x, tvm.cpu())
        self._main = self.artifact._main

    def run(self) -> Any:
        """Run it once."""
        return self._main(self._x)

    def instrument(self, before: Callable[[], None], after: Callable[[str], None]) -> None:
        """Have every call of the virtual machine reported; ``after`` is told the symbol."""

        def report(_func: Any, symbol: str, is_before: bool, _value: Any, *_args: Any) -> int:
            if is_before:
                before()
            else:
                after(symbol)
            return 0  # run it

        self.artifact._vm.set_instrument(report)
