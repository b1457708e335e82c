"""What ``inspect`` shows: the artefact's own description and what its file and machine code add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay_passes.errors import VitqError

from .disassemble import count_float_instructions
from .gpu import is_gpu

if TYPE_CHECKING:
    from .load import Artifact
    from .stored import StoredArtifact

__all__ = ["inspect_artifact"]


def inspect_artifact(artifact: Artifact | StoredArtifact) -> dict[str, Any]:
    """Describe an artefact as one JSON-ready dictionary.

    Returns
    -------
    dict
        The metadata document, and ``path``, ``size_bytes``, ``fp32_bytes`` (of the weights as
        float32), ``size_percent``, ``integer_only``, ``ranges_proved``, ``float_instructions``
        (floating-point arithmetic instructions outside the boundary kernels, of a GPU's code in its
        PTX; None where there is no disassembler), ``float_instructions_by_kernel``,
        ``golden_vectors``, and ``bounds``: the rows of the range proof.
    """
    meta = artifact.metadata
    size, fp32 = artifact.path.stat().st_size, 4 * int(meta["parameters"])
    report: dict[str, Any] = {
        "path": str(artifact.path),
        "size_bytes": size,
        "fp32_bytes": fp32,
        "size_percent": round(100 * size / fp32, 2) if fp32 else None,
        "integer_only": bool(meta["analysis"]["integer_only"]),
        "ranges_proved": bool(meta["analysis"]["ranges_proved"]),
        "golden_vectors": len(artifact.golden[0]),
    }
    if is_gpu(meta["target"]):
        # Others would have failed the compile, which looked at the PTX of every kernel.
        report["float_instructions"], report["float_instructions_by_kernel"] = 0, {}
        report["float_boundary"] = meta["gpu"]["float_boundary"]
        return _whole(report, artifact)
    try:
        census = count_float_instructions(artifact.path)
        report["float_instructions"] = census.total
        report["float_instructions_by_kernel"] = census.elsewhere
        report["float_boundary"] = census.boundary
        report["instructions"] = census.instructions
    except VitqError as why:
        report["float_instructions"] = None
        report["float_instructions_missing"] = str(why)
    return _whole(report, artifact)


def _whole(report: dict[str, Any], artifact: Artifact | StoredArtifact) -> dict[str, Any]:
    """Return the report with the metadata and the bounds."""
    meta = artifact.metadata
    analysis = {key: value for key, value in meta["analysis"].items() if key not in report}
    rest = {key: value for key, value in meta.items() if key != "analysis"}
    return {**report, **rest, **analysis, "bounds": artifact.bounds}
