"""Replay an artefact for an NVIDIA GPU without one: its program on the CPU, its kernels emulated.

The virtual machine runs the program that the artefact holds, with its memory plan, on the CPU.
Instead of each kernel an emulation of it runs (:mod:`schedules.cuda.emulate`), made of the very
text that nvcc compiled, which the artefact keeps; what would be recorded as a CUDA graph just runs.
What is left out is nvcc's machine code and the launch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

from .gpu import GPU_EMULATOR, GRAPH_FUNCTIONS, is_gpu

__all__ = ["NOT_SHOWN", "emulated_gpu_verify"]

NOT_SHOWN = "the machine code has not run on a GPU"
_PREFIX = "vitq.emulated."
_SKIP = 1
"""What an instrument of the virtual machine returns for a call that is not to be made."""


@contextmanager
def _graphs_just_run() -> Iterator[None]:
    """Let recorded parts of programs that are opened meanwhile run like any other function."""
    import tvm_ffi

    invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")
    made: dict[int, Any] = {}

    def allocated(machine: Any, function: Any, index: int) -> Any:
        if index not in made:
            made[index] = invoke(machine, function)
        return made[index]

    def run(machine: Any, function: Any, arguments: Any, *_: Any) -> Any:
        return invoke(machine, function, *arguments)

    replaced = dict(zip(GRAPH_FUNCTIONS, (allocated, run), strict=True))
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in replaced}
    for name, function in replaced.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                tvm_ffi.registry.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, function, override=True)


def emulated_gpu_verify(path: str | Path) -> dict[str, Any]:
    """Replay the golden vectors of an artefact for a GPU with emulated kernels, bit for bit.

    Returns
    -------
    dict
        As ``Artifact.verify``, with ``replayed_with``: ``"emulator"``, and ``not_shown``: what only
        a GPU can show.

    Raises
    ------
    VitqError
        If the file is no artefact for a GPU, or there is no C++ compiler.
    """
    import tvm_ffi

    from schedules.cuda.emulate import Emulator
    from schedules.cuda.lower import Kernel

    from .load import Artifact

    with _graphs_just_run():
        artifact = Artifact(path, describe_only=True)
    target = artifact.metadata["target"]
    if not is_gpu(target):
        raise VitqError(
            f"{path} is for a processor; {GPU_EMULATOR!r} replays what is for an NVIDIA GPU"
        )
    document = artifact._compressed("vitq_kernels")
    kernels = {name: Kernel.of_json(fields) for name, fields in document["launches"].items()}
    try:
        emulator = Emulator.of_source(document["source"], kernels, target["arch"])
    except ValueError as why:
        raise VitqError(str(why)) from why
    emulator.register(_PREFIX)

    def instrument(_function: Any, name: str, before: bool, _result: Any, *tensors: Any) -> int:
        if not before or name not in kernels:
            return 0
        tvm_ffi.get_global_func(_PREFIX + name)(*tensors)
        return _SKIP

    artifact._vm.set_instrument(instrument)
    try:
        return {**artifact.verify(), "replayed_with": GPU_EMULATOR, "not_shown": NOT_SHOWN}
    finally:
        for name in kernels:
            tvm_ffi.registry.remove_global_func(_PREFIX + name)
