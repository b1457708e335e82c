"""Writes a finished draft as a Relax module in quantize/dequantize form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.relax import op as R

from relay_passes.dialect.float_ops import float_gelu, float_softmax
from tvm_vitq.quantizers.draft import Draft, Quantizer
from tvm_vitq.quantizers.structure import GELU, SOFTMAX
from tvm_vitq.reference.float_interpreter import Step

__all__ = ["emit"]


class _Emitter:
    """State of one walk over the float module."""

    def __init__(self, mod: tvm.IRModule, draft: Draft, methods: Mapping[int, str]) -> None:
        self.function = mod["main"]
        self.draft, self.program = draft, draft.program
        self.methods = methods
        self.bb = relax.BlockBuilder()
        self.step_of = {step.var: step for step in self.program.steps if step.var is not None}
        self.values: dict[relax.Var, relax.Expr] = {}

    def run(self) -> relax.Function:
        (parameter,) = self.function.params
        x = relax.Var(parameter.name, parameter.ty)
        with self.bb.function("main", [x]):
            with self.bb.dataflow():
                self.values[parameter] = self._quantized(x, self.program.input_slot, "x")
                for block in self.function.body.blocks:
                    for binding in block.bindings:
                        self.values[binding.var] = self._binding(binding.var, binding.value)
                out = self.bb.emit_output(self._moved(self.function.body.body))
            self.bb.emit_func_output(out)
        return self.bb.get()["main"]

    # -- expressions ---------------------------------------------------------------------------
    def _moved(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._moved(field) for field in expr.fields])
        return expr

    def _binding(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        step = self.step_of.get(var)
        if step is None:  # an alias, or a weight that came quantized
            if isinstance(value, relax.Call):
                args = [self._moved(arg) for arg in value.args]
                return self.bb.emit(relax.Call(value.op, args, value.attrs), var.name)
            return self._moved(value)
        return self._quantized(self._call(step, var.name), step.out, var.name)

    def _call(self, step: Step, name: str) -> relax.Expr:
        slots = list(step.args)

        def argument(expr: relax.Expr) -> relax.Expr:
            if isinstance(expr, relax.Tuple) and step.op == "concat":
                return relax.Tuple([argument(field) for field in expr.fields])
            if isinstance(expr, relax.Var | relax.Call):
                slots.pop(0)
                return self._moved(expr)
            if isinstance(expr, tvm.ir.GenericConst):
                return self._constant(slots.pop(0), expr)
            return expr

        args = [argument(arg) for arg in step.call.args]
        if step.op in SOFTMAX:
            return self.bb.emit(float_softmax(args[0], self.methods[step.out]), name)
        if step.op in GELU and step.op != "nn.gelu_tanh":
            return self.bb.emit(float_gelu(args[0], self.methods[step.out]), name)
        result = self.bb.emit(relax.Call(step.call.op, args, step.call.attrs), name)
        extra = self.draft.extra.get(step.out)
        return (
            result if extra is None else self.bb.emit(R.add(result, relax.const(_float32(extra))))
        )

    def _constant(self, slot: int, original: relax.Expr) -> relax.Expr:
        draft = self.draft
        if slot in draft.weights:
            weight = draft.weights[slot]
            codes = relax.const(weight.codes.to(torch.int8).numpy())
            scale = relax.const(weight.scale.numpy().astype("float32"))
            return self.bb.emit(R.dequantize(codes, scale, relax.const(np.int8(0)), axis=1))
        changed = draft.constants.get(slot)
        expr = original if changed is None else relax.const(_float32(changed))
        group = draft.structure.concat_constants.get(slot)
        quantizer = None if group is None else draft.quantizers.get(group)
        return expr if quantizer is None else self._pair(expr, quantizer, "const")

    # -- sites ---------------------------------------------------------------------------------
    def _quantized(self, expr: relax.Expr, slot: int, name: str) -> relax.Expr:
        if slot not in self.draft.structure.sites:
            return expr
        factor = self.draft.factors.get(slot)
        if factor is not None:
            expr = self.bb.emit(R.multiply(expr, relax.const(_float32(factor))), f"{name}_scaled")
        quantizer = self.draft.quantizer(slot)
        if quantizer is None or self.draft.structure.sites[slot].given:
            return expr
        return self._pair(expr, quantizer, name)

    def _pair(self, expr: relax.Expr, quantizer: Quantizer, name: str) -> relax.Expr:
        scale = relax.const(np.float32(quantizer.scale))
        zero = relax.const(np.array(quantizer.zero_point, dtype=quantizer.dtype))
        codes = R.quantize(expr, scale, zero, axis=-1, out_dtype=quantizer.dtype)
        codes = self.bb.emit(codes, f"{name}_q")
        return self.bb.emit(R.dequantize(codes, scale, zero, axis=-1), f"{name}_dq")


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype("float32")


def emit(mod: tvm.IRModule, draft: Draft, methods: Mapping[int, str]) -> tvm.IRModule:
    """Return ``mod`` with the draft's constants, quantizers and nonlinearity choices.

    Parameters
    ----------
    mod : tvm.IRModule
        The canonical float module that the draft's program was made from.
    draft : Draft
    methods : mapping of int to str
        Site of a softmax or GELU -> table, poly or shift.
    """
    out = tvm.IRModule({"main": _Emitter(mod, draft, methods).run()})
    if mod.attrs is not None:
        out = out.with_attrs({str(key): value for key, value in mod.attrs.items()})
    return out
