"""GPU code of whole modules: from Relax's build to a shared library, on machines without a GPU.

Where TVM finds no driver its CUDA code generation leaves the C++ text in the module, to be compiled
when the library is loaded; where it finds one it compiles at once, with options of its own. Here it
is the same on both: within :func:`cuda_build` the text stays, and :meth:`CudaBuild.pack`, given to
``export_library``, has nvcc compile it and puts machine code into the library instead::

    with cuda_build(target) as build:
        executable = relax.build(mod, target, ...)
        executable.export_library(path, fpack_imports=build.pack)
    build.resources["fused_dense_kernel"].registers
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from .lower import cuda_source, text_kept
from .nvcc import Resources, compile_cuda, find_nvcc, ptx, resource_report, sass
from .overlap import overlapping, packed_text
from .target import is_hopper

__all__ = ["CudaBuild", "compile_cuda", "cuda_build", "cuda_source", "find_nvcc", "ptx",
           "resource_report", "sass"]


class CudaBuild:
    """One build's GPU code.

    Attributes
    ----------
    source
        CUDA C++ text, "" before :meth:`pack`.
    resources
        What each kernel takes, by name.
    """

    def __init__(self, arch: str) -> None:
        self.source = ""
        self.resources: dict[str, Resources] = {}
        self._arch = arch
        self._binary = b""

    def compile(self, source: str) -> bytes:
        """Return the machine code of CUDA C++ text; errors as of :func:`compile_cuda`.

        The text compiled last is not compiled again, nor with its parts in another order.
        """
        if _text(source) != _text(self.source):
            self._binary, self.resources = compile_cuda(source, self._arch)
            self.source = source
        return self._binary

    def pack(self, module: Any, is_system_lib: bool, prefix: str, workspace: str) -> str:
        """Write a library's imported modules as a C++ compiler's input; see ``export_library``.

        Raises
        ------
        ValueError
            nvcc is missing, or refuses the text.
        """
        assert not is_system_lib, "a library with GPU code cannot be linked statically"
        blob = _blob(module)
        for source in _sources(module):
            blob = _replaced(blob, source.encode(), self.compile(source), is_hopper(self._arch))
        folder = Path(workspace)
        (folder / "imports.bin").write_bytes(len(blob).to_bytes(8, "little") + blob)
        symbol = tvm_ffi.get_global_func("runtime.ModuleImportsBlobName")()
        out = folder / "imports.s"
        out.write_text(f'.section .rodata\n.globl {prefix}{symbol}\n.balign 16\n{prefix}{symbol}:\n'
                       f'.incbin "{folder / "imports.bin"}"\n'
                       '.section .note.GNU-stack,"",%progbits\n')
        return str(out)


@contextmanager
def cuda_build(
    target: tvm.target.Target, build: CudaBuild | None = None
) -> Iterator[CudaBuild]:
    """Build CUDA code as this module's docstring says; other targets are not touched by it.

    Parameters
    ----------
    target
        A CUDA target.
    build
        One that has compiled the kernels' text already, if there is one.
    """
    with text_kept():
        yield build or CudaBuild(str(target.attrs["arch"]))


def _text(source: str) -> tuple[list[str], list[str]]:
    """Return the lines before the first kernel, and the kernels, both sorted.

    TVM writes kernels, and the functions that they call, in an order that differs between times.
    """
    functions, *kernels = source.split('extern "C" __global__')
    return sorted(functions.splitlines()), sorted(kernel.strip() for kernel in kernels)


def _blob(module: Any) -> bytes:
    tensor = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)
    return bytes(tensor.numpy().tobytes())[8:]  # after its length


def _sources(module: Any) -> Iterator[str]:
    """Yield the text of every CUDA module that is still text."""
    for imported in module.imports:
        if imported.kind == "cuda" and imported.inspect_source("cuda"):
            yield str(imported.inspect_source("cuda"))
        yield from _sources(imported)


def _replaced(blob: bytes, source: bytes, binary: bytes, overlap: bool) -> bytes:
    """Return packed modules with the text of one of them replaced by machine code.

    With ``overlap`` its launches overlap.

    A module is stored as its length and then three fields: the format, the functions' names and
    launch parameters, and the code; a string is its length and its bytes, lengths 8 bytes each.
    """
    head, tail = packed_text(b"cuda"), packed_text(source)
    end = blob.index(tail) + len(tail)
    begin = blob.rindex(head, 0, end - len(tail))
    # The module's kind is such a string, too: its format is the one that the length leads to.
    while int.from_bytes(blob[begin - 8:begin], "little") != end - begin:
        begin = blob.rindex(head, 0, begin)
    functions = blob[begin + len(head):end - len(tail)]
    if overlap:
        functions = overlapping(functions)
    payload = packed_text(b"fatbin") + functions + packed_text(binary)
    return blob[:begin - 8] + packed_text(payload) + blob[end:]
