"""TVM's runtime through its C interface: ctypes, so any Python will do and nothing is built.

Only what an artefact needs: global functions, functions of a module, tensors that the runtime
allocates. The structures are those of ``tvm/ffi/c_api.h`` of the libraries in the bundle.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CPU", "CUDA", "Handle", "Runtime", "RuntimeFailure"]

CPU, CUDA = 1, 2
"""DLPack's numbers of devices."""

_NONE, _INT, _BOOL, _FLOAT, _POINTER, _DTYPE, _DEVICE, _RAW_STRING = 0, 1, 2, 3, 4, 5, 6, 8
_SMALL_STRING, _OBJECTS, _STRING, _ERROR, _TENSOR = 11, 64, 65, 67, 70
_HEADER = 24
"""Bytes of TVMFFIObject, which every object starts with."""


class RuntimeFailure(Exception):
    """What TVM's runtime said, or why it cannot be loaded."""


class _Any(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("extra", ctypes.c_uint32), ("value", ctypes.c_uint64))


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("dtype", _DataType), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Any), ctypes.c_int32,
                         ctypes.POINTER(_Any))  # fmt: skip
_CODES = {"i": 0, "u": 1, "f": 2}


class Handle:
    """An object of the runtime, released with this."""

    def __init__(self, runtime: Runtime, kind: int, address: int) -> None:
        self.runtime, self.kind, self.address = runtime, kind, address

    def __del__(self) -> None:
        self.runtime.ffi.TVMFFIObjectDecRef(ctypes.c_void_p(self.address))

    def __call__(self, *arguments: Any) -> Any:
        """Call it, if it is a function."""
        return self.runtime.call(self.address, arguments)

    @property
    def _tensor(self) -> _DLTensor:
        if self.kind != _TENSOR:
            raise RuntimeFailure(f"object of kind {self.kind} is no tensor")
        return _DLTensor.from_address(self.address + _HEADER)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a tensor."""
        tensor = self._tensor
        return tuple(int(tensor.shape[i]) for i in range(tensor.ndim))

    @property
    def dtype(self) -> np.dtype:
        """Type of a tensor's elements."""
        found = self._tensor.dtype
        letter = {code: letter for letter, code in _CODES.items()}[found.code]
        return np.dtype(f"{letter}{found.bits // 8}")

    @property
    def data(self) -> int:
        """Address of a tensor's first element, on its device."""
        tensor = self._tensor
        return int(tensor.data or 0) + int(tensor.byte_offset)

    def numpy(self) -> np.ndarray:
        """Copy a tensor to this process's memory; waits for the device."""
        out = np.empty(self.shape, self.dtype)
        self.runtime.function("runtime.TVMTensorCopyToBytes")(
            self, ctypes.c_void_p(out.ctypes.data), out.nbytes)  # fmt: skip
        return out

    def fill(self, values: np.ndarray) -> Handle:
        """Copy ``values`` of the same size and type into a tensor."""
        values = np.ascontiguousarray(values)
        if values.dtype != self.dtype or values.size != np.prod(self.shape):
            raise RuntimeFailure(f"{values.dtype}{list(values.shape)} does not fit "
                                 f"{self.dtype}{list(self.shape)}")  # fmt: skip
        self.runtime.function("runtime.TVMTensorCopyFromBytes")(
            self, ctypes.c_void_p(values.ctypes.data), values.nbytes)  # fmt: skip
        return self


