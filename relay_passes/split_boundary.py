"""Split the network at its float boundary: ``main`` keeps the boundary, ``main_codes`` the rest.

``main_codes`` takes input codes and returns logit codes and holds no float at all; ``main`` is
``dequantize(main_codes(quantize(x)))``. A caller that has codes (or uint8 pixels) and wants integer
logits uses ``main_codes`` directly.
"""

from __future__ import annotations

import tvm
from tvm import relax

from .dialect.registry import is_vitq_call
from .errors import VitqError

__all__ = ["SplitBoundary"]


@tvm.transform.module_pass(opt_level=0, name="vitq.SplitBoundary")
class SplitBoundary:
    """Move everything between ``vitq.quantize`` and ``vitq.dequantize`` to ``main_codes``."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite ``main`` into two functions."""
        main = mod["main"]
        bindings = [binding for block in main.body.blocks for binding in block.bindings]
        values = {binding.var: binding.value for binding in bindings}
        last = main.body.body
        while isinstance(values.get(last), relax.Var):
            last = values[last]
        final = values[last]
        if not is_vitq_call(final, "dequantize"):
            raise VitqError("the network's output must be dequantized logits")
        first = [b for b in bindings if is_vitq_call(b.value, "quantize")]
        # Layout operators may stand before the quantize of a float input.
        before = bindings[: bindings.index(first[0]) + 1] if first else []
        entry = first[0].var if first else main.params[0]

        bb = relax.BlockBuilder()
        q = relax.Var("q", entry.ty)
        table: dict[relax.Var, relax.Expr] = {entry: q}
        with bb.function("main_codes", [q], attrs={"global_symbol": "main_codes"}):
            with bb.dataflow():
                for binding in bindings[len(before) :]:
                    if binding.var.same_as(last):
                        break
                    value = _substitute(binding.value, table)
                    table[binding.var] = bb.emit(value, binding.var.name)
                out = bb.emit_output(_substitute(final.args[0], table))
            codes = bb.emit_func_output(out)
        x = relax.Var(main.params[0].name, main.params[0].ty)
        table = {main.params[0]: x}
        with bb.function("main", [x], attrs={"global_symbol": "main"}):
            with bb.dataflow():
                for binding in before:
                    value = _substitute(binding.value, table)
                    table[binding.var] = bb.emit(value, binding.var.name)
                inner = bb.emit(relax.Call(codes, [table[entry]]), "codes")
                logits = relax.Call(final.op, [inner], final.attrs)
                out = bb.emit_output(bb.emit(logits, "logits"))
            bb.emit_func_output(out)
        result = bb.get()
        if mod.attrs is not None:
            result = result.with_attrs({str(k): v for k, v in mod.attrs.items()})
        return result


def _substitute(expr: relax.Expr, table: dict[relax.Var, relax.Expr]) -> relax.Expr:
    if isinstance(expr, relax.Var):
        return table.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_substitute(field, table) for field in expr.fields])
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [_substitute(arg, table) for arg in expr.args], expr.attrs)
    return expr
