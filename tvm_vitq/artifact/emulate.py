"""Run the functions of a library that this machine cannot load: through an emulator.

A small C++ program (``replay.cpp``) is built for the library's architecture, against that
architecture's TVM runtime, and started under an emulator such as ``qemu-aarch64``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.errors import VitqError

from .elf import MACHINES, host_machine
from .gpu import GPU_EMULATOR, is_gpu
from .stored import StoredArtifact
from .toolchain import compiler, include_folders, runtime_libraries

__all__ = ["Emulator", "check_architecture", "emulated_verify", "find_emulator", "run",
           "write_tensor"]

_SOURCE = Path(__file__).with_name("replay.cpp")


def find_emulator(command: str, gpu: bool = False) -> list[str]:
    """Split an emulator's command into words.

    Parameters
    ----------
    command
        For example ``"qemu-aarch64"``; for a GPU's code there is
        :data:`~tvm_vitq.artifact.gpu.GPU_EMULATOR` alone.
    gpu
        Whether what is to be emulated is a GPU's code.

    Raises
    ------
    VitqError
        If its program is not installed, or it is not for such code.
    """
    if (command == GPU_EMULATOR) != gpu:
        only = "replays" if gpu else "is"
        raise VitqError(
            f"{command!r} cannot replay this target's code: {GPU_EMULATOR!r} {only} "
            f"{'it' if gpu else 'for an NVIDIA GPU; name a processor, as qemu-aarch64'}"
        )
    if gpu:
        return []
    words = shlex.split(command)
    if words and shutil.which(words[0]) is None:
        mend = "install it, on Debian and Ubuntu: apt-get install qemu-user"
        if not Path(words[0]).name.startswith("qemu-"):
            mend = f"there are qemu-aarch64 and the like, and {GPU_EMULATOR} for an NVIDIA GPU"
        raise VitqError(f"no emulator {words[0]}; {mend}")
    return words


def check_architecture(command: str, machine: str, what: str, flag: str = "--with") -> None:
    """Refuse one of qemu's emulators that is, by its name, for another architecture.

    Parameters
    ----------
    command
        As :func:`find_emulator` takes it.
    machine
        Architecture of the code, as in :data:`~tvm_vitq.artifact.elf.MACHINES`.
    what
        The code, for the error.
    flag
        Where the user gave the command.

    Raises
    ------
    VitqError
        If it is.
    """
    words = shlex.split(command)
    named = Path(words[0]).name.removesuffix("-static") if words else ""
    if not named.startswith("qemu-"):
        return
    if named.removeprefix("qemu-") not in {*MACHINES.values()} - {machine}:
        return
    mend = f"leave out {flag}" if machine == host_machine() else f"give {flag} qemu-{machine}"
    raise VitqError(f"{what} was built for {machine}: {mend}")


class Emulator:
    """An emulator command and the program that runs libraries under it.

    Parameters
    ----------
    command
        For example ``"qemu-aarch64"`` or ``"qemu-aarch64 -cpu cortex-a72"``; "" runs the program as
        it is, on a machine that can.
    architecture
        Of the libraries.
    folder
        Where the program is kept; it is built if it is not there yet.

    Raises
    ------
    VitqError
        If the emulator, the compiler or the runtime is not to be had.
    """

    def __init__(self, command: str, architecture: str, folder: str | Path) -> None:
        self.command = find_emulator(command)
        self.architecture = architecture
        self.program = Path(folder) / f"replay-{architecture}"
        if not self.program.exists():
            self._build()

    def _build(self) -> None:
        libraries = runtime_libraries(self.architecture)
        draft = self.program.with_name(f"{self.program.name}.{os.getpid()}")
        command = [compiler(self.architecture), "-std=c++17", "-O1", "-o", str(draft)]
        command += [f"-I{path}" for path in include_folders()]
        command += [str(_SOURCE), "-Wl,--no-as-needed", *map(str, libraries)]
        command += [f"-Wl,-rpath,{path.parent.resolve()}" for path in libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise VitqError(f"the replay program does not build for {self.architecture}: {last}")
        draft.replace(self.program)

    def call(
        self, library: str | Path, calls: Sequence[tuple[str, Sequence[np.ndarray]]]
    ) -> list[np.ndarray]:
        """Call functions of a library, in one process.

        Parameters
        ----------
        library
            An artefact, or a library of single kernels.
        calls
            Names and arguments. A kernel's last argument receives its result.

        Returns
        -------
        list of numpy.ndarray
            The results.

        Raises
        ------
        VitqError
            If the program fails; its last line says why.
        """
        with tempfile.TemporaryDirectory(prefix="tvm-vitq-") as scratch:
            folder = Path(scratch)
            words = []
            for i, (name, arguments) in enumerate(calls):
                paths = [folder / f"{i}_{j}.in" for j in range(len(arguments))]
                for path, value in zip(paths, arguments, strict=True):
                    write_tensor(path, value)
                words.append(f"{name}={','.join(map(str, paths))}" if paths else name)
            command = [*self.command, str(self.program), str(Path(library).resolve()), scratch]
            done = subprocess.run([*command, *words], capture_output=True, text=True, check=False,
                                  env=self._environment())  # fmt: skip
            place = " ".join(self.command) or "no emulator"
            if done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
                raise VitqError(f"{library} has instructions that {place} lacks{_needs(library)}")
            if done.returncode != 0:
                last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
                raise VitqError(f"{library} fails under {place}: {last}")
            results = [folder / f"{i}.tensor" for i in range(len(calls))]
            if not all(path.is_file() for path in results):
                raise VitqError(f"{place} ended without running the code; is it an emulator for "
                                f"{self.architecture}?")  # fmt: skip
            return [_read(path) for path in results]

    def _environment(self) -> dict[str, str]:
        """Tell qemu where the architecture's C library is, unless the user does."""
        environment = {"TVM_NUM_THREADS": "1", **os.environ}
        root = Path(f"/usr/{self.architecture}-linux-gnu")
        if root.is_dir():
            environment.setdefault("QEMU_LD_PREFIX", str(root))
        return environment


