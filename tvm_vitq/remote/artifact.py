"""An artefact that runs on a board: what :class:`tvm_vitq.artifact.load.Artifact` does, there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from relay_passes.errors import VitqError
from tvm_vitq.artifact.device import ARCHITECTURES
from tvm_vitq.artifact.gpu import is_gpu
from tvm_vitq.artifact.load import Artifact
from tvm_vitq.artifact.stored import StoredArtifact

from .errors import BoardGone, BoardTimeout, RemoteError
from .session import Session

__all__ = ["RemoteArtifact"]


class RemoteArtifact(Artifact):
    """An artefact on a board; it lives as long as its session.

    Parameters
    ----------
    path
        The artefact, on this machine.
    session
        Of the board. The file that is uploaded is removed as soon as it is loaded.
    threads
        Threads of its kernels there; None leaves the server's choice.

    Raises
    ------
    VitqError
        If the file is no artefact, is for another architecture or processor than the board's, for a
        GPU, or of another version.
    RemoteError
        If the board cannot load it.
    """

    def __init__(self, path: str | Path, session: Session, threads: int | None = None) -> None:
        from tvm import relax

        self.path = Path(path)
        self.session = session
        self._device = session.device
        stored = StoredArtifact(self.path)
        machine, self.metadata = stored.machine, stored.metadata
        board = session.board
        target = self.metadata["target"]
        instead = ARCHITECTURES.get(board.architecture or "", "native")
        if board.architecture not in (None, machine):
            raise VitqError(
                f"{path} was built for {machine} and the board {session.where} is "
                f"{board.architecture}; compile it again with --target {instead}"
            )
        if is_gpu(target):
            raise VitqError(
                f"{path} is for an NVIDIA GPU ({target['arch']}) and a board runs code for its "
                f"processor; compile it again with --target {instead}"
            )
        missing = board.missing(target.get("features", []))
        if missing:
            raise VitqError(
                f"{path} needs a processor with {', '.join(missing)}, which the board "
                f"{session.where} lacks; compile it for that processor"
            )
        if threads is not None:
            session.set_threads(threads)
        try:
            module = session.load(self.path)
            self._vm = session.run("starting its virtual machine",
                                   lambda: relax.VirtualMachine(module, self._device))  # fmt: skip
        except (BoardGone, BoardTimeout):
            raise
        except RemoteError as why:
            if "cannot open shared object file" in str(why):  # so says a loader of any other kind
                raise VitqError(
                    f"{path} was built for {machine} and the board {session.where} cannot load it: "
                    "it has another architecture"
                ) from why
            raise VitqError(
                f"{path} cannot be loaded by the TVM runtime of the board; compile it again with "
                f"the version of apache-tvm that is there ({why})"
            ) from why
        self._main, self._main_codes = "main", "main_codes"

    def _stored(self, function: str) -> np.ndarray:
        return self.session.run(f"reading {function}", lambda: self._vm[function]().numpy())

    def _call(self, function: str, part: np.ndarray) -> np.ndarray:
        # A virtual machine takes tensors from afar through its stateful interface only.
        self.set_input(function, part)
        with self.session.request(f"running {function}"):
            self._vm.invoke_stateful(function)
            result: np.ndarray = self._vm.get_outputs(function).numpy()
        return result

    def set_input(self, function: str, part: np.ndarray) -> None:
        """Put the input of one call there: ``main`` or ``main_codes``, ``[B, ...]``."""
        with self.session.request("copying an input"):
            self._vm.set_input(function, self.session.tensor(part))

    def time(self, function: str = "main") -> float:
        """Run once untimed and once timed, by the board's clock; return the seconds of the second.

        The input is what :meth:`set_input` put there last.
        """
        (seconds,) = self.session.time(self._vm.module, "invoke_stateful", [function])
        return float(seconds)

    def verify(self, rounds: int = 2) -> dict[str, Any]:
        """Replay the golden vectors on the board and compare the logit codes, bit for bit.

        Parameters
        ----------
        rounds
            How often all vectors are replayed, each time beginning with the next one: a result that
            depends on the call before it, or on an image's place in the batch, does not pass.

        Returns
        -------
        dict
            As ``Artifact.verify`` (with all rounds in ``logits_compared``), and ``rounds`` and
            ``server``.
        """
        codes, expected = self.golden
        different = 0
        for i in range(rounds):
            found = self.run_codes(np.roll(codes, -i, axis=0))
            different += int((found != np.roll(expected, -i, axis=0)).sum())
        return {
            "equal": different == 0,
            "vectors": len(codes),
            "logits_compared": int(expected.size) * rounds,
            "logits_different": different,
            "rounds": rounds,
            "server": self.session.where,
        }

    def inspect(self) -> NoReturn:
        """Refuse: machine code is read from the file.

        Raises
        ------
        VitqError
            Always.
        """
        raise VitqError("an artefact on a board cannot be inspected; load the file")
