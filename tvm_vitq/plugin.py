"""The plug-in: what ``import tvm`` runs, through TVM's entry-point group ``tvm.backends``.

Registration only leaves a name behind. The passes, the dialect and the tensor intrinsics are
imported when the pipeline is asked for, so that a program that never quantizes pays well under
50 ms and no torch.

Set ``TVM_DEVICE_BACKEND_AUTOLOAD=0`` to keep TVM from calling any entry point; :func:`register` can
then be called by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.transform import Pass

__all__ = ["PIPELINE", "pipeline", "register"]

PIPELINE = "vitq"
"""The name under which ``relax.get_pipeline`` knows the pipeline."""


def pipeline(target: Any = None, **options: Any) -> Pass:
    """Return the pass from quantize/dequantize form to a scheduled module that ``tvm`` can build.

    Parameters
    ----------
    target : tvm.target.Target, dict or str, optional
        What to compile for; None takes the target in scope, as ``tvm.compile(mod, target,
        relax_pipeline=...)`` sets it.
    **options
        Handed on to :func:`relay_passes.pipeline.vitq_pipeline`.

    Returns
    -------
    tvm.transform.Pass
        Takes an IRModule that ``tvm_vitq.quantize`` made (or an imported, already quantized one).
    """
    import tvm

    from relay_passes.pipeline import vitq_pipeline

    if target is not None and not isinstance(target, tvm.target.Target):
        target = tvm.target.Target(target)
    return vitq_pipeline(target, **options)


def register() -> None:
    """Make ``relax.get_pipeline("vitq")`` work; calling it again changes nothing."""
    from tvm.relax import pipeline as relax_pipeline

    if PIPELINE not in relax_pipeline.PIPELINE_MAP:
        relax_pipeline.register_pipeline(PIPELINE)(pipeline)