def _needs(library: str | Path) -> str:
    """Return what the processor must have to run an artefact, as the end of an error."""
    try:
        features = StoredArtifact(library).metadata["target"]["features"]
    except VitqError:  # a library of single kernels
        return ""
    return f": it needs {', '.join(features)}; name a processor that has it, as with -cpu max"


def write_tensor(path: Path, value: np.ndarray) -> None:
    """Write an array as ``replay.cpp`` reads it: a line with dtype and extents, then the bytes."""
    header = " ".join([str(value.dtype), *map(str, value.shape)])
    path.write_bytes(header.encode() + b"\n" + np.ascontiguousarray(value).tobytes())


def _read(path: Path) -> np.ndarray:
    header, _, data = path.read_bytes().partition(b"\n")
    dtype, *shape = header.decode().split()
    return np.frombuffer(data, dtype).reshape([int(extent) for extent in shape])


def run(
    emulator: Emulator, library: str | Path, function: str, inputs: np.ndarray, batch: int
) -> np.ndarray:
    """Run an artefact's ``main`` or ``main_codes`` on any number of inputs.

    Parameters
    ----------
    emulator
        What runs it.
    library
        The artefact.
    function
        ``"main"`` (float32 or uint8 images to float32 logits) or ``"main_codes"``.
    inputs
        ``[N, ...]``.
    batch
        Images that one call of the compiled function takes.

    Returns
    -------
    numpy.ndarray
        ``[N, classes]``.
    """
    parts = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        filler = np.repeat(part[-1:], batch - len(part), axis=0)
        parts.append(np.concatenate([part, filler]))
    results = emulator.call(library, [(function, [part]) for part in parts])
    return np.concatenate(results)[: len(inputs)]


def emulated_verify(path: str | Path, command: str) -> dict[str, Any]:
    """Replay the golden vectors of an artefact under an emulator and compare, bit for bit.

    Parameters
    ----------
    path
        The artefact.
    command
        The emulator, as :class:`Emulator` takes it.

    Returns
    -------
    dict
        As ``Artifact.verify``, and ``replayed_with``: the command.

    Raises
    ------
    VitqError
        If the artefact cannot be run so.
    """
    if command == GPU_EMULATOR:
        from .emulate_gpu import emulated_gpu_verify

        return emulated_gpu_verify(path)
    stored = StoredArtifact(path)
    find_emulator(command, is_gpu(stored.metadata["target"]))
    check_architecture(command, stored.machine, str(path))
    codes, expected = stored.golden
    with tempfile.TemporaryDirectory(prefix="tvm-vitq-") as scratch:
        emulator = Emulator(command, stored.machine, scratch)
        batch = int(stored.metadata["input"]["codes"]["shape"][0])
        found = run(emulator, path, "main_codes", codes, batch)
    different = int((found != expected).sum())
    return {
        "equal": different == 0,
        "vectors": len(codes),
        "logits_compared": int(expected.size),
        "logits_different": different,
        "replayed_with": command,
    }
