"""Lower the quantize/dequantize form to the integer dialect.

One walk over the module. Every float variable gets a value (see :mod:`relay_passes.values`);
operators combine values, and a ``quantize`` node turns the pending value into codes with exactly
one rounding, by the dyadic rule of :mod:`relay_passes.dialect.dyadic`. There is no fallback: what
has no integer meaning is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from .dialect.registry import constant, constant_of
from .errors import VitqError
from .lower_rounding import Rounder
from .values import (
    Activation,
    Codes,
    Constant,
    Mean,
    Norm,
    Product,
    Real,
    Score,
    Sum,
    Value,
    Weight,
    shape_of,
)

__all__ = ["LowerToInteger"]

LAYOUT = ("relax.reshape", "relax.permute_dims", "relax.strided_slice", "relax.take")
SUPPORTED = (
    "linear, conv2d patch embedding, attention matmul, softmax, gelu, layer_norm, residual add, "
    "mean pooling and layout operators"
)


class _Lowering:
    """State of one walk over ``main``."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bb = relax.BlockBuilder()
        self.values: dict[relax.Var, Value | tuple[Value, ...]] = {}
        self.layers: list[dict[str, object]] = []
        self.where = "main"
        self.round = Rounder(self._emit, self.bb.lookup_binding, self._fail)
        self.rules: dict[str, Callable[[relax.Call], Value | tuple[Value, ...]]] = {
            "relax.quantize": self._quantize,
            "relax.dequantize": self._dequantize,
            "relax.matmul": self._matmul,
            "relax.add": self._add,
            "relax.multiply": self._multiply,
            "relax.nn.layer_norm": self._layer_norm,
            "relax.mean": self._mean,
            "relax.concat": self._concat,
            "vitq.float_softmax": lambda c: self._activation(c, "softmax"),
            "vitq.float_gelu": lambda c: self._activation(c, "gelu"),
            **dict.fromkeys(LAYOUT, self._layout),
        }

    # -- helpers -------------------------------------------------------------------------------
    def _fail(self, why: str) -> VitqError:
        return VitqError(f"{self.where}: {why}")

    def _emit(self, expr: relax.Expr) -> relax.Var:
        return self.bb.emit(expr, self.where)

    def _value(self, expr: relax.Expr) -> Value:
        if isinstance(expr, relax.Var):
            value = self.values[expr]
            if isinstance(value, tuple):
                raise self._fail("a tuple is supported as the input of concat only")
            return value
        data = constant_of(expr)
        if data is None:
            raise self._fail(f"expected a variable or a constant, found {type(expr).__name__}")
        return Constant(data)

    def _codes(self, expr: relax.Expr, role: str) -> Codes:
        value = self._value(expr)
        if not isinstance(value, Codes):
            raise self._fail(
                f"the {role} is not quantized; calibrate the module first (tvm_vitq.quantize)"
            )
        return value

    # -- the walk ------------------------------------------------------------------------------
    def run(self) -> tuple[relax.Function, list[dict[str, object]]]:
        """Lower the function; returns the integer function and the table of layers."""
        if len(self.func.params) != 1:
            raise self._fail(
                f"the function takes {len(self.func.params)} inputs; one image tensor is supported"
            )
        (param,) = self.func.params
        x = relax.Var(param.name, param.ty)
        dtype = str(param.ty.dtype)
        if dtype == "uint8":
            self.values[param] = Codes(x, 1.0, 0, 0, 255)
        else:
            self.values[param] = Real(x)
        body = self.func.body
        with self.bb.function("main", [x]):
            with self.bb.dataflow():
                for block in body.blocks:
                    for binding in block.bindings:
                        self._visit(binding)
                self.where = "logits"
                logits = self._codes(body.body, "network's output")
                self.where = "vitq_logits"
                out = self.bb.emit_output(self._emit(self.round.dequantize(logits)))
            self.bb.emit_func_output(out)
        return self.bb.get()["main"], self.layers

    def _visit(self, binding: relax.Binding) -> None:
        var, value = binding.var, binding.value
        self.where = var.name
        if isinstance(value, relax.Var):
            self.values[var] = self.values[value]
        elif isinstance(value, relax.Tuple):
            self.values[var] = tuple(self._value(field) for field in value.fields)
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            rule = self.rules.get(value.op.name)
            if rule is None:
                raise self._fail(
                    f"operator {value.op.name} has no integer lowering; supported: {SUPPORTED}"
                )
            self.values[var] = rule(value)
        elif constant_of(value) is not None:
            self.values[var] = Constant(constant(value))
        else:
            raise self._fail(f"{type(value).__name__} has no integer lowering")

    # -- quantize and dequantize ---------------------------------------------------------------
    def _scale_zero(self, call: relax.Call) -> tuple[np.ndarray, np.ndarray]:
        scale, zero = constant_of(call.args[1]), constant_of(call.args[2])
        if scale is None or zero is None:
            raise self._fail("scales and zero points must be constants")
        return scale.astype("float64"), zero.astype("int64")

    def _quantize(self, call: relax.Call) -> Codes:
        scale, zero = self._scale_zero(call)
        if scale.size != 1 or zero.size != 1:
            raise self._fail("activations are quantized per tensor; fold channel scales first")
        dtype = str(call.attrs["out_dtype"])
        info = np.iinfo(dtype)
        zero_point = int(zero.reshape(-1)[0])
        # Symmetric codes leave out the most negative value, as our quantizer does; an imported
        # quantizer that uses it is one code short there.
        qmin = info.min + 1 if zero_point == 0 and info.min < 0 else info.min
        target = (float(scale.reshape(-1)[0]), zero_point, int(qmin), int(info.max), dtype)
        value = self._value(call.args[0])
        codes = self.round(value, target)
        self.layers.append(
            {
                "name": self.where,
                "from": type(value).__name__.lower(),
                "dtype": dtype,
                "scale": target[0],
                "zero_point": zero_point,
                "shape": list(shape_of(codes.expr)),
            }
        )
        return codes

    def _dequantize(self, call: relax.Call) -> Value:
        source = self._value(call.args[0])
        scale, zero = self._scale_zero(call)
        if isinstance(source, Constant):
            if source.data.ndim == 2 and source.data.dtype == np.int8 and scale.size > 1:
                if np.any(zero):
                    raise self._fail("weights must have zero point 0")
                if int(call.attrs["axis"]) not in (1, -1):
                    raise self._fail("weights are scaled per output channel (axis 1)")
                return Weight(source.data, scale.reshape(-1))
            if zero.size != 1 or scale.size != 1:
                raise self._fail("constants are quantized per tensor")
            info = np.iinfo(source.data.dtype)
            expr = relax.const(source.data)
            return Codes(expr, float(scale.item()), int(zero.item()), int(info.min), int(info.max))
        if not isinstance(source, Codes):
            raise self._fail("dequantize of something that was not quantized")
        if dtype_scale(source) != (float(np.float32(scale.item())), int(zero.item())):
            return Codes(
                source.expr, float(scale.item()), int(zero.item()), source.qmin, source.qmax
            )
        return source

    # -- operators -----------------------------------------------------------------------------
    def _matmul(self, call: relax.Call) -> Value:
        a, b = self._codes(call.args[0], "left operand"), self._value(call.args[1])
        if isinstance(b, Weight):
            return Product(a, b, np.zeros(b.codes.shape[1]))
        if isinstance(b, Codes):
            return Score(a, b)
        raise self._fail("the weight is not quantized; calibrate the module first")

    def _add(self, call: relax.Call) -> Value:
        a, b = (self._value(arg) for arg in call.args)
        if isinstance(a, Constant) and isinstance(b, Constant):
            return Constant(a.data + b.data)
        if isinstance(a, Constant):
            a, b = b, a
        if isinstance(a, Product) and isinstance(b, Constant) and _is_row(b.data, a.bias.size):
            return Product(a.x, a.weight, a.bias + b.data.reshape(-1).astype("float64"))
        terms: list[Codes | Constant | Product | Score] = []
        for term in (a, b):
            if isinstance(term, Sum):
                terms.extend(term.terms)
            elif isinstance(term, (Codes, Constant, Product, Score)):
                terms.append(term)
            else:
                raise self._fail(f"cannot add an unquantized {type(term).__name__.lower()}")
        return Sum(tuple(terms))

    def _multiply(self, call: relax.Call) -> Value:
        a, b = (self._value(arg) for arg in call.args)
        if isinstance(a, Constant):
            a, b = b, a
        if not isinstance(b, Constant):
            raise self._fail("product of two activations is not supported outside attention")
        if isinstance(a, Score) and b.data.size == 1:
            return Score(a.a, a.b, a.factor * float(b.data.item()))
        if isinstance(a, Codes) and b.data.size == 1 and b.data.item() > 0:
            scale = a.scale * float(b.data.item())
            return Codes(a.expr, scale, a.zero_point, a.qmin, a.qmax)
        if isinstance(a, Activation) and a.kind == "gelu":
            factor = np.ones(shape_of(a.x.expr)[-1]) if a.channel_scale is None else a.channel_scale
            return Activation(a.kind, a.x, a.method, factor * b.data.reshape(-1).astype("float64"))
        raise self._fail("this constant factor should have been folded by canonicalisation")

    def _layer_norm(self, call: relax.Call) -> Norm:
        gamma, beta = constant_of(call.args[1]), constant_of(call.args[2])
        if gamma is None or beta is None:
            raise self._fail("gamma and beta must be constants")
        x = self._codes(call.args[0], "input of layer_norm")
        last = len(shape_of(x.expr)) - 1
        if [int(axis) % (last + 1) for axis in call.attrs["axes"]] != [last]:
            raise self._fail("layer_norm over the last axis is supported")
        return Norm(
            x, gamma.astype("float64"), beta.astype("float64"), float(call.attrs["epsilon"])
        )

    def _mean(self, call: relax.Call) -> Mean:
        x = self._codes(call.args[0], "input of mean")
        axes = [int(axis) for axis in call.attrs["axis"]]
        if len(axes) != 1:
            raise self._fail("mean over one axis is supported")
        shape = shape_of(x.expr)
        axis = axes[0] % len(shape)
        return Mean(x, axis, bool(call.attrs["keepdims"]), shape[axis])

    def _activation(self, call: relax.Call, kind: str) -> Activation:
        return Activation(
            kind, self._codes(call.args[0], f"input of {kind}"), str(call.attrs["method"])
        )

    # -- layout --------------------------------------------------------------------------------
    def _layout(self, call: relax.Call) -> Value:
        value = self._value(call.args[0])
        if isinstance(value, Real):
            return Real(self._emit(relax.Call(call.op, [value.expr, *call.args[1:]], call.attrs)))
        if isinstance(value, Constant):
            raise self._fail("a layout operator on a constant should have been folded")
        codes = self._codes(call.args[0], "input of a layout operator")
        moved = relax.Call(call.op, [codes.expr, *call.args[1:]], call.attrs)
        return codes.moved(self._emit(moved))

    def _concat(self, call: relax.Call) -> Codes:
        fields = call.args[0]
        if isinstance(fields, relax.Var):
            values = self.values[fields]
            if not isinstance(values, tuple):
                raise self._fail("concat needs a tuple of tensors")
        else:
            values = tuple(self._value(field) for field in fields.fields)
        codes = [value for value in values if isinstance(value, Codes)]
        if len(codes) != len(values):
            raise self._fail("every operand of concat must be quantized")
        if len({(c.scale, c.zero_point, c.dtype) for c in codes}) != 1:
            raise self._fail("operands of concat must share scale, zero point and dtype")
        joined = self._emit(relax.op.concat([c.expr for c in codes], int(call.attrs["axis"])))
        qmin, qmax = min(c.qmin for c in codes), max(c.qmax for c in codes)
        return Codes(joined, codes[0].scale, codes[0].zero_point, qmin, qmax)


def dtype_scale(codes: Codes) -> tuple[float, int]:
    """Scale (rounded to float32) and zero point of codes, for comparison with IR constants."""
    return float(np.float32(codes.scale)), codes.zero_point


def _is_row(data: np.ndarray, size: int) -> bool:
    return data.size == size and (data.ndim == 0 or data.shape[-1] == size)


@tvm.transform.module_pass(opt_level=0, name="vitq.LowerToInteger")
class LowerToInteger:
    """Quantize/dequantize form (stage 2) to the integer dialect (stage 3)."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Lower ``main``; the table of layers goes into the attribute ``vitq.layers``."""
        func, layers = _Lowering(mod["main"]).run()
        out = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        if mod.attrs is not None:
            out = out.with_attrs({str(key): value for key, value in mod.attrs.items()})
        out = out.with_attr("vitq.layers", json.dumps(layers))
        return relax.transform.DeadCodeElimination()(out)
