"""Which kernel a PrimFunc gets on a GPU, if it is in no group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx

from schedules.gemm import GemmSpec
from schedules.records import Schedules

from .elementwise import lower_elements
from .linear import packed_linear
from .rows import lower_rows

__all__ = ["schedule_cuda"]


def schedule_cuda(
    func: tirx.PrimFunc, spec: GemmSpec | None, blocks: Sequence[Any], attrs: Mapping[str, Any],
    schedules: Schedules | None = None,
) -> tirx.PrimFunc:  # fmt: skip
    """Return ``func`` as one kernel launch.

    Parameters
    ----------
    func
        Made of TE stages.
    spec
        Its annotation, if it is a matmul.
    blocks
        Its blocks in order, without the root.
    attrs
        Attributes of the new PrimFunc.
    schedules
        Records of tuning; None for the default rules alone.
    """
    if spec is not None and spec.kind == "packed_linear":
        return packed_linear(list(func.params), spec, attrs, schedules=schedules)
    return lower_rows(func, blocks, attrs) or lower_elements(func, blocks, attrs)
