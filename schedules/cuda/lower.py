"""From kernels as PrimFuncs to CUDA C++ text, by TVM's own pipeline; needs no CUDA."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from .writer import EARLY

__all__ = ["Argument", "Kernel", "cuda_source", "lower", "text_kept"]

_KEEP_TEXT = "TVM_COMPILE_FORCE_FALLBACK"
"""Environment variable that has TVM keep CUDA C++ text even where there is a driver."""


@dataclass(frozen=True)
class Argument:
    """One parameter of a PrimFunc: a tensor's name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One launch; :meth:`of_json` reads what ``dataclasses.asdict`` made.

    Parameters
    ----------
    name
        Name of the ``__global__`` function.
    parameters
        For each of its parameters, which one of the PrimFunc's it is.
    grid
        Blocks along x, y and z.
    threads
        Threads of a block along x.
    shared_bytes
        Dynamic shared memory.
    arguments
        The PrimFunc's parameters, in its order.
    early
        Those of them that are constants, and read before launches before this one have ended.
    """

    name: str
    parameters: tuple[int, ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Argument, ...] = ()
    early: tuple[int, ...] = ()

    @staticmethod
    def of_json(fields: Mapping[str, Any]) -> Kernel:
        """Return a kernel of its fields."""
        arguments = tuple(Argument(a["name"], a["dtype"], tuple(a["shape"]))
                          for a in fields["arguments"])
        x, y, z = fields["grid"]
        return Kernel(fields["name"], tuple(fields["parameters"]), (x, y, z), fields["threads"],
                      fields["shared_bytes"], arguments, tuple(fields.get("early", ())))


@contextmanager
def text_kept() -> Iterator[None]:
    """Have TVM keep kernels as text for a while, though it may find a GPU to compile them for."""
    before = os.environ.get(_KEEP_TEXT)
    os.environ[_KEEP_TEXT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KEEP_TEXT]
        else:
            os.environ[_KEEP_TEXT] = before


def lower(
    funcs: Mapping[str, tirx.PrimFunc], target: tvm.target.Target
) -> tuple[str, dict[str, Kernel]]:
    """Return the CUDA C++ text of kernels, and how each of them is launched.

    Parameters
    ----------
    funcs
        PrimFuncs by name, of one launch each.
    target
        A CUDA target with a host.

    Raises
    ------
    ValueError
        A PrimFunc is not one launch, two of its parameters have the same name, or one has more
        elements than an int32 counts, as places in tensors are.
    """
    module = tvm.IRModule({name: func.with_attr("global_symbol", name)
                           for name, func in funcs.items()})
    pipeline, _, finalize_device = tirx.get_default_tir_pipeline(target)
    module = pipeline(tirx.transform.BindTarget(target)(module))
    module = tirx.transform.Filter(lambda func: func.attrs["target"].kind.name == "cuda")(module)
    module = finalize_device()(module)
    by_name = {var.name_hint: func for var, func in module.functions.items()}
    kernels = {name: _kernel(name, func, by_name) for name, func in funcs.items()}
    if len(by_name) != len(funcs):
        raise ValueError(f"kernels of several launches: {', '.join(sorted(by_name))}")
    build = tvm_ffi.get_global_func("target.build.cuda")
    with text_kept():
        source = str(build(module, target).inspect_source())
    return source, kernels


def cuda_source(funcs: Mapping[str, tirx.PrimFunc], target: tvm.target.Target) -> str:
    """Return the CUDA C++ text of kernels; see :func:`lower`."""
    return lower(funcs, target)[0]


def _kernel(name: str, func: tirx.PrimFunc, lowered: Mapping[str, tirx.PrimFunc]) -> Kernel:
    kernel = f"{name}_kernel"
    if kernel not in lowered:
        raise ValueError(f"{name} is not a CUDA kernel: nothing in it is bound to threads")
    names = [str(param.name) for param in func.params]
    if len(set(names)) != len(names):
        raise ValueError(f"parameters of {name} have the same name: {', '.join(names)}")
    order = tuple(names.index(str(param.name).removesuffix("_ptr"))
                  for param in lowered[kernel].params)
    extents: dict[str, int] = {}
    shared: list[int] = []
    _launch(lowered[kernel].body, extents, shared)
    grid = tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz")
    if any(extents.get(f"threadIdx.{axis}", 1) != 1 for axis in "yz"):
        raise ValueError(f"{name} has threads along more than x")
    arguments = tuple(Argument(str(param.name), str(param.dtype),
                               tuple(int(extent) for extent in param.shape))
                      for param in func.params)
    for argument in arguments:
        size = math.prod(argument.shape)
        if size >= 2**31:
            raise ValueError(f"{name}: {argument.name} has {size} elements, more than {2**31 - 1}: "
                             "take a smaller batch")
    return Kernel(kernel, order, (grid[0], grid[1], grid[2]), extents.get("threadIdx.x", 1),
                  sum(shared), arguments, tuple(map(int, func.attrs.get(EARLY, ()))))


def _launch(statement: Any, extents: dict[str, int], shared: list[int]) -> None:
    """Collect thread extents and sizes of dynamic shared memory."""
    if isinstance(statement, tirx.AttrStmt) and statement.attr_key == "thread_extent":
        extents[str(statement.node.thread_tag)] = int(statement.value)
    if isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "shared.dyn":
        dtype = tvm.DataType(statement.buffer.dtype)
        size = dtype.bits * dtype.lanes // 8
        for extent in statement.buffer.shape:
            size *= int(extent)
        shared.append(size)
    for field in ("body", "then_case", "else_case"):
        inner = getattr(statement, field, None)
        if inner is not None:
            _launch(inner, extents, shared)
    for inner in statement.seq if isinstance(statement, tirx.SeqStmt) else ():
        _launch(inner, extents, shared)
