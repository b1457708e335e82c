"""Small quantize/dequantize modules for tests of lowering."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

__all__ = ["build", "fake_quant", "weight"]


def fake_quant(
    bb: relax.BlockBuilder, x: relax.Expr, scale: float, zero: int = 0, dtype: str = "int8"
) -> relax.Var:
    """Emit dequantize(quantize(x)) with one scale and zero point."""
    args = (relax.const(np.float32(scale)), relax.const(np.array(zero, dtype)))
    codes = bb.emit(relax.op.quantize(x, *args, axis=-1, out_dtype=dtype))
    return bb.emit(relax.op.dequantize(codes, *args, axis=-1, out_dtype="float32"))


def weight(bb: relax.BlockBuilder, codes: np.ndarray, scale: np.ndarray) -> relax.Var:
    """Emit the dequantize of an int8 weight constant [K, N] scaled per output channel."""
    return bb.emit(
        relax.op.dequantize(
            relax.const(codes.astype("int8")),
            relax.const(scale.astype("float32")),
            relax.const(np.int8(0)),
            axis=1,
            out_dtype="float32",
        )
    )


def build(shape: tuple[int, ...], body, dtype: str = "float32") -> tvm.IRModule:
    """Build ``main(x)`` from ``body(bb, x) -> expr``."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(body(bb, x))
        bb.emit_func_output(out)
    return bb.get()
