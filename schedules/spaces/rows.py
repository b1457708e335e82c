"""Operators over rows: how many run through all their stages together, and the vectors' width.

=======  =========================================================================================
block    rows that go through one stage after the other, their intermediates in the cache
width    16-bit words of a vector
=======  =========================================================================================
"""

from __future__ import annotations

import hashlib
import re

from tvm import tirx

from ..isa import ISA
from ..operands import product
from ..space import Space
from ..task import Point, Task

__all__ = ["CACHE_BYTES", "default_rows", "rows_space", "rows_task"]

CACHE_BYTES = 12 * 1024
"""What the intermediates of the rows that run together may take."""
_LONGEST = 16


def rows_task(func: tirx.PrimFunc, local: int) -> Task:
    """Describe an operator over rows by its PrimFunc; the shape is rows, columns.

    Parameters
    ----------
    func
        The PrimFunc, unscheduled.
    local
        Bytes of intermediates a row, 0 if it has none.
    """
    *outer, columns = (int(extent) for extent in func.params[-1].shape)
    dtypes = f"{func.params[0].dtype}→{func.params[-1].dtype}"
    loops = hashlib.sha256(_loops(func).encode()).hexdigest()[:8]
    op = str(func.attrs["vitq.op"]).removeprefix("vitq.") if "vitq.op" in func.attrs else "rows"
    return Task.of("rows", op=op, shape=[product(outer), columns], dtypes=dtypes, local=local,
                   loops=loops)


def _loops(func: tirx.PrimFunc) -> str:
    """Return the text of a PrimFunc without what changes no schedule.

    That is what layers differ in: constants (clamps, shifts), names of parameters, attributes.
    """
    text = "\n".join(line for line in func.script().splitlines() if "T.func_attr" not in line)
    for number, buffer in enumerate(func.params):
        text = re.sub(rf"\b{re.escape(buffer.name)}\b", "p" * (number + 1), text)
    return re.sub(r"\d+", "#", text)


def default_rows(isa: ISA, rows: int, columns: int, local: int) -> Point:
    """Return rows and width that are used where no record says better.

    Vectors as wide as the machine's, or as a row if that is shorter: a last vector that repeats a
    part of the row costs less than twice as many vectors. As many rows as keep their intermediates
    in :data:`CACHE_BYTES`, eight at most.
    """
    width = isa.vector_bits // 16
    while width > columns:
        width //= 2
    block = max(1, min(8, CACHE_BYTES // max(local, 1), rows)) if local else 1
    return {"block": block, "width": width}


def rows_space(task: Task, isa: ISA) -> Space:
    """Return the space of an operator over rows."""
    rows, columns = task.shape
    local = int(task.fields["local"])
    default = default_rows(isa, rows, columns, local)
    widths = {w for w in (8, 16, 32) if w <= min(columns, isa.vector_bits // 16)}
    blocks = {b for b in (1, 2, 3, 4, 6, 8, 12, _LONGEST) if b <= rows}
    parameters = {"block": sorted({*blocks, default["block"]}),
                  "width": sorted({*widths, default["width"]})}

    def cost(point: Point) -> float:
        longer = abs(point["block"] - default["block"]) / _LONGEST
        return default["width"] / point["width"] + longer

    return Space(parameters, default, cost=cost)