class Runtime:
    """The libraries of a folder.

    Parameters
    ----------
    folder
        Holds ``libtvm_ffi.so``, ``libtvm_runtime.so`` and, for CUDA, ``libtvm_runtime_cuda.so``.
    device
        ``"cuda"`` or ``"cpu"``.

    Raises
    ------
    RuntimeFailure
        If a library, the CUDA runtime or the driver is missing.
    """

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        self.device = CUDA if device == "cuda" else CPU
        names = ["libtvm_ffi.so", "libtvm_runtime.so"]
        if self.device == CUDA:
            _load_cuda_runtime()
            names.append("libtvm_runtime_cuda.so")
        try:
            loaded = [ctypes.CDLL(str(Path(folder) / name), ctypes.RTLD_GLOBAL) for name in names]
        except OSError as why:
            raise RuntimeFailure(str(why)) from why
        self.ffi = loaded[0]
        self._known: dict[str, Handle] = {}

    def function(self, name: str) -> Handle:
        """Return a global function."""
        if name not in self._known:
            address = ctypes.c_void_p()
            self._check(self.ffi.TVMFFIFunctionGetGlobal(
                ctypes.byref(_bytes(name.encode())), ctypes.byref(address)))  # fmt: skip
            if not address.value:
                raise RuntimeFailure(f"the runtime has no function {name}")
            self._known[name] = Handle(self, 68, address.value)
        return self._known[name]

    def load(self, path: Path) -> Handle:
        """Load a library made by ``tvm-vitq compile``."""
        module = self.function("ffi.ModuleLoadFromFile")(str(Path(path).resolve()))
        machine = self.member(module, "vm_load_executable")()
        where = (self.device, 0, 2)
        host = (CPU, 0, 2)
        self.member(machine, "vm_initialization")(*where, *(() if where == host else host))
        return machine  # type: ignore[no-any-return]

    def member(self, module: Handle, name: str) -> Handle:
        """Return a function of a module."""
        found = self.function("ffi.ModuleGetFunction")(module, name, True)
        if found is None:
            raise RuntimeFailure(f"the artefact has no function {name}")
        return found  # type: ignore[no-any-return]

    def tensor(self, values: np.ndarray) -> Handle:
        """Copy an array to the device."""
        shape = self.function("ffi.Shape")(*values.shape)
        allocate = self.function("runtime.TVMTensorAllocWithScope")
        made: Handle = allocate(shape, values.dtype, (self.device, 0), None)
        return made.fill(values)

    def callback(self, function: Callable[[list[Any]], int]) -> Handle:
        """Make a function of the runtime of a Python function from its arguments to an integer.

        Objects among the arguments are left out (None); strings and numbers are given.
        """

        def safe(_self: Any, arguments: Any, count: int, result: Any) -> int:
            result[0] = _Any(_INT, 0, function([self._plain(arguments[i]) for i in range(count)]))
            return 0

        wrapped = _CALL(safe)
        address = ctypes.c_void_p()
        self._check(self.ffi.TVMFFIFunctionCreate(None, wrapped, None, ctypes.byref(address)))
        assert address.value
        handle = Handle(self, 68, address.value)
        handle.keep = wrapped  # type: ignore[attr-defined]
        return handle

    def call(self, function: int, arguments: tuple[Any, ...]) -> Any:
        """Call a function by its address; see :meth:`_pack` for what it takes."""
        packed = (_Any * max(len(arguments), 1))()
        keep = [self._pack(place, value) for place, value in zip(packed, arguments, strict=False)]
        result = _Any()
        self._check(self.ffi.TVMFFIFunctionCall(
            ctypes.c_void_p(function), packed, len(arguments), ctypes.byref(result)))  # fmt: skip
        del keep
        return self._value(result)

    def _pack(self, place: _Any, value: Any) -> Any:
        """Write one argument; return what must live as long as it."""
        if value is None:
            place.kind = _NONE
        elif isinstance(value, Handle):
            place.kind, place.value = value.kind, value.address
        elif isinstance(value, bool):
            place.kind, place.value = _BOOL, int(value)
        elif isinstance(value, (int, np.integer)):
            place.kind, place.value = _INT, int(value) & 0xFFFFFFFFFFFFFFFF
        elif isinstance(value, str):
            text = ctypes.create_string_buffer(value.encode())
            place.kind, place.value = _RAW_STRING, ctypes.addressof(text)
            return text
        elif isinstance(value, ctypes.c_void_p):
            place.kind, place.value = _POINTER, value.value or 0
        elif isinstance(value, np.dtype):
            code, bits = _CODES[value.kind], 8 * value.itemsize
            place.kind, place.value = _DTYPE, code | bits << 8 | 1 << 16
        elif isinstance(value, tuple):
            place.kind, place.value = _DEVICE, value[0] | value[1] << 32
        else:
            raise RuntimeFailure(f"cannot pass a {type(value).__name__} to the runtime")
        return value

    def _value(self, result: _Any) -> Any:
        if result.kind >= _OBJECTS:
            return Handle(self, result.kind, result.value)
        return self._plain(result)

    def _plain(self, found: _Any) -> Any:
        if found.kind in (_INT, _BOOL):
            return ctypes.c_int64(found.value).value
        if found.kind == _RAW_STRING:
            return ctypes.string_at(found.value).decode()
        if found.kind == _SMALL_STRING:
            return found.value.to_bytes(8, sys.byteorder)[: found.extra].decode()
        if found.kind == _STRING:
            text = _Bytes.from_address(found.value + _HEADER)
            return ctypes.string_at(text.data, text.size).decode()
        return None

    def _check(self, status: int) -> None:
        if status == 0:
            return
        address = ctypes.c_void_p()
        self.ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(address))
        if not address.value:
            raise RuntimeFailure(f"TVM's runtime failed with status {status}")
        # TVMFFIErrorCell: kind and message are its first two fields.
        kind, message = (_Bytes * 2).from_address(address.value + _HEADER)
        words = [ctypes.string_at(text.data, text.size).decode(errors="replace")
                 for text in (kind, message)]  # fmt: skip
        self.ffi.TVMFFIObjectDecRef(address)
        raise RuntimeFailure(": ".join(words))


def _bytes(text: bytes) -> _Bytes:
    buffer = ctypes.create_string_buffer(text, len(text))
    made = _Bytes(ctypes.addressof(buffer), len(text))
    made.keep = buffer  # type: ignore[attr-defined]
    return made


def _load_cuda_runtime() -> None:
    """Load ``libcudart.so.13``: that of pip's wheel, the linker's, or the toolkit's."""
    name = "libcudart.so.13"
    # PyTorch's own first: it will be used here, and a process has one.
    places = [found for path in filter(None, sys.path)
              for found in sorted(Path(path).glob(f"nvidia/*/lib/{name}*"))]  # fmt: skip
    places.append(Path(name))
    for folder in ("cuda*/lib64", "cuda*/targets/*/lib"):
        places += sorted(Path("/usr/local").glob(f"{folder}/{name}*"))
    for place in places:
        try:
            ctypes.CDLL(str(place), ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise RuntimeFailure("there is no libcudart.so.13: install CUDA 13's toolkit, or PyTorch for "
                         "CUDA 13 (pip install torch)")  # fmt: skip
