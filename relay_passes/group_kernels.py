"""Group kernels that a GPU runs as one launch.

Works on the legalised module, whose reshapes are views (``RewriteDataflowReshape`` has run), before
kernels are scheduled. A group becomes one call of one PrimFunc that is scheduled already::

    q = linear(x, wq, …)                  q, k, v = linears(x, wq, …, wk, …, wv, …)
    k = linear(x, wk, …)                  c = attention(q, k, …, v, …)
    v = linear(x, wv, …)         →        …
    s = matmul(q, k, …)                   g = linears(x2, w1, …, tables of the gelu)
    p = softmax(s, …)
    c = matmul(p, v, …)
    h = linear(x2, w1, …)
    g = gelu(h, …)

=============  ==================================================================================
group          condition
=============  ==================================================================================
attention      the scores go through elementwise kernels (masks) to a softmax, whose result is the
               left operand of a matmul; each result has one reader
tail           an elementwise kernel is the only reader of a weight matmul without a residual
same rows      weight matmuls take the same x and the same table of rows
=============  ==================================================================================

A grouped PrimFunc's parameters are those of its members, in order, without the intermediate
results and without a second x or table of rows, then the results. Groups whose members are the same
PrimFuncs (other layers', with other constants) share one. Those of weight matmuls have an attribute
``vitq.shape``: M, N of all together, K. A group that
:mod:`schedules.cuda` has no kernel for stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, tirx

from schedules.apply import SCHEDULED, blocks_of, gemm_spec
from schedules.operands import linear_shape
from schedules.records import Schedules

__all__ = ["GroupKernels", "Groups", "substitute"]

_CALL_TIR, _RESHAPE = tvm.ir.Op.get("relax.call_tir"), tvm.ir.Op.get("relax.reshape")


@dataclass
class _Kernel:
    """One ``call_tir``: where it stands, what it calls."""

    place: int
    var: relax.Var
    gvar: tvm.ir.GlobalVar
    func: tirx.PrimFunc
    args: list[relax.Expr]
    spec: Any

    @property
    def linear(self) -> bool:
        """Whether it is a weight matmul."""
        return self.spec is not None and self.spec.kind == "packed_linear"

    @property
    def matmul(self) -> bool:
        """Whether it is a matmul of two activations, requantised."""
        return (self.spec is not None and self.spec.kind == "matmul"
                and self.spec.epilogue.kind != "acc")

    @property
    def shared(self) -> list[int]:
        """Of a weight matmul: the positions of x and, if there is one, of its table of rows."""
        return [0, len(self.args) - 1] if self.spec.gather else [0]


@dataclass
class _Group:
    """Members in order and, of weight matmuls, their tails."""

    kind: str
    members: list[_Kernel]
    tails: list[_Kernel | None] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the scores, in what they go through

    @property
    def parts(self) -> list[_Kernel | None]:
        """Members and tails."""
        return [*self.members, *self.tails]

    @property
    def place(self) -> int:
        """Where the call stands: all its arguments are made before, all readers stand after."""
        return self.members[-1 if self.kind == "attention" else 0].place

    @property
    def results(self) -> list[_Kernel]:
        """The members whose results are the group's."""
        if self.kind == "attention":
            return [self.members[-1]]
        return [tail or member for member, tail in zip(self.members, self.tails, strict=True)]


def _elementwise(func: tirx.PrimFunc, position: int) -> bool:
    """Whether a PrimFunc is one block of elements, each made of that of parameter ``position``."""
    blocks = [block for block in blocks_of(func.body) if block.iter_vars]
    if len(blocks) != 1 or any(int(v.iter_type) != 0 for v in blocks[0].iter_vars):
        return False
    source, out = func.params[position], func.params[-1]
    return [int(e) for e in source.shape] == [int(e) for e in out.shape] and all(
        len(region.region) == len(blocks[0].iter_vars) and all(
            int(axis.extent) == 1 and (axis.min.same_as(v.var) or int(v.dom.extent) == 1)
            for axis, v in zip(region.region, blocks[0].iter_vars, strict=True))
        for region in blocks[0].reads if region.source.same_as(source))


