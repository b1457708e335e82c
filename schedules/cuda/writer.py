"""The TIR writer of CUDA kernels: a grid of blocks of threads, memory by scope, device functions.

One :class:`CudaWriter` writes one PrimFunc that becomes one kernel launch::

    w = CudaWriter(blocks=(M // 64, N // 64), threads=128)
    tile = w.shared("tile", 64 * 80, "int8")
    ...
    func = w.prim_func([x, weights, out], {"global_symbol": "main"})

Loops over registers must be ``unrolled``: an array indexed by a run-time number would lie in
device memory ("local memory"), which the resource report of a build shows and the tests forbid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from schedules.builder import Writer, const

from .functions import FUNCTIONS

__all__ = ["EARLY", "CudaWriter", "pointer"]

EARLY = "vitq.early"
"""Attribute of a kernel: its parameters that are read before earlier launches have ended, which
must be constants."""

_HELD = "__device__ __forceinline__ void vitq_held(const void* registers) {\n}\n"
_REGISTERS = 65536
"""Registers of a multiprocessor."""
_ALIGNMENT = 128
"""Alignment of shared buffers, bytes: one row of the 32 banks."""


def pointer(buffer: Any, index: Any) -> Any:
    """Return the address of an element of a flat buffer."""
    if isinstance(index, int):
        index = tirx.const(index, "int32")
    return tirx.address_of(tirx.BufferLoad(buffer, [index]))


class CudaWriter(Writer):
    """Writes the body of a kernel; see the module's docstring.

    Parameters
    ----------
    blocks
        Extents of ``blockIdx.x``, ``.y``, ``.z``, one to three.
    threads
        Extent of ``threadIdx.x``.
    registers
        What a thread may have, at least. None: ptxas chooses, and would rather keep a few values
        in local memory than take more than 64, 96 or 128.

    Attributes
    ----------
    block
        The block's indices.
    thread, lane, warp
        The thread's index in its block; in its warp; its warp's index.
    """

    def __init__(self, blocks: Sequence[int], threads: int, registers: int | None = None) -> None:
        super().__init__()
        self._resident = None if registers is None else _REGISTERS // (registers * threads)
        self._axes = [(self._axis(f"blockIdx.{axis}", extent), extent)
                      for axis, extent in zip("xyz", blocks, strict=False)]
        self._axes.append((self._axis("threadIdx.x", threads), threads))
        self.block = [axis.var for axis, _ in self._axes[:-1]]
        self.threads = threads
        self.thread = self._axes[-1][0].var
        self._views: list[Any] = []
        self._arrays: list[list[Any]] = [[]]
        self._shared_bytes = 0
        self._early: list[Any] | None = None
        self.lane = self.bind("lane", self.thread % 32)
        self.warp = self.bind("warp", tirx.floordiv(self.thread, tirx.const(32, "int32")))

    @staticmethod
    def _axis(tag: str, extent: int) -> Any:
        var = tirx.Var(tag.replace(".", "_"), "int32")
        return tirx.IterVar(tvm.ir.Range(0, extent), var, tirx.IterVar.ThreadIndex, tag)

    def shared(self, name: str, size: int, dtype: str) -> Any:
        """Allocate shared memory: a flat buffer of ``size`` elements, 128-byte aligned.

        It is there for the whole kernel, whose buffers never share a byte.
        """
        width = tvm.DataType(dtype).bits // 8
        view = tirx.decl_buffer([size], dtype, self._fresh(name), scope="shared.dyn",
                                elem_offset=self._shared_bytes // width)
        self._views.append(view)
        self._shared_bytes += -(-size * width // _ALIGNMENT) * _ALIGNMENT
        return view

    def registers(self, name: str, size: int, dtype: str = "int32") -> Any:
        """Allocate an array of one thread; every index must be constant once loops are unrolled."""
        # A view is used, for TVM makes an array as small as the part that it thinks is touched.
        array, view = (tirx.decl_buffer([size], dtype, self._fresh(name), scope="local")
                       for _ in range(2))
        self.emit(tirx.AllocBuffer(array))
        self.emit(tirx.DeclBuffer(view, data=array.data))
        self._arrays[-1].append(array)
        return view

    @contextmanager
    def scope(self) -> Iterator[list[Any]]:
        """Collect statements in a list of their own (for a body built elsewhere)."""
        with super().scope() as statements:
            self._arrays.append([])
            yield statements
            self._hold()

    def _hold(self) -> None:
        # Nor does TVM see the last access through an address: it would give an array's registers
        # to another one too early. A use of the array itself, where its scope ends, forbids that.
        from tvm.backend.cuda.op import cuda_func_call

        for array in self._arrays.pop():
            call = cuda_func_call("vitq_held", array.data, source_code=_HELD, return_type="void")
            self.emit(tirx.Evaluate(call))

    @contextmanager
    def unrolled(self, name: str, extent: int) -> Iterator[Any]:
        """Open a loop that nvcc unrolls: as one of kind ``unrolled``, but the text has it once."""
        with self.scope() as body, self.loop(name, extent, "unrolled") as var:
            yield var
        (loop,) = body
        off = tirx.const(False, "bool")
        self.emit(tirx.AttrStmt(const(0, "int32"), "pragma_unroll_explicit", off, loop))

    @contextmanager
    def rolled(self, name: str, extent: Any) -> Iterator[Any]:
        """Open a loop that nvcc leaves one: unrolled, its loads would take more registers."""
        with self.scope() as body, self.loop(name, extent) as var:
            yield var
        (loop,) = body
        self.emit(tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, loop.body,
                           annotations={"disable_unroll": True}))

    def wait_for_launches(self) -> None:
        """Wait until the launches before are over: what they write may be read from here on.

        Left out, the kernel begins with it; constants may be read before.
        """
        assert len(self._stack) == 1, "all threads wait"
        self._early = list(self._stack[0])
        self.call("vitq_wait_for_launches")

    def barrier(self) -> None:
        """Wait for all threads of the block; what they wrote to shared memory is then seen."""
        self.emit(tirx.Evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared")))

    def value(self, name: str, *args: Any) -> Any:
        """Return the call of a device function as an expression."""
        from tvm.backend.cuda.op import cuda_func_call

        function = FUNCTIONS[name]
        exact = [const(arg, "int32") if isinstance(arg, int) else arg for arg in args]
        return cuda_func_call(name, *exact, source_code=function.source,
                              return_type=function.returns)

    def call(self, name: str, *args: Any) -> None:
        """Call a device function for what it does."""
        self.emit(tirx.Evaluate(self.value(name, *args)))

    def _declarations(self) -> list[Any]:
        # TVM's passes know little of accesses through addresses: left alone they make shared
        # buffers smaller and lay them over each other. One allocation and views of it leave them
        # nothing to plan.
        if not self._views:
            return []
        # Of the views' dtype if they have one: TVM would change the arena's and not its length.
        dtypes = {str(view.dtype) for view in self._views}
        dtype = dtypes.pop() if len(dtypes) == 1 else "uint8"
        length = self._shared_bytes * 8 // tvm.DataType(dtype).bits
        # Kernels of one text must not declare one name with two types.
        name = self._fresh(f"arena_{dtype}")
        arena = tirx.decl_buffer([length], dtype, name, scope="shared.dyn")
        return [tirx.AllocBuffer(arena),
                *(tirx.DeclBuffer(view, data=arena.data) for view in self._views)]

    def prim_func(self, params: Sequence[Any], attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Close the function."""
        self._hold()
        with super().scope() as first:
            self.call("vitq_let_next_begin")
            if self._early is None:
                self.call("vitq_wait_for_launches")
        body: Any = tirx.SeqStmt([*first, *self._declarations(), *self._stack[0]])
        if self._resident is not None:
            body = tirx.AttrStmt(const(0, "int32"), "tirx.launch_bounds_min_blocks_per_sm",
                                 const(self._resident, "int32"), body)
        for axis, extent in reversed(self._axes):
            body = tirx.AttrStmt(axis, "thread_extent", tirx.const(extent, "int32"), body)
        self._stack[0] = [body]
        read = _loaded(self._early or [])
        early = [i for i, param in enumerate(params) if param in read]
        return super().prim_func(params, {**attrs, EARLY: early} if early else attrs)


def _loaded(statements: Sequence[Any]) -> set[Any]:
    """Return the buffers that statements load from or take addresses in, themselves or by views."""
    found: set[Any] = set()
    views: dict[Any, Any] = {}

    def visit(node: Any) -> None:
        if type(node).__name__ == "TensorLoad":
            found.add(node.source)
        elif type(node).__name__ == "DeclBuffer":
            views[node.buffer] = node.data.args[0]

    for statement in statements:
        tvm_ffi.structural_walk(statement, (object, visit))
    return found | {views[buffer] for buffer in found if buffer in views}
