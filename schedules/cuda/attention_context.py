"""The second product of the attention kernel: probabilities times V, 32 channels at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tvm import tirx

from schedules.builder import const, load

from .attention_epilogue import finished
from .attention_expression import Value, limits
from .attention_operands import PLANES, levels, load_codes, transposed
from .writer import pointer

if TYPE_CHECKING:
    from .attention_kernel import AttentionKernel

__all__ = ["Context"]


class Context:
    """Writes the product, its epilogue and its stores for a kernel whose probabilities are made."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.k = kernel
        self.w = w = kernel.w
        p, params = kernel.p, kernel.p.context_params
        self.p_dtype = str(p.softmax_params[-1].dtype)
        self.v = kernel.matrix(kernel.of_context, params[1], p.context.b_axes, "v_base")
        self.levels = levels(self.p_dtype, self.v.dtype)
        self.blocks = -(-self.v.columns // 32)
        p_planes, self.v_planes = len(PLANES[self.p_dtype]), len(PLANES[self.v.dtype])
        self.acc = w.registers("sums", 16 * len(self.levels))
        self.probabilities = w.registers("p", 4 * p_planes)
        self.raw = w.registers("v_raw", 8 * self.v.size)
        self.part = w.registers("v_part", 8 * self.v_planes)

    def write(self) -> None:
        """Write all of it."""
        w, k = self.w, self.k
        loop = w.loop("block", self.blocks) if self.blocks > 1 else nullcontext(
            const(0, "int32"))
        with loop as block:
            self.first = w.bind("first", block * 32)
            for i in range(16 * len(self.levels)):
                w.store(self.acc, const(0, "int32"), i)
            if k.full:
                self._load(k.whole_step(0), False)
            k.walk(self._step)
            self._join()
            self._prepare()
            if k.split == 1:
                self._store()
            else:
                self._share(block)

    def _load(self, first: Any, rest: bool) -> None:
        """Load this thread's eight rows of four channels: keys that its scores are of."""
        w, v = self.w, self.v
        for i in range(8):
            key = first + (2 * self.k.t + (i // 2 * 8 + i % 2))
            at = w.bind("v_row", v.row(key) if rest else v.base + key * v.stride)
            most = 32 * self.blocks - 4
            load_codes(w, v, at, self.first + 4 * self.k.g, most, 4, self.raw, i * v.size)

    def _step(self, step: Any, valid: int) -> None:
        w, k, size = self.w, self.k, self.v.size
        if valid < 32:
            self._load((k.first_step + step) * 32, True)
        for plane in range(len(PLANES[self.p_dtype])):
            w.call("vitq_load16", pointer(self.probabilities, 4 * plane),
                   pointer(k.scratch, k.slot(step, plane)))
        for half in range(2):
            places = [[plane * 8 + 2 * i + half for i in range(4)]
                      for plane in range(self.v_planes)]
            transposed(w, self.v.dtype, self.raw, [(4 * half + i) * size for i in range(4)],
                       self.part, places)
        if valid == 32:
            self._load(k.whole_step(step + 1), False)
        left, right = ([kind for kind, _ in PLANES[dtype]]
                       for dtype in (self.p_dtype, self.v.dtype))
        for level, (_, pairs) in enumerate(self.levels):
            for i, j in pairs:
                for tile in range(4):
                    w.call(f"vitq_mma_{left[i]}_{right[j]}",
                           pointer(self.acc, 16 * level + 4 * tile),
                           pointer(self.probabilities, 4 * i),
                           pointer(self.part, 8 * j + 2 * tile))

    def _join(self) -> None:
        """Add the planes' sums, each shifted; int32 wraps, and the whole sum is proved to fit."""
        for (above, _), (shift, _), level in zip(
                self.levels, self.levels[1:], range(1, len(self.levels)), strict=False):
            for i in range(16):
                high = load(self.acc, 16 * (level - 1) + i) << const(above - shift, "int32")
                self.w.store(self.acc, load(self.acc, 16 * level + i) + high, 16 * level + i)
        self.result = 16 * (len(self.levels) - 1)

    def _prepare(self) -> None:
        """Load what the epilogue takes; not before, for it would keep registers."""
        p, params, views = self.k.p, self.k.p.context_params, self.k.of_context
        axes = p.context.out_axes
        stored = tuple(axes.index(i) for i in range(len(axes)))
        self.out = self.k.matrix(views, params[-1], stored, "out_base")
        self.scale = self.k.scale_of(p.context, params, views, p.keys)

    def _share(self, block: Any) -> None:
        """Add the sums of the warps that share the rows; one of them, in turn, stores."""
        w, k = self.w, self.k

        def place(warp: Any, i: int) -> Any:
            return pointer(k.sums, warp * 512 + 128 * i + w.lane * 4)

        for i in range(4):
            w.call("vitq_store16", place(w.warp, i), pointer(self.acc, self.result + 4 * i))
        w.barrier()
        with w.when(k.part.equal(tirx.floormod(block, const(k.split, "int32")))):
            other = w.registers("other", 4)
            for part in range(1, k.split):
                # The next warp of the group, cyclically.
                turn = tirx.floormod(k.part + part, const(k.split, "int32"))
                warp = w.bind("warp", w.warp - k.part + turn)
                for i in range(4):
                    w.call("vitq_load16", pointer(other, 0), place(warp, i))
                    for j in range(4):
                        at = self.result + 4 * i + j
                        w.store(self.acc, load(self.acc, at) + load(other, j), at)
            self._store()
        if self.blocks > 1:
            w.barrier()

    def _store(self) -> None:
        """Store eight neighbouring channels of two rows: 8t .. 8t+7 of this block's 32."""
        w, k = self.w, self.k
        dtype = self.out.dtype
        column = w.bind("column", self.first + 8 * k.t)
        for r in range(2):
            codes = []
            for e in range(8):
                tile, i = e % 4, e // 4
                acc = Value(load(self.acc, self.result + 4 * tile + 2 * r + i), *limits("int32"))
                codes.append(finished(w, k.p.context.epilogue, acc, self.scale).to("int32"))
            guards = []
            if k.p.rows % 16:
                guards.append(k.rows[r] < const(k.p.rows, "int32"))
            if k.inside is not None:
                guards.append(k.inside)
            at = w.bind("at", self.out.base + k.held_rows[r] * self.out.stride + column)
            if self.v.columns % 8:
                for e, code in enumerate(codes):
                    every = [*guards, column + e < const(self.v.columns, "int32")]
                    with w.when(_all(every)):
                        w.store(self.out.buffer, _as(code, dtype), at + e)
                continue
            if self.v.columns % 32:
                guards.append(column < const(self.v.columns, "int32"))
            with w.when(_all(guards)) if guards else nullcontext():
                self._vector(codes, at)

    def _vector(self, codes: list[Any], at: Any) -> None:
        w, size = self.w, self.out.size
        words = codes
        if size < 4:
            words = [w.value("vitq_bytes", *codes[i:i + 2], 0x5410 if size == 2 else 0x0040)
                     for i in range(0, 8, 2)]
        if size == 1:
            words = [w.value("vitq_bytes", *words[i:i + 2], 0x5410) for i in (0, 2)]
        held = w.registers("stored", len(words))
        for i, word in enumerate(words):
            w.store(held, word, i)
        unit = min(4 * len(words), 16)
        for part in range(4 * len(words) // unit):
            w.call(f"vitq_store{unit}", pointer(self.out.buffer, at + part * unit // size),
                   pointer(held, part * unit // 4))


def _all(conditions: list[Any]) -> Any:
    total = conditions[0]
    for condition in conditions[1:]:
        total = tirx.And(total, condition)
    return total


def _as(code: Any, dtype: str) -> Any:
    return code if dtype == "int32" else tirx.Cast(dtype, code)