class Groups:
    """One Relax function after legalisation: its kernels, who reads what, its groups."""

    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        self.func = func
        self.bindings = [b for block in func.body.blocks for b in block.bindings]
        self.kernels: dict[relax.Var, _Kernel] = {}
        self.views: dict[relax.Var, relax.Expr] = {}
        self.readers: dict[relax.Var, list[_Kernel | None]] = {}
        for place, binding in enumerate(self.bindings):
            value = binding.value
            if isinstance(value, relax.Call) and value.op.same_as(_RESHAPE):
                self.views[binding.var] = value.args[0]
                continue
            kernel = None
            if isinstance(value, relax.Call) and value.op.same_as(_CALL_TIR):
                gvar = value.args[0]
                kernel = _Kernel(place, binding.var, gvar, mod[gvar], list(value.args[1].fields),
                                 gemm_spec(mod[gvar]))
                self.kernels[binding.var] = kernel
            self._read(value, kernel)
        self._read(func.body.body, None)
        self.taken: set[relax.Var] = set()
        self.groups = [*self._attentions(), *self._linears()]

    def _read(self, expr: relax.Expr, kernel: _Kernel | None) -> None:
        if isinstance(expr, relax.Var):
            self.readers.setdefault(self.source(expr), []).append(kernel)
        elif isinstance(expr, relax.Call):
            for arg in expr.args:
                self._read(arg, kernel)
        elif isinstance(expr, relax.Tuple):
            for part in expr.fields:
                self._read(part, kernel)
        elif isinstance(expr, relax.TupleGetItem):
            self._read(expr.tuple_value, kernel)

    def source(self, expr: relax.Expr) -> relax.Expr:
        """Return what a chain of views is of."""
        while isinstance(expr, relax.Var) and expr in self.views:
            expr = self.views[expr]
        return expr

    def _reader(self, kernel: _Kernel) -> tuple[_Kernel, int] | None:
        """Return the only reader of a kernel's result, and at which argument."""
        readers = self.readers.get(kernel.var, [])
        reader = readers[0] if len(readers) == 1 else None
        if reader is None:
            return None
        return reader, next(i for i, arg in enumerate(reader.args)
                            if self.source(arg).same_as(kernel.var))

    def _attentions(self) -> list[_Group]:
        groups = []
        for scores in self.kernels.values():
            if not scores.matmul:
                continue
            members = [scores]
            found = self._reader(scores)
            positions = []
            while found and _elementwise(found[0].func, found[1]):
                members.append(found[0])
                positions.append(found[1])
                found = self._reader(found[0])
            if not found or found[0].func.attrs.get("vitq.op", "") != "vitq.softmax":
                continue
            members.append(found[0])
            found = self._reader(found[0])
            if not found or not found[0].matmul or found[1] != 0:
                continue
            members.append(found[0])
            groups.append(_Group("attention", members, positions=positions))
            self.taken |= {member.var for member in members}
        return groups

    def _linears(self) -> list[_Group]:
        """Return weight matmuls by the rows that they take, with their tails."""
        groups: list[_Group] = []
        for kernel in self.kernels.values():
            if not kernel.linear:
                continue
            tail = self._tail(kernel)
            same = next((g for g in groups if self._same_rows(g.members[0], kernel)), None)
            if same is not None:
                same.members.append(kernel)
                same.tails.append(tail)
            else:
                groups.append(_Group("linears", [kernel], [tail]))
        return [g for g in groups if len(g.members) > 1 or g.tails[0] is not None]

    def _tail(self, kernel: _Kernel) -> _Kernel | None:
        found = self._reader(kernel)
        if kernel.spec.epilogue.kind != "requant" or not found or found[0].var in self.taken:
            return None
        tail, position = found
        others = [arg for i, arg in enumerate(tail.args) if i != position]
        fits = _elementwise(tail.func, position) and position == 0
        fits = fits and all(isinstance(arg, tvm.ir.GenericConst) for arg in others)
        return tail if fits else None

    @staticmethod
    def _same_rows(a: _Kernel, b: _Kernel) -> bool:
        if a.spec.gather != b.spec.gather or a.spec.epilogue.kind != b.spec.epilogue.kind:
            return False
        return a.spec.epilogue.kind == "requant" and all(
            a.args[i].same_as(b.args[j]) for i, j in zip(a.shared, b.shared, strict=True))

    def arguments(self, group: _Group) -> list[relax.Expr]:
        """Return the arguments of a group's call, in the order of its PrimFunc's parameters."""
        members = group.members
        if group.kind == "attention":
            inside = {member.var for member in members}
            return [arg for member in members for arg in member.args
                    if self.source(arg) not in inside]
        arguments = list(members[0].args)
        for member, tail in zip(members, group.tails, strict=True):
            if member is not members[0]:
                shared = member.shared
                arguments += [arg for i, arg in enumerate(member.args) if i not in shared]
            if tail is not None:
                arguments += tail.args[1:]
        return arguments


def _shape(members: list[_Kernel]) -> list[int]:
    """Return M, N and K of weight matmuls of the same rows: N is that of all together."""
    shapes = [linear_shape(member.func.params, member.spec.gather) for member in members]
    return [shapes[0][0], sum(columns for _, columns, _ in shapes), shapes[0][2]]


