"""Two ways to extend tvm-vitq: a new integer operator, and a new quantizer.

Run it with ``python tutorials/03_new_operator_or_quantizer.py``.

Part 1 adds hard-swish, ``y = x * min(max(x + 3, 0), 6) / 6``, to the integer dialect. An operator
is written twice, independently: as a TE computation, which is compiled, and in int64 NumPy, which
is the reference. A third part says how large its intermediates can grow, so that the range proof
covers it. Inside the project that is one new file in ``relay_passes/dialect`` and one function in
``tvm_vitq/reference``.

Part 2 is a quantizer of our own, and compiles what it makes. (A new rule for ranges alone is one
entry of ``tvm_vitq.calibration.observers.OBSERVERS``.)
"""

# %% Part 1. The integer arithmetic first. With codes q = x / S, three = round(3 / S) and
# g = clamp(q + three, 0, 2 * three), the product q * g is an integer of scale S / (2 * three), and
# one dyadic requantisation takes it to the output's scale.
import tempfile
from pathlib import Path

import numpy as np
import tvm
from tvm import relax, te

from relay_passes.check_integer_only import check_integer_only
from relay_passes.check_ranges import check_ranges
from relay_passes.dialect import boundary, registry
from relay_passes.dialect.checking import (
    clamp_interval,
    output_interval,
    te_clamp,
    tensor_of,
    within_int32,
)
from relay_passes.dialect.dyadic import dyadic, requantize_bounds
from relay_passes.dialect.registry import Claim
from relay_passes.pipeline import build_passes
from schedules.isa import isa_for, resolve_target
from schedules.matmul import requantize_te
from tvm_vitq.reference.interpreter import Interpreter
from tvm_vitq.reference.registry import expect, reference


def infer(node):
    """Result type: the shape of the input, the dtype of the output codes."""
    shape, _ = tensor_of(node, 0, ["int8", "int16"], "x")
    return relax.TensorType(shape, node.attrs["out_dtype"])


def compute(tensors, attrs):
    """What is compiled. Every schedule of it gives the same bits, because nothing here is float."""
    (x,) = tensors
    three = attrs["three"]

    def element(*index):
        q = x(*index).astype("int32")
        gate = te.max(te.min(q + three, 2 * three), 0)
        scaled = requantize_te(q * gate, attrs["mult"], attrs["shift"])
        return te_clamp(scaled, attrs["qmin"], attrs["qmax"], attrs["out_dtype"])

    return te.compute(x.shape, element, name="out")


def bounds(node, args):
    """Claim a range for each intermediate; the compile fails if one does not fit its type."""
    (x,), attrs = args, node.attrs
    gate = 2 * attrs["three"]
    lo, hi = min(x.lo * gate, 0), max(x.hi * gate, 0)
    claims = [
        Claim("gate before its clamp", x.lo + attrs["three"], x.hi + attrs["three"], "int32"),
        Claim("product with the gate", lo, hi, "int32"),
    ]
    wide, (least, most) = requantize_bounds(*within_int32(lo, hi), attrs["mult"], attrs["shift"])
    claims.append(Claim("product with the multiplier", *wide, "int64"))
    return clamp_interval(int(least), int(most), output_interval(node)), claims


registry.register(
    "hard_swish",
    ["x"],
    "x * relu6(x + 3) / 6 on codes.",
    infer=infer,
    compute=compute,
    bounds=bounds,
)


