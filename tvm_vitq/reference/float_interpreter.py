"""Executes a canonical float module or a quantize/dequantize module with torch on the CPU.

A module is built for one static batch B. Every activation is held here with one more leading axis
of n chunks, shape ``[n, *static shape]``, and every operator is lifted over that axis. So a module
of batch 1 runs any number of images at once, whatever its reshapes and transposes do with its own
batch axis: nothing is guessed about where the batch lies.

The rounding rule is that of the integer contract: ``q = clamp(floor(x / s + 0.5) + z)``; a code
with zero point 0 is clipped symmetrically (-127, -32767).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from relay_passes.errors import VitqError

__all__ = ["OPERATORS", "Program", "Step", "code_range", "fake_quantize", "run_float"]

Observer = Callable[[relax.Var, torch.Tensor], None]
Hook = Callable[["Step", torch.Tensor], torch.Tensor]


def code_range(dtype: str, zero_point: int) -> tuple[int, int]:
    """Return the smallest and largest code of an activation of ``dtype`` with this zero point."""
    info = np.iinfo(dtype)
    lo, hi = int(info.min), int(info.max)
    return (-hi, hi) if zero_point == 0 and lo < 0 else (lo, hi)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: str
) -> torch.Tensor:
    """Round half up to codes; the codes are returned as float32 (exact, they are below 2^24)."""
    lo, hi = code_range(dtype, int(zero_point.reshape(-1)[0]))
    return (x / scale).add_(0.5).floor_().add_(zero_point.to(x.dtype)).clamp_(lo, hi)


def fake_quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: str) -> torch.Tensor:
    """Return ``x`` after one trip through the codes of ``dtype``."""
    lo, hi = code_range(dtype, zero_point)
    codes = (x * (1.0 / scale)).add_(0.5).floor_()
    return codes.clamp_(lo - zero_point, hi - zero_point).mul_(scale)


@dataclass(frozen=True)
class Step:
    """One operator call: ``slots[out] = OPERATORS[op](arguments, call)``.

    Attributes
    ----------
    var : relax.Var or None
        The variable bound to the result (None for an argument that is a nested call).
    op : str
        Relax name without the ``relax.`` prefix, e.g. ``nn.softmax``.
    args : tuple of int
        Slots of the tensor arguments, the tensors of a tuple in line.
    out : int
        Slot of the result.
    lifted : tuple of bool
        For each argument, whether it carries the leading axis of chunks (constants do not).
    call : relax.Call
        The call itself, for attributes and shapes.
    """

    var: relax.Var | None
    op: str
    args: tuple[int, ...]
    out: int
    lifted: tuple[bool, ...]
    call: relax.Call


def _ints(values: object) -> list[int]:
    return [int(v) for v in values]  # type: ignore[attr-defined]


def _rank(expr: relax.Expr) -> int:
    return len(expr.ty.shape)


def _axis(axis: int, rank: int) -> int:
    """Position of a static axis in a lifted tensor."""
    return (axis + rank if axis < 0 else axis) + 1


def _align(tensors: Sequence[torch.Tensor], step: Step) -> list[torch.Tensor]:
    """Give lifted operands of different rank their broadcast axes behind the axis of chunks."""
    if not all(step.lifted):
        rank = max(t.dim() - int(up) for t, up in zip(tensors, step.lifted, strict=True))
    else:
        rank = max(t.dim() for t in tensors) - 1
    out = []
    for tensor, up in zip(tensors, step.lifted, strict=True):
        missing = rank + 1 - tensor.dim()
        if up and missing:
            tensor = tensor.reshape(tensor.shape[0], *[1] * missing, *tensor.shape[1:])
        out.append(tensor)
    return out


def _binary(fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable:
    def apply(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
        return fn(*_align(tensors, step))

    return apply


def _reshape(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    return tensors[0].reshape(tensors[0].shape[0], *_ints(step.call.ty.shape))


def _permute(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    rank = _rank(step.call.args[0])
    axes = step.call.attrs.axes
    order = list(reversed(range(rank))) if axes is None else _ints(axes)
    return tensors[0].permute(0, *[_axis(a, rank) for a in order])


def _strided_slice(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    rank, fields = _rank(step.call.args[0]), [list(a.fields) for a in step.call.args[1:]]
    axes, begins, ends = (_ints(f) for f in fields[:3])
    strides = _ints(fields[3]) if len(fields) > 3 else [1] * len(axes)
    index: list[slice] = [slice(None)] * (rank + 1)
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        size = int(step.call.args[0].ty.shape[axis])
        index[_axis(axis, rank)] = slice(begin, min(end, size), stride)
    return tensors[0][tuple(index)]


def _concat(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    chunks = next(t.shape[0] for t, up in zip(tensors, step.lifted, strict=True) if up)
    full = [
        t if up else t.expand(chunks, *t.shape) for t, up in zip(tensors, step.lifted, strict=True)
    ]
    return torch.cat(full, dim=_axis(int(step.call.attrs.axis), full[0].dim() - 1))


def _take(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    axis = _axis(int(step.call.attrs.axis), _rank(step.call.args[0]))
    x, index = tensors[0], tensors[1].long()
    out = x.index_select(axis, index.reshape(-1))
    return out.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _mean(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    rank = _rank(step.call.args[0])
    axes = [_axis(a, rank) for a in _ints(step.call.attrs.axis)]
    return tensors[0].mean(dim=axes, keepdim=bool(step.call.attrs.keepdims))


def _layer_norm(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    x, gamma, beta = tensors
    return F.layer_norm(x, gamma.shape, gamma, beta, float(step.call.attrs.epsilon))


def _softmax(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    return torch.softmax(tensors[0], dim=-1)


def _gelu(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    return F.gelu(tensors[0])


def _gelu_tanh(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    return F.gelu(tensors[0], approximate="tanh")


def _along(param: torch.Tensor, step: Step, axis: int) -> torch.Tensor:
    """Shape a scale or zero point of one axis so that it broadcasts against the tensor."""
    if param.numel() == 1:
        return param.reshape(())
    rank = _rank(step.call.args[0])
    shape = [1] * rank
    shape[axis] = -1
    return param.reshape(shape)


def _quantize(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    x, scale, zero_point = tensors
    axis = int(step.call.attrs.axis)
    dtype = str(step.call.attrs.out_dtype)
    return quantize(x, _along(scale, step, axis), _along(zero_point, step, axis), dtype)


def _dequantize(tensors: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    codes, scale, zero_point = tensors
    axis = int(step.call.attrs.axis)
    real = codes.float() - _along(zero_point, step, axis).float()
    return real * _along(scale, step, axis)


Operator = Callable[[Sequence[torch.Tensor], Step], torch.Tensor]
OPERATORS: dict[str, Operator] = {
    "reshape": _reshape,
    "permute_dims": _permute,
    "strided_slice": _strided_slice,
    "concat": _concat,
    "take": _take,
    "mean": _mean,
    "matmul": _binary(torch.matmul),
    "add": _binary(torch.add),
    "subtract": _binary(torch.sub),
    "multiply": _binary(torch.mul),
    "nn.layer_norm": _layer_norm,
    "nn.softmax": _softmax,
    "nn.gelu": _gelu,
    "nn.gelu_tanh": _gelu_tanh,
    "vitq.float_softmax": _softmax,
    "vitq.float_gelu": _gelu,
    "quantize": _quantize,
    "dequantize": _dequantize,
}


class Program:
    """The steps of ``main`` and its constants as torch tensors; constant subexpressions are folded.

    Parameters
    ----------
    mod : tvm.IRModule
        A module with one function ``main(x)`` of straight-line dataflow.

    Attributes
    ----------
    steps : list of Step
        In the order of execution.
    constants : dict of int to torch.Tensor
        Values of the slots that do not depend on ``x``.
    slot_of : dict of relax.Var to int
    input_slot, output_slot : int
    last_use : dict of int to int
        Index of the last step that reads a slot.

    Raises
    ------
    VitqError
        For an operator outside the canonical form.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        function = mod["main"]
        self.steps: list[Step] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.slot_of: dict[relax.Var, int] = {}
        self._slots = 0
        self.parameter = function.params[0]
        self.input_shape = tuple(_ints(self.parameter.ty.shape))
        self.input_slot = self.slot_of[self.parameter] = self._new_slot()
        self._shapes = {self.input_slot: self.input_shape}
        for block in function.body.blocks:
            for binding in block.bindings:
                self.slot_of[binding.var] = self._compile(binding.value, binding.var)
        self.output_slot = self._compile(function.body.body, None)
        self.last_use = {slot: i for i, step in enumerate(self.steps) for slot in step.args}
        self.last_use[self.output_slot] = len(self.steps)

    def shape(self, slot: int) -> tuple[int, ...]:
        """Return the static shape of a slot, without the axis of chunks."""
        return self._shapes[slot]

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _compile(self, expr: relax.Expr, var: relax.Var | None) -> int:
        if isinstance(expr, relax.Var):
            return self.slot_of[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            slot = self._new_slot()
            self.constants[slot] = torch.from_numpy(np.array(expr.value.numpy()))
            self._shapes[slot] = tuple(self.constants[slot].shape)
            return slot
        if not (isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op)):
            raise VitqError(f"main: cannot execute {type(expr).__name__} in the float interpreter")
        name = expr.op.name.removeprefix("relax.")
        if name not in OPERATORS:
            raise VitqError(f"operator {expr.op.name}: not part of the canonical float form")
        first = expr.args[0]
        tensors = list(first.fields) if isinstance(first, relax.Tuple) else []
        leaves = (relax.Var, relax.Call, tvm.ir.GenericConst)
        tensors += [a for a in expr.args if isinstance(a, leaves)]
        args = tuple(self._compile(a, None) for a in tensors)
        lifted = tuple(slot not in self.constants for slot in args)
        step = Step(var, name, args, self._new_slot(), lifted, expr)
        self._shapes[step.out] = tuple(_ints(expr.ty.shape))
        if any(lifted):
            self.steps.append(step)
        else:
            self.constants[step.out] = self._fold(step)
        return step.out

    def _fold(self, step: Step) -> torch.Tensor:
        """Evaluate a constant call: lift by one chunk, run, drop the chunk."""
        bare = step.op in ("quantize", "dequantize", "nn.layer_norm")
        tensors = [self.constants[slot] for slot in step.args]
        if bare:
            tensors[0] = tensors[0].unsqueeze(0)
        else:
            tensors = [t.unsqueeze(0) for t in tensors]
        lifted = Step(step.var, step.op, step.args, step.out, (True,) * len(step.args), step.call)
        return OPERATORS[step.op](tensors, lifted)[0].contiguous()

    def execute(
        self,
        env: dict[int, torch.Tensor],
        *,
        start: int = 0,
        stop: int | None = None,
        keep: frozenset[int] = frozenset(),
        hook: Hook | None = None,
        constants: Mapping[int, torch.Tensor] | None = None,
        operators: Mapping[str, Operator] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Run steps ``start`` to ``stop`` on lifted tensors; the environment is changed in place.

        Parameters
        ----------
        env : dict of int to torch.Tensor
            Slot values, each ``[n, *static shape]``.
        keep : frozenset of int
            Slots that stay in ``env`` past their last use.
        hook : callable(step, result) -> tensor, optional
            Sees every result and may replace it.
        constants : mapping, optional
            Constants that replace the program's own.
        operators : mapping, optional
            Functions that replace operators, by name.
        """
        table = {**OPERATORS, **operators} if operators else OPERATORS
        values: Mapping[int, torch.Tensor] = self.constants
        if constants is not None:
            values = {**self.constants, **constants}
        for index in range(start, len(self.steps) if stop is None else stop):
            step = self.steps[index]
            tensors = [values[s] if s in values else env[s] for s in step.args]
            result = table[step.op](tensors, step)
            env[step.out] = result if hook is None else hook(step, result)
            for slot in step.args:
                if self.last_use[slot] == index and slot not in keep:
                    env.pop(slot, None)
        return env

    def lift(self, x: torch.Tensor) -> torch.Tensor:
        """Split images ``[N, ...]`` into ``[n, B, ...]``; the last chunk may repeat an image."""
        if tuple(x.shape[1:]) != self.input_shape[1:]:
            found, wanted = list(x.shape[1:]), list(self.input_shape[1:])
            raise VitqError(f"input has shape {found}, the model expects {wanted}")
        batch = self.input_shape[0]
        missing = -x.shape[0] % batch
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
        return x.reshape(-1, *self.input_shape)

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, observe: Observer | None = None, hook: Hook | None = None
    ) -> torch.Tensor:
        """Return the output for images ``[N, ...]`` of any number N, shape ``[N, classes]``."""

        def watch(step: Step, result: torch.Tensor) -> torch.Tensor:
            if hook is not None:
                result = hook(step, result)
            if observe is not None and step.var is not None:
                observe(step.var, result)
            return result

        lifted = self.lift(x)
        if observe is not None:
            observe(self.parameter, lifted)
        env = self.execute(
            {self.input_slot: lifted}, keep=frozenset({self.output_slot}), hook=watch
        )
        out = env[self.output_slot]
        return out.reshape(-1, *out.shape[2:])[: x.shape[0]]


def run_float(mod: tvm.IRModule, x: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """Execute a stage 1 or stage 2 module by torch.

    Parameters
    ----------
    mod : tvm.IRModule
        Module with ``main(x)`` built for a static batch B.
    x : torch.Tensor
        ``[N, ...]`` images of the module's input dtype; N need not equal B.
    observe : callable(relax.Var, torch.Tensor), optional
        Called with every bound variable (and the parameter) and its value ``[n, *static shape]``,
        n = ceil(N / B). It must not change the tensor.

    Returns
    -------
    torch.Tensor
        float32 ``[N, classes]``.

    Raises
    ------
    VitqError
        For an operator outside the canonical form or an input of another shape.
    """
    return Program(mod)(x, observe)
