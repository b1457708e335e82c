"""Where a canonical float module is to be quantized: its sites and its linears.

A *site* is the result of a compute operator together with what its integer kernel does in the same
rounding: a linear with its bias and position add, or with the residual add that it feeds; attention
scores with their scale and bias; GELU with a factor per channel. Layout operators never end a chain
and never start one: codes pass through them unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import tvm

from tvm_vitq.reference.float_interpreter import Program, Step

__all__ = ["PASSING", "Linear", "Site", "Structure"]

LAYOUT = frozenset({"reshape", "permute_dims", "strided_slice", "concat", "take"})
PASSING = LAYOUT | {"quantize", "dequantize"}
SOFTMAX = frozenset({"nn.softmax", "vitq.float_softmax"})
GELU = frozenset({"nn.gelu", "nn.gelu_tanh", "vitq.float_gelu"})


@dataclass(frozen=True)
class Site:
    """One activation quantizer.

    Attributes
    ----------
    slot : int
        Slot of the float value that is quantized.
    kind : str
        input, linear, embed, residual, norm, scores, softmax, gelu, context, mean or output.
    step : int
        Index of the step that makes the value, -1 for the input.
    given : bool
        The module quantizes this value already; its scale is kept.
    group : int
        Sites with the same group share scale, zero point and dtype (they meet in a concat).
    name : str
        Name of the variable in the module.
    """

    slot: int
    kind: str
    step: int
    given: bool
    group: int
    name: str


@dataclass(frozen=True)
class Linear:
    """``x @ W + b`` with a constant ``W [K, N]``.

    Attributes
    ----------
    step : int
        Index of the matmul.
    x : int
        Slot of the left operand; ``source`` is the site that it comes from.
    weight, bias : int
        Constant slots; bias is -1 if there is none.
    site : int
        Slot of the site that its result is rounded at.
    given : bool
        The weight came quantized and is kept.
    """

    step: int
    x: int
    source: int
    weight: int
    bias: int
    site: int
    given: bool


class Structure:
    """Sites and linears of a program.

    Attributes
    ----------
    program : Program
    sites : dict of int to Site
        By slot, in the order of execution.
    linears : list of Linear
    consumers : dict of int to list of int
        Steps that read a slot.
    concat_constants : dict of int to int
        Constant slot that is concatenated with activations -> group of those activations.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.producer = {step.out: index for index, step in enumerate(program.steps)}
        self.consumers: dict[int, list[int]] = defaultdict(list)
        for index, step in enumerate(program.steps):
            for slot in dict.fromkeys(step.args):
                self.consumers[slot].append(index)
        self._kinds = self._find_sites()
        self._groups, self.concat_constants = self._join_groups()
        self.sites = {slot: self._site(slot, kind) for slot, kind in self._kinds.items()}
        self.linears = [
            self._linear(index, step)
            for index, step in enumerate(program.steps)
            if step.op == "matmul" and step.lifted == (True, False)
        ]

    # -- sites ---------------------------------------------------------------------------------
    def _follow(self, index: int, kind: str) -> tuple[int, str]:
        """Last step and kind of the chain that starts with step ``index``."""
        steps = self.program.steps
        while True:
            readers = self.consumers[steps[index].out]
            if len(readers) != 1:
                return index, kind
            following = steps[readers[0]]
            constant = not all(following.lifted)
            if kind in ("linear", "embed") and following.op == "add":
                if not constant:
                    return readers[0], "residual"
                index = readers[0]
                row = self.program.constants[self.constant_of(following)].squeeze()
                kind = kind if row.dim() <= 1 else "embed"
            elif kind == "product" and following.op in ("add", "multiply") and constant:
                index = readers[0]
            elif kind == "gelu" and following.op == "multiply" and constant:
                return readers[0], kind
            else:
                return index, kind

    def _find_sites(self) -> dict[int, str]:
        program, kinds, absorbed = self.program, {self.program.input_slot: "input"}, set()
        for index, step in enumerate(program.steps):
            if index in absorbed or step.op in PASSING:
                continue
            start = self._start(step)
            if start is None:
                continue
            last, kind = self._follow(index, start)
            absorbed.update(self._chain(index, last))
            slot = program.steps[last].out
            kinds[slot] = kind
        for slot, kind in list(kinds.items()):
            if kind == "product":
                kinds[slot] = "scores" if self._reaches_softmax(slot) else "context"
        for slot in self._origins_in(program.output_slot, kinds):
            kinds[slot] = "output"
        order = sorted(kinds, key=lambda slot: self.producer.get(slot, -1))
        return {slot: kinds[slot] for slot in order}

    @staticmethod
    def _start(step: Step) -> str | None:
        if step.op == "matmul":
            return "product" if all(step.lifted) else "linear"
        if step.op == "add":
            return "residual" if all(step.lifted) else "product"
        if step.op in SOFTMAX:
            return "softmax"
        if step.op in GELU:
            return "gelu"
        return {"nn.layer_norm": "norm", "mean": "mean"}.get(step.op)

    def _chain(self, first: int, last: int) -> list[int]:
        chain = [first]
        while chain[-1] != last:
            chain.append(self.consumers[self.program.steps[chain[-1]].out][0])
        return chain

    def _reaches_softmax(self, slot: int) -> bool:
        for index in self.consumers[slot]:
            step = self.program.steps[index]
            if step.op in SOFTMAX:
                return True
            scalar = step.op in ("add", "multiply") and not all(step.lifted)
            if (step.op in PASSING or scalar) and self._reaches_softmax(step.out):
                return True
        return False

    def _origins_in(self, slot: int, kinds: dict[int, str]) -> list[int]:
        if slot in kinds:
            return [slot]
        if slot not in self.producer:
            return []
        step = self.program.steps[self.producer[slot]]
        if step.op not in PASSING and step.op != "multiply":
            return []
        found = [
            o
            for s, up in zip(step.args, step.lifted, strict=True)
            if up
            for o in self._origins_in(s, kinds)
        ]
        return list(dict.fromkeys(found))

    def origins(self, slot: int) -> list[int]:
        """Sites whose codes reach ``slot`` through layout operators only."""
        return self._origins_in(slot, self._kinds)

    def _join_groups(self) -> tuple[dict[int, int], dict[int, int]]:
        parent = {slot: slot for slot in self._kinds}

        def root(slot: int) -> int:
            while parent[slot] != slot:
                slot = parent[slot]
            return slot

        constants: dict[int, int] = {}
        for step in self.program.steps:
            if step.op != "concat":
                continue
            members = self.origins(step.out)
            for slot in members:
                parent[root(slot)] = root(members[0])
            for slot, up in zip(step.args, step.lifted, strict=True):
                if not up:
                    constants[slot] = members[0]
        groups = {slot: root(slot) for slot in parent}
        return groups, {slot: groups[site] for slot, site in constants.items()}

    def _site(self, slot: int, kind: str) -> Site:
        program, step = self.program, self.producer.get(slot, -1)
        var = program.parameter if step < 0 else program.steps[step].var
        readers = [program.steps[i].op for i in self.consumers[slot]]
        given = any(op in ("quantize", "dequantize") for op in readers)
        name = "x" if var is None else str(var.name)
        return Site(slot, kind, step, given, self._groups[slot], name)

    # -- linears -------------------------------------------------------------------------------
    @staticmethod
    def constant_of(step: Step) -> int:
        """Slot of the constant operand of a step that has exactly one."""
        return next(s for s, up in zip(step.args, step.lifted, strict=True) if not up)

    def _linear(self, index: int, step: Step) -> Linear:
        program, bias, last = self.program, -1, index
        site = step.out
        while site not in self.sites:
            last = self.consumers[site][0]
            following = program.steps[last]
            if bias < 0 and following.op == "add" and not all(following.lifted):
                slot = self.constant_of(following)
                if program.constants[slot].squeeze().dim() <= 1:
                    bias = slot
            site = following.out
        sources = self.origins(step.args[0])
        given = not isinstance(self.program.steps[index].call.args[1], tvm.ir.GenericConst)
        return Linear(
            index, step.args[0], sources[0] if sources else -1, step.args[1], bias, site, given
        )
