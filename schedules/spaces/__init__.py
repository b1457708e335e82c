"""One file for each kind of task: what is tuned there, and what the default rules choose."""

from __future__ import annotations

from collections.abc import Callable

from ..isa import ISA
from ..space import Space
from ..task import Task
from .gpu_attention import gpu_attention_space
from .gpu_linear import gpu_linear_space
from .linear import linear_space
from .matmul import matmul_space
from .rows import rows_space

__all__ = ["SPACES"]

SPACES: dict[str, Callable[[Task, ISA], Space | None]] = {
    "gpu_attention": gpu_attention_space,
    "gpu_linear": gpu_linear_space,
    "linear": linear_space,
    "matmul": matmul_space,
    "rows": rows_space,
}
"""Kind of a task -> its space on an instruction set; None where there is nothing to choose."""
