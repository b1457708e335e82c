"""The attention kernel's body; what it does is told in :mod:`schedules.cuda.attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tvm import tirx

from schedules.builder import const, load
from schedules.gemm import GemmSpec
from schedules.strides import entry_offset, permuted_strides

from .attention_context import Context
from .attention_epilogue import Elements, Scale, finished
from .attention_expression import Steps, Value, element, limits
from .attention_operands import HIGH, LOW, PLANES, Matrix, fragments, levels, load_depth
from .attention_softmax import Softmax
from .writer import CudaWriter, pointer

if TYPE_CHECKING:
    from .attention import Problem

__all__ = ["AttentionKernel"]

_PAIR = 0x5410
"""Selector of the low halves of two words."""


class AttentionKernel:
    """Writes one kernel; the methods stand in the order in which they run.

    Parameters
    ----------
    problem
        What is computed.
    groups
        Groups of 16 query rows of a block.
    split
        Warps of a group.
    """

    def __init__(self, problem: Problem, groups: int, split: int) -> None:
        self.p = p = problem
        self.split = split
        self.warps = groups * split
        self.row_groups = -(-p.rows // 16)
        self.total = p.entries * self.row_groups
        w = self.w = CudaWriter((-(-self.total // groups),), 32 * self.warps, p.registers)
        self.steps = -(-p.keys // (32 * split))
        self.full, self.rest = divmod(p.keys, 32)
        self.scratch = w.shared("scratch", self.warps * self.steps * 256, "int32")
        self.stats: list[Any] = [None, None]
        if split > 1:
            self.sums = w.shared("sums", self.warps * 512, "int32")
            self.stats = [w.shared(name, self.warps * 16, "int32") for name in ("most", "total")]
        self.params: list[Any] = []
        self.of_scores = self._declare("scores", p.scores_params[:-1])
        self.of_between = [
            self._declare("mask", [b for i, b in enumerate(params[:-1]) if i != position])
            for params, position, _ in p.between]
        self.of_softmax = self._declare("softmax", p.softmax_params[1:-1])
        self.of_context = self._declare("context", p.context_params[1:])
        self._place(groups)

    def build(self) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        self._operands()
        self._scores()
        self._softmax()
        self._context()
        return self.w.prim_func(self.params, {"tirx.noalias": True, "tirx.is_scheduled": True})

    def _declare(self, name: str, buffers: Sequence[Any]) -> dict[Any, Any]:
        """Add a member's buffers to the parameters, under names of their own; return flat views."""
        views = {}
        for buffer in buffers:
            own = tirx.decl_buffer(list(buffer.shape), str(buffer.dtype),
                                   f"{name}_{len(self.params)}")
            self.params.append(own)
            views[buffer] = self.w.flat(own)
        return views

    # Where this warp is

    def _place(self, groups: int) -> None:
        """Bind the batch entry, the two rows of this thread, its part of the keys."""
        w, p = self.w, self.p
        by = const(self.split, "int32")
        group = w.bind("group", w.block[0] * groups + tirx.floordiv(w.warp, by))
        self.inside = None
        if self.total % groups:
            self.inside = w.bind("inside", group < self.total)
            group = w.bind("group", tirx.min(group, const(self.total - 1, "int32")))
        per = const(self.row_groups, "int32")
        self.entry = w.bind("entry", tirx.floordiv(group, per))
        self.g = w.bind("g", tirx.floordiv(w.lane, const(4, "int32")))
        self.t = w.bind("t", tirx.floormod(w.lane, const(4, "int32")))
        first = w.bind("row", tirx.floormod(group, per) * 16 + self.g)
        self.rows = [first, w.bind("row", first + 8)]
        last = const(p.rows - 1, "int32")
        self.held_rows = [w.bind("held", tirx.min(row, last)) if p.rows % 16 else row
                          for row in self.rows]
        self.first_step: Any = const(0, "int32")
        self.whole: Any = self.full
        self.has_rest: Any = None
        self.part: Any = const(0, "int32")
        if self.split > 1:
            # In a register of its own: TVM's simplifier trips over what it could know of it.
            held = w.registers("part", 1)
            w.store(held, tirx.floormod(w.warp, by), 0)
            self.part = load(held, 0)
            self.first_step = w.bind("first_step", self.part * self.steps)
            left = const(self.full, "int32") - self.first_step
            self.whole = w.bind("whole", tirx.max(tirx.min(left, const(self.steps, "int32")),
                                                  const(0, "int32")))
            self.has_rest = w.bind("has_rest", self.part.equal(self.full // self.steps))

    def matrix(self, views: Mapping[Any, Any], buffer: Any, axes: Sequence[int],
               name: str) -> Matrix:
        """Return this entry's matrix of a tensor that is permuted by ``axes``."""
        shape = [int(extent) for extent in buffer.shape]
        strides = permuted_strides(shape, axes)
        *batch, rows, columns = [shape[axis] for axis in axes] or shape
        base = self.w.bind(name, entry_offset(self.entry, batch, strides[:-2]))
        return Matrix(views[buffer], base, strides[-2], rows, columns)

    @contextmanager
    def _rest(self) -> Iterator[None]:
        """Write what is done for the keys past the last whole step, by the warp that has them."""
        with self.w.when(self.has_rest) if self.has_rest is not None else nullcontext():
            yield

    def slot(self, step: Any, half: int) -> Any:
        """Return where four words of this thread are in the scratch."""
        return ((self.w.warp * self.steps + step) * 2 + half) * 128 + self.w.lane * 4

    # Operands

    def _operands(self) -> None:
        w, p = self.w, self.p
        q, k, *rest, _ = p.scores_params
        self.q = self.matrix(self.of_scores, q, p.scores.a_axes, "q_base")
        self.k = self.matrix(self.of_scores, k, p.scores.b_axes, "k_base")
        self.scale = self.scale_of(p.scores, p.scores_params, self.of_scores, p.depth)
        self.bias = None
        if p.scores.epilogue.kind == "requant_add":
            self.bias = Elements(w, self.of_scores[rest[0]], self.entry, self.held_rows)
            self.bias.broadcast(rest[0], [int(e) for e in p.scores_params[-1].shape])
        self.masks: list[dict[Any, Elements]] = []
        for (params, position, stage), views in zip(p.between, self.of_between, strict=True):
            self.masks.append(Elements.of_stage(
                w, views, self.entry, self.held_rows, stage, params[position]))
        # Q, as fragments of all its planes.
        self.k_steps = -(-p.depth // 32)
        planes = len(PLANES[self.q.dtype])
        words = self.q.size
        raw = w.registers("q_raw", 2 * self.k_steps * words)
        halves = w.registers("q_half", planes * 2 * self.k_steps)
        self.q_parts = w.registers("q_parts", planes * self.k_steps * 4)
        for r, row in enumerate(self.held_rows):
            at = w.bind("q_row", self.q.row(row) if p.rows % 16 == 0 else
                        self.q.base + row * self.q.stride)
            load_depth(w, self.q, at, self.t, raw, 0, zero=True)
            fragments(w, self.q.dtype, raw, 0, 2 * self.k_steps, halves,
                      [i * 2 * self.k_steps for i in range(planes)])
            for plane in range(planes):
                for step in range(self.k_steps):
                    for half in range(2):
                        code = load(halves, (plane * self.k_steps + step) * 2 + half)
                        place = (plane * self.k_steps + step) * 4 + 2 * half + r
                        w.store(self.q_parts, code, place)
        self.k_words = 2 * self.k_steps * self.k.size
        self.k_raw = w.registers("k_raw", 4 * self.k_words)

    def scale_of(self, spec: GemmSpec, params: Sequence[Any], views: Mapping[Any, Any],
                 depth: int) -> Scale:
        """Return how a product over ``depth`` is requantised."""
        scalars = None if spec.epilogue.kind == "acc" else views[params[-2]]
        bound = depth
        for buffer in params[:2]:
            bound *= max(abs(end) for end in limits(str(buffer.dtype)))
        return Scale(self.w, spec.epilogue, scalars, bound)

    # Q K^T

    def _scores(self) -> None:
        w = self.w
        self.acc = w.registers("acc", 16)
        self.k_part = w.registers("k_part", 2 * len(PLANES[self.k.dtype]))
        self.words = w.registers("words", 8)
        self.most = w.registers("row_max", 2)
        low, _ = limits(str(self.p.softmax_params[0].dtype))
        for r in range(2):
            w.store(self.most, const(low, "int32"), r)
        if self.full:
            self._load_keys(self.whole_step(0), False)
        self.walk(self._scores_step)

    def _last(self) -> Any:
        return const(self.whole, "int32") if isinstance(self.whole, int) else self.whole

    def whole_step(self, step: Any) -> Any:
        """Return the first key of a step of this warp, or of the last whole one before it."""
        last = const(self.full - 1, "int32")
        return self.w.bind("first", tirx.min(self.first_step + step, last) * 32)

    def _load_keys(self, first: Any, rest: bool) -> None:
        """Load a step's rows of K: key g of each tile; of the ``rest``, which may end before."""
        w = self.w
        for tile in range(-(-self.rest // 8) if rest else 4):
            key = first + 8 * tile + self.g
            at = w.bind("k_row", self.k.row(key) if rest else self.k.base + key * self.k.stride)
            load_depth(w, self.k, at, self.t, self.k_raw, tile * self.k_words, zero=False)

    def _scores_step(self, step: Any, valid: int) -> None:
        """Make the codes of a step, of which the first ``valid`` keys are real."""
        w = self.w
        first = w.bind("key", (self.first_step + step) * 32)
        if valid < 32:
            self._load_keys(first, True)
        self._products(-(-valid // 8))
        if valid == 32:
            self._load_keys(self.whole_step(step + 1), False)
        column = w.bind("column", first + 2 * self.t)
        low, _ = limits(str(self.p.softmax_params[0].dtype))
        last = const(self.p.keys - 1, "int32")

        def word(n: Any, r: Any, real: Any) -> None:
            codes = []
            for i in range(2):
                at = column + (tirx.floordiv(n, const(2, "int32")) * 8 + i)
                if real is not None:
                    at = tirx.min(at, last)
                code = self._code(Value(load(self.acc, 2 * n + i), *limits("int32")), r, at)
                if real is not None:
                    code = tirx.Select(real[i], code, const(low, "int32"))
                codes.append(code)
            w.store(self.words, w.value("vitq_bytes", *codes, _PAIR), n)
            w.store(self.most, tirx.max(load(self.most, r), tirx.max(*codes)), r)

        self._each(valid, word)
        self._put(step)

    def _each(self, valid: int, word: Callable[[Any, Any, Any], None]) -> None:
        """Write ``word(n, r, real)`` for each pair of columns: pair ``n`` is of tile n // 2, row r.

        ``real``, None where both are, says of each column whether it is a key.
        """
        w, two = self.w, const(2, "int32")
        whole, rest = divmod(valid, 8)
        if whole:
            with w.unrolled("n", 2 * whole) as n:
                word(n, tirx.floormod(n, two), None)
        if rest:
            real = [w.bind("real", 2 * self.t + i < const(rest, "int32")) for i in range(2)]
            with w.unrolled("r", 2) as r:
                word(2 * whole + r, r, real)

    def _put(self, step: Any) -> None:
        for half in range(2):
            self.w.call("vitq_store16", pointer(self.scratch, self.slot(step, half)),
                        pointer(self.words, 4 * half))

    def _get(self, step: Any) -> None:
        for half in range(2):
            self.w.call("vitq_load16", pointer(self.words, 4 * half),
                        pointer(self.scratch, self.slot(step, half)))

    def _products(self, tiles: int) -> None:
        """Multiply Q by the keys that are loaded; planes from the highest shift to the lowest."""
        w, p = self.w, self.p
        for i in range(4 * tiles):
            w.store(self.acc, const(0, "int32"), i)
        kinds = [[kind for kind, _ in PLANES[m.dtype]] for m in (self.q, self.k)]
        above = None
        for shift, pairs in levels(self.q.dtype, self.k.dtype):
            if above is not None:
                for i in range(4 * tiles):
                    value = load(self.acc, i) << const(above - shift, "int32")
                    w.store(self.acc, value, i)
            above = shift
            for step in range(self.k_steps):
                for tile in range(tiles):
                    at = tile * self.k_words + step * 2 * self.k.size
                    places = [2 * i for i in range(len(kinds[1]))]
                    fragments(w, self.k.dtype, self.k_raw, at, 2, self.k_part, places)
                    for i, j in pairs:
                        w.call(f"vitq_mma_{kinds[0][i]}_{kinds[1][j]}",
                               pointer(self.acc, 4 * tile),
                               pointer(self.q_parts, (i * self.k_steps + step) * 4),
                               pointer(self.k_part, places[j]))
        assert p.depth > 0

    def _code(self, acc: Value, r: Any, column: Any) -> Any:
        """Return the code that the softmax takes, from the accumulator of row ``r``."""
        p = self.p
        residual = None
        if self.bias is not None:
            residual = self.bias.value(r, column)
        value = finished(self.w, p.scores.epilogue, acc, self.scale, residual)
        for (params, position, stage), masks in zip(p.between, self.masks, strict=True):
            value = Elements.translate(self.w, stage, params[position], value, masks, r, column)
        return Steps(self.w).keep(value).to("int32")

    # Softmax

    def _softmax(self) -> None:
        w, p = self.w, self.p
        soft = self.softmax = Softmax(w, p.stages, p.softmax_params, self.of_softmax)
        soft.start(self._reduced(self.most, self.stats[0], tirx.max))
        self.row_sum = w.registers("row_sum", 2)
        for r in range(2):
            w.store(self.row_sum, const(0, "int32"), r)
        self.walk(self._exponentials)
        soft.finish(self._reduced(self.row_sum, self.stats[1], tirx.Add))
        self.p_part = w.registers("p_part", 8)
        self.walk(self._probabilities)

    def _reduced(self, own: Any, buffer: Any, joined: Callable[[Any, Any], Any]) -> list[Any]:
        """Return both rows' maxima or sums, over the quad and the warps that share the rows."""
        w, values = self.w, []
        for r in range(2):
            value = load(own, r)
            for lanes in (1, 2):
                value = w.bind("value", value)
                value = w.bind("value", joined(value, w.value("vitq_shuffle_xor", value, lanes)))
            values.append(value)
        if self.split == 1:
            return values
        base = w.bind("base", (w.warp - self.part) * 16 + self.g)
        with w.when(self.t.equal(0)):
            for r, value in enumerate(values):
                w.store(buffer, value, base + self.part * 16 + 8 * r)
        w.barrier()
        for r in range(2):
            value = load(buffer, base + 8 * r)
            for part in range(1, self.split):
                value = joined(value, load(buffer, base + 16 * part + 8 * r))
            values[r] = w.bind("value", value)
        return values

    def walk(self, body: Any) -> None:
        """Write ``body(step, valid)`` for all steps of this warp."""
        if self.full:
            with self.w.rolled("step", self.whole) as step:
                body(step, 32)
        if self.rest:
            with self._rest():
                body(self._last(), self.rest)

    def _codes(self, n: Any) -> list[Value]:
        """Return the two 16-bit codes of word ``n``."""
        word, half = load(self.words, n), const(16, "int32")
        return [element(code, "int32") for code in ((word << half) >> half, word >> half)]

    def _exponentials(self, step: Any, valid: int) -> None:
        w, zero = self.w, const(0, "int32")
        self._get(step)

        def word(n: Any, r: Any, real: Any) -> None:
            done = [self.softmax.exponential(code, r) for code in self._codes(n)]
            if real is not None:
                done = [tirx.Select(real[i], value, zero) for i, value in enumerate(done)]
            w.store(self.words, w.value("vitq_bytes", *done, _PAIR), n)
            w.store(self.row_sum, load(self.row_sum, r) + (done[0] + done[1]), r)

        self._each(valid, word)
        self._put(step)

    def _probabilities(self, step: Any, valid: int) -> None:
        """Turn a step's exponentials into fragments of probabilities, one plane after the other."""
        w, zero = self.w, const(0, "int32")
        self._get(step)

        def word(n: Any, r: Any, real: Any) -> None:
            done = [self.softmax.probability(code, r) for code in self._codes(n)]
            if real is not None:
                done = [tirx.Select(real[i], value, zero) for i, value in enumerate(done)]
            w.store(self.words, w.value("vitq_bytes", *done, _PAIR), n)

        self._each(valid, word)
        for n in range(2 * -(-valid // 8), 8):
            w.store(self.words, zero, n)
        wide = str(self.p.softmax_params[-1].dtype) == "int16"
        for plane, selector in enumerate((HIGH, LOW) if wide else (LOW,)):
            for half in range(2):
                for r in range(2):
                    pair = (load(self.words, 4 * half + 2 * i + r) for i in range(2))
                    w.store(self.p_part, w.value("vitq_bytes", *pair, selector),
                            4 * plane + 2 * half + r)
            w.call("vitq_store16", pointer(self.scratch, self.slot(step, plane)),
                   pointer(self.p_part, 4 * plane))

    # P V

    def _context(self) -> None:
        Context(self).write()
