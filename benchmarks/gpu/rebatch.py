"""A quantized network for another batch: the same codes and scales, other shapes.

Calibration and the reference interpreter take time in proportion to the batch, so a network is
quantized once, at a small one. In a module in quantize/dequantize form the batch is a factor of the
leading extent of every activation; constants that were repeated for it (class token, masks of
windows) are repeated anew.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relay_passes.dialect.registry import constant_of
from relay_passes.errors import VitqError

__all__ = ["batch_of", "rebatch"]

_SAME = ("relax.quantize", "relax.dequantize")
_BINARY = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


def batch_of(mod: tvm.IRModule) -> int:
    """Return the batch of a module: the leading extent of its input."""
    return int(mod["main"].params[0].ty.shape.values[0])


def _dims(expr: relax.Expr) -> list[int]:
    return [int(extent) for extent in expr.ty.shape.values]


class _Rebatch:
    def __init__(self, mod: tvm.IRModule, batch: int) -> None:
        self.main, self.old, self.new = mod["main"], batch_of(mod), batch
        self.bb = relax.BlockBuilder()
        self.known: dict[relax.Var, relax.Expr] = {}
        self.made_of = {b.var: b.value for block in self.main.body.blocks for b in block.bindings}

    def extent(self, old: int) -> int:
        """Return the new leading extent for an old one."""
        if old % self.old:
            raise VitqError(f"an activation's leading extent {old} is no multiple of the batch")
        return old // self.old * self.new

    def value(self, expr: relax.Expr, leading: int | None = None) -> relax.Expr:
        """Return an operand in the new function.

        Parameters
        ----------
        expr
            Operand of the old one.
        leading
            The old result's leading extent, if a constant that has it must follow the batch.
        """
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.value(field, leading) for field in expr.fields])
        followed = None if leading is None else self.follow(expr, leading)
        if followed is not None:
            return followed
        return self.known[expr] if isinstance(expr, relax.Var) else expr

    def follow(self, expr: relax.Expr, leading: int) -> relax.Expr | None:
        """Return a constant, quantized or not, for the new batch; None if it doesn't follow it."""
        if isinstance(expr, relax.Var):
            source = self.made_of.get(expr)
            if not isinstance(source, relax.Call) or source.op.name not in _SAME:
                return None
            first = self.follow(source.args[0], leading)
            if first is None:
                return None
            again = relax.Call(source.op, [first, *source.args[1:]], source.attrs)
            return self.bb.emit(again, expr.name)
        constant = constant_of(expr)
        if constant is None or constant.ndim < 2 or len(constant) != leading:
            return None
        return relax.const(self.repeat(constant))

    def repeat(self, constant: np.ndarray) -> np.ndarray:
        """Repeat along the batch what was repeated for the old one."""
        one = constant[: len(constant) // self.old]
        if not np.array_equal(np.concatenate([one] * self.old), constant):
            raise VitqError("a constant differs from image to image")
        return np.concatenate([one] * self.new)

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr:
        """Make a call anew."""
        name = call.op.name
        if name == "relax.reshape":
            first, *rest = _dims(var)
            return relax.op.reshape(self.value(call.args[0]), (self.extent(first), *rest))
        leading: int | None = _dims(var)[0]
        # A binary operator broadcasts an extent of 1 by itself.
        if not (name == "relax.concat" or (name in _BINARY and leading != 1)):
            leading = None
        return relax.Call(call.op, [self.value(a, leading) for a in call.args], call.attrs)

    def run(self) -> relax.Function:
        """Return the function for the new batch."""
        (x,) = self.main.params
        first, *rest = _dims(x)
        entry = relax.Var(x.name, relax.TensorType((self.extent(first), *rest), x.ty.dtype))
        self.known[x] = entry
        with self.bb.function("main", [entry]):
            with self.bb.dataflow():
                for var, value in self.made_of.items():
                    if isinstance(value, relax.Call):
                        self.known[var] = self.bb.emit(self.call(var, value), var.name)
                    else:
                        self.known[var] = self.value(value)
                out = self.bb.emit_output(self.value(self.main.body.body))
            self.bb.emit_func_output(out)
        # What was quantized for the old batch is left behind.
        return relax.analysis.remove_all_unused(self.bb.get()["main"])


def rebatch(mod: tvm.IRModule, batch: int) -> tvm.IRModule:
    """Return a quantized module for another batch.

    Parameters
    ----------
    mod
        In quantize/dequantize form: what ``tvm_vitq.quantize`` returned.
    batch
        Images per call.

    Raises
    ------
    VitqError
        If the batch cannot be told from other extents.
    """
    if batch == batch_of(mod):
        return mod
    main = _Rebatch(mod, batch).run()
    attrs: dict[str, Any] = {str(key): value for key, value in mod.attrs.items()}
    model = json.loads(str(attrs["vitq.model"]))
    model["batch"] = model["input"]["shape"][0] = batch
    attrs["vitq.model"] = json.dumps(model)
    out = tvm.IRModule({"main": main.with_attr("global_symbol", "main")})
    return out.with_attrs(attrs)