@reference("vitq.hard_swish")
def hard_swish_reference(args, attrs):
    """Compute the same a second time, in int64 and with other operations."""
    q, three = args[0].astype(np.int64), attrs["three"]
    gate = np.clip(q, -three, three) + three
    product = expect(q * gate, "int32", "product with the gate")
    power = 2 ** attrs["shift"]
    scaled = np.floor_divide(product * attrs["mult"] + power // 2, power)
    return np.clip(scaled, attrs["qmin"], attrs["qmax"])


def hard_swish(x, in_scale, out_scale):
    """Turn real scales into integer parameters: the builder that lowering would call."""
    three = round(3 / in_scale)
    mult, shift = dyadic(in_scale / (2 * three) / out_scale)
    return registry.call(
        "hard_swish", x, three=three, mult=int(mult), shift=int(shift),
        zero_point=0, qmin=-127, qmax=127, out_dtype="int8",
    )  # fmt: skip


# %% A network that consists of it: float in, codes, hard-swish, codes, float out.
IN_SCALE, OUT_SCALE = 6 / 127, 6 / 127
builder = relax.BlockBuilder()
x = relax.Var("x", relax.TensorType((1, 256), "float32"))
with builder.function("main", [x]):
    with builder.dataflow():
        codes = builder.emit(boundary.quantize(x, IN_SCALE, 0, -127, 127, "int8"))
        codes = builder.emit(hard_swish(codes, IN_SCALE, OUT_SCALE))
        out = builder.emit_output(builder.emit(boundary.dequantize(codes, OUT_SCALE)))
    builder.emit_func_output(out)
module = builder.get()
print(module.script())

# %% Both proofs know the operator now.
check_integer_only(module)
for claim in check_ranges(module):
    print("{op:18} {quantity:28} {lo:>16} .. {hi:<16} {dtype}".format(**claim))

# %% Compile it for this machine and compare with the reference on every code there is.
target = resolve_target("native")
with target:
    kernels = tvm.transform.Sequential(build_passes(isa_for(target)))(module)
    vm = relax.VirtualMachine(relax.build(kernels, target, relax_pipeline=None), tvm.cpu())
values = (np.arange(-128, 128) * IN_SCALE).astype("float32")[None]
compiled = vm["main"](tvm.runtime.tensor(values)).numpy()
assert np.array_equal(compiled, Interpreter(module)(values))
truth = values * np.clip(values + 3, 0, 6) / 6
print(f"hard-swish: compiled equals reference; largest error {np.abs(compiled - truth).max():.4f},")
print(f"            half an output step is {OUT_SCALE / 2:.4f}")
assert np.abs(compiled - truth)[:, 1:].max() <= OUT_SCALE

# %% Part 2. A quantizer is any function from a float module to a module in quantize/dequantize
# form; nothing else passes to the compiler. So one can be written from scratch, or, as here, by
# rewriting what another has chosen: we round every activation's scale up to a power of two.
import tvm_vitq
from tvm_vitq import demo


@relax.expr_functor.mutator
class PowerOfTwoScales(relax.PyExprMutator):
    """Replace the scalar scale of every quantize/dequantize by the next power of two."""

    def visit_call_(self, call):
        """Rewrite one call; per-channel scales of weights stay as they are."""
        call = self.visit_expr_post_order(call)
        if call.op.name not in ("relax.quantize", "relax.dequantize"):
            return call
        scale = registry.constant_of(call.args[1])
        if scale is None or scale.ndim:
            return call
        rounded = np.float32(2.0 ** np.ceil(np.log2(scale)))
        args = [call.args[0], relax.const(rounded), call.args[2]]
        return relax.Call(call.op, args, call.attrs)


def power_of_two(module):
    """Round the scales of a quantized module."""
    return tvm.IRModule(
        {
            name: PowerOfTwoScales(module).visit_expr(func)
            for name, func in module.functions.items()
        },
        attrs=module.attrs,
    )


folder = Path(tempfile.mkdtemp(prefix="vitq_"))
images, labels = demo.digits("test")
x = demo.normalise(demo.pixels(images))
calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))
searched = tvm_vitq.quantize(tvm_vitq.load_model("tvm_vitq.demo:digits_vit"), calibration)
logits = {}
for name, quantized in {"searched": searched, "2^n": power_of_two(searched)}.items():
    artifact = tvm_vitq.compile(quantized, output=folder / f"{name}.so")
    logits[name] = artifact.run(x)
    print(f"scales {name:9} top-1 {(logits[name].argmax(-1) == labels).mean():.2%}")
assert not np.array_equal(logits["searched"], logits["2^n"])
