"""An artefact that was compiled here for a machine that this one is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from relay_passes.errors import VitqError

__all__ = ["ForeignArtifact", "not_replayed"]


def not_replayed(vectors: int, why: str) -> dict[str, Any]:
    """Return the result of golden vectors that were stored, but not replayed."""
    return {
        "equal": None,
        "vectors": vectors,
        "logits_compared": 0,
        "logits_different": 0,
        "replayed_with": None,
        "not_replayed": why,
    }


class ForeignArtifact:
    """What ``compile`` returns for a target whose code this machine cannot run.

    Attributes
    ----------
    path
        The file.
    metadata
        As in :class:`~tvm_vitq.artifact.load.Artifact`.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], replay: Mapping[str, Any], why: str
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._replay = dict(replay)
        self._why = why

    def verify(self) -> dict[str, Any]:
        """Return what the golden vectors gave when the artefact was compiled.

        Returns
        -------
        dict
            As ``Artifact.verify``, with ``replayed_with`` the emulator's command; if there was none
            ``equal`` and ``replayed_with`` are None and ``not_replayed`` says why.
        """
        return dict(self._replay)

    def run(self, _x: Any) -> NoReturn:
        """Refuse: the code cannot run here.

        Raises
        ------
        VitqError
            Always.
        """
        raise VitqError(f"{self.path} cannot run here: {self._why}; copy it to its target")

    run_codes = run
