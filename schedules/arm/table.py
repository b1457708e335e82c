"""Look-up of 8-bit codes in a table of 256 bytes: GELU of the ``table`` family, with ``tbl``.

The table fills sixteen registers. ``tbl`` looks 16 codes up in the first four at once and gives 0
where an index is past 63; three ``tbx`` do so in the others, with the indices moved down by 64 each
time, and keep what is there where an index is out of range (indices are modulo 256, so those
already looked up are).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx

from ..builder import Writer, const, load
from ..operands import product

__all__ = ["byte_lookup"]

BYTES = 16
_FIRST, _NEXT = "llvm.aarch64.neon.tbl4.v16i8", "llvm.aarch64.neon.tbx4.v16i8"


def byte_lookup(
    func: tirx.PrimFunc, block: Any, attrs: Mapping[str, Any]
) -> tirx.PrimFunc | None:
    """Return ``func`` as a loop of ``tbl``, None if it is no look-up of bytes in 256 bytes.

    Parameters
    ----------
    func
        An unscheduled PrimFunc of one stage, with the parameters codes, table and result.
    block
        That stage.
    attrs
        Attributes of the new PrimFunc.
    """
    if len(func.params) != 3:
        return None
    codes, table, out = func.params
    total = product(out.shape)
    dtypes = {str(buffer.dtype) for buffer in func.params}
    if not dtypes <= {"int8", "uint8"} or product(table.shape) != 256 or total < BYTES:
        return None
    lowest = -128 if str(codes.dtype) == "int8" else 0
    if not _looks_up(block, codes, table, -lowest):
        return None
    w = Writer()
    source, target = w.flat(codes), w.flat(out)
    vectors = -(-total // BYTES)
    chunk = min(64, vectors)
    with w.loop("chunk", -(-vectors // chunk), "parallel") as part:
        # Codes index as unsigned bytes: the negative ones of int8, 128 and up, come first.
        parts = [w.bind("part", load(table, (i * BYTES + lowest) % 256, lanes=BYTES))
                 for i in range(256 // BYTES)]
        with w.loop("vector", chunk) as i:
            last = tirx.const(total - BYTES, "int32")
            at = w.bind("at", tirx.min((part * chunk + i) * BYTES, last))
            index = w.bind("index", tirx.reinterpret("uint8x16", load(source, at, lanes=BYTES)))
            result = None
            for first in range(0, len(parts), 4):
                four = parts[first : first + 4]
                by = index - const(first * BYTES, "uint8x16") if first else index
                kind = f"{table.dtype}x{BYTES}"
                result = w.bind("found", tirx.call_llvm_pure_intrin(
                    kind, _FIRST, *four, by) if result is None else tirx.call_llvm_pure_intrin(
                    kind, _NEXT, result, *four, by))
            w.store(target, result, at, lanes=BYTES)
    return w.prim_func(func.params, attrs)


def _looks_up(block: Any, codes: Any, table: Any, shift: int) -> bool:
    """Whether a stage stores ``table[codes[i] + shift]`` at i."""
    value = block.body.value
    if type(value).__name__ != "TensorLoad" or not value.source.same_as(table):
        return False
    (index,) = value.indices
    if type(index).__name__ == "Add" and isinstance(index.b, tirx.IntImm):
        shift -= int(index.b)
        index = index.a
    if type(index).__name__ != "Cast" or type(index.value).__name__ != "TensorLoad" or shift:
        return False
    inner, stored = index.value, block.body
    return bool(inner.source.same_as(codes)) and len(inner.indices) == len(stored.indices) and all(
        a.same_as(b) for a, b in zip(inner.indices, stored.indices, strict=True))