def _kernel_of(group: _Group, schedules: Schedules | None) -> tirx.PrimFunc | None:
    """Return the kernel of a group, None if there is none for it."""
    if group.kind == "attention":
        from schedules.cuda.attention import attention

        scores, *between, softmax, context = (member.func for member in group.members)
        return attention(scores, between, softmax, context, positions=group.positions,
                         schedules=schedules)
    from schedules.cuda.linear import linears

    return linears([member.func for member in group.members],
                   [tail.func if tail is not None else None for tail in group.tails],
                   schedules=schedules)


class _Rewrite:
    """Adds the groups' kernels to a module; equal ones once."""

    def __init__(self, mod: tvm.IRModule, schedules: Schedules | None) -> None:
        self.mod = mod
        self.schedules = schedules
        self.bb = relax.BlockBuilder(mod)
        self.kernels: dict[Any, tvm.ir.GlobalVar | None] = {}

    def _kernel(self, group: _Group) -> tvm.ir.GlobalVar | None:
        parts = group.parts
        key = (group.kind, *(part.gvar.name_hint if part is not None else "" for part in parts))
        if key not in self.kernels:
            func = _kernel_of(group, self.schedules)
            if func is not None:
                operators = (str(part.func.attrs["vitq.op"]) for part in parts if part is not None)
                attrs = {"vitq.op": "+".join(operators), SCHEDULED: True}
                if group.kind == "linears":
                    attrs["vitq.shape"] = _shape(group.members)
                func = func.with_attrs(attrs)
                func = func.without_attr("global_symbol")
            self.kernels[key] = func and self.bb.add_func(func, f"vitq_{group.kind}")
        return self.kernels[key]

    def function(self, func: relax.Function) -> relax.Function:
        """Return a function with its groups replaced."""
        found = Groups(self.mod, func)
        calls: dict[int, tuple[_Group, tvm.ir.GlobalVar]] = {}
        inside: set[int] = set()
        for group in found.groups:
            gvar = self._kernel(group)
            if gvar is not None:
                calls[group.place] = group, gvar
                inside |= {part.place for part in group.parts if part is not None}
        bb = relax.BlockBuilder()
        params = [relax.Var(p.name, p.ty) for p in func.params]
        values: dict[relax.Var, relax.Expr] = dict(zip(func.params, params, strict=True))
        name = str(func.attrs["global_symbol"])
        with bb.function(name, params, attrs={"global_symbol": name}):
            with bb.dataflow():
                for place, binding in enumerate(found.bindings):
                    if place in calls:
                        self._emit(bb, found, *calls[place], values)
                    if place in inside:
                        continue
                    value = substitute(binding.value, values)
                    if not isinstance(value, relax.Var):
                        value = bb.emit(value, binding.var.name)
                    values[binding.var] = value
                out = bb.emit_output(substitute(func.body.body, values))
            bb.emit_func_output(out)
        return bb.get()[name]

    @staticmethod
    def _emit(bb: relax.BlockBuilder, found: Groups, group: _Group, gvar: tvm.ir.GlobalVar,
              values: dict[relax.Var, relax.Expr]) -> None:
        results = [result.var for result in group.results]
        arguments = [substitute(arg, values) for arg in found.arguments(group)]
        types = [var.ty for var in results]
        call = relax.call_tir(gvar, arguments, types if len(types) > 1 else types[0])
        if len(results) == 1:
            values[results[0]] = bb.emit(call, results[0].name)
            return
        whole = bb.emit(call, group.kind)
        for i, var in enumerate(results):
            values[var] = bb.emit(relax.TupleGetItem(whole, i), var.name)


def substitute(expr: relax.Expr, table: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """Return an expression with variables replaced by what a table has for them."""
    if isinstance(expr, relax.Var):
        return table.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(part, table) for part in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(expr.tuple_value, table), expr.index)
    if isinstance(expr, relax.Call):
        args = [substitute(arg, table) for arg in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    return expr


@tvm.transform.module_pass(opt_level=0, name="vitq.GroupKernels")
class GroupKernels:
    """Replace each group of kernels by one; see the module's docstring.

    Parameters
    ----------
    schedules
        Records of tuning; None for the default rules alone.
    """

    def __init__(self, schedules: Schedules | None = None) -> None:
        self.schedules = schedules

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        rewrite = _Rewrite(mod, self.schedules)
        done = {gvar.name_hint: rewrite.function(func) for gvar, func in mod.functions_items()
                if isinstance(func, relax.Function)}
        result = rewrite.bb.get().clone()
        for name, func in done.items():
            result.update_func(result.get_global_var(name), func)
        if mod.attrs is not None:
            result = result.with_attrs({str(key): value for key, value in mod.attrs.items()})
        return relax.transform.DeadCodeElimination()(result)
