"""The little of the ELF format that tells an artefact from a foreign or damaged file before dlopen.

``dlopen`` maps a truncated library without complaint and the process then dies on the first touched
page, and it runs the constructors of any library it is given. So the file is read here first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from relay_passes.errors import VitqError
from schedules.host import host_architecture

__all__ = [
    "LIBRARY_SYMBOL",
    "MACHINES",
    "METADATA_FORMAT",
    "ElfFile",
    "check_artifact_file",
    "host_machine",
    "read_artifact",
    "read_elf",
]

MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
"""ELF machine numbers of the architectures that TVM's LLVM builds for."""

METADATA_FORMAT = 1
"""Version of the artefact's format: raised when a reader of the old form would misread the new."""

LIBRARY_SYMBOL = "__tvm_ffi__library_bin"
_KERNEL_PREFIX = "__tvm_ffi_vitq_"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM, _SHT_NOBITS, _ET_DYN = 11, 8, 3


@dataclass(frozen=True)
class ElfFile:
    """What was read of a shared library.

    Attributes
    ----------
    machine
        Architecture, as in :data:`MACHINES`.
    symbols
        Names of the dynamic symbols that the file defines.
    """

    machine: str
    symbols: frozenset[str]


def host_machine() -> str:
    """Return this machine's architecture, in the words of :data:`MACHINES`."""
    return host_architecture()


def read_elf(path: str | Path) -> ElfFile:
    """Read a 64-bit little-endian shared library's headers and dynamic symbols.

    Raises
    ------
    VitqError
        If the file cannot be read, is no shared library, or ends before its own headers say.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as why:
        raise VitqError(f"cannot read {path}: {why.strerror}") from why
    foreign = VitqError(f"{path} is not a shared library; expected what 'tvm-vitq compile' wrote")
    cut = VitqError(f"{path} is truncated; copy it again or compile it again")
    if data[:4] != b"\x7fELF"[: len(data)] or not data:
        raise foreign
    if len(data) < _HEADER.size:
        raise cut
    if data[4:6] != b"\x02\x01":
        raise VitqError(f"{path} is not a 64-bit little-endian shared library")
    head = _HEADER.unpack_from(data)
    kind, machine, table, size, count = head[1], head[2], head[6], head[11], head[12]
    if kind != _ET_DYN or size != _SECTION.size:
        raise foreign
    if table + size * count > len(data):
        raise cut
    sections = [_SECTION.unpack_from(data, table + size * i) for i in range(count)]
    if any(s[1] != _SHT_NOBITS and s[4] + s[5] > len(data) for s in sections):
        raise cut
    names: set[str] = set()
    for section in sections:
        if section[1] == _SHT_DYNSYM and section[6] < count:
            strings = sections[section[6]]
            names |= _defined(data, section, data[strings[4] : strings[4] + strings[5]])
    return ElfFile(MACHINES.get(machine, f"machine {machine}"), frozenset(names))


def _defined(data: bytes, section: tuple[int, ...], strings: bytes) -> set[str]:
    found = set()
    for offset in range(section[4], section[4] + section[5] - _SYMBOL.size + 1, _SYMBOL.size):
        name, _info, _other, where, _value, _size = _SYMBOL.unpack_from(data, offset)
        if where:
            found.add(strings[name : strings.find(b"\0", name)].decode("utf-8", "replace"))
    return found


def read_artifact(path: str | Path) -> ElfFile:
    """Read an artefact's headers, whatever its architecture.

    Raises
    ------
    VitqError
        As :func:`read_elf`, or if the library is not ours.
    """
    elf = read_elf(path)
    if LIBRARY_SYMBOL not in elf.symbols or not any(
        name.startswith(_KERNEL_PREFIX) for name in elf.symbols
    ):
        raise VitqError(
            f"{path} is a shared library, but not one of tvm-vitq; "
            "expected what 'tvm-vitq compile' wrote"
        )
    return elf


def check_artifact_file(path: str | Path) -> ElfFile:
    """Refuse a file that is not an artefact for this machine, without loading it.

    Raises
    ------
    VitqError
        As :func:`read_artifact`, or if the library is for another architecture.
    """
    elf = read_artifact(path)
    if elf.machine != host_machine():
        raise VitqError(
            f"{path} was built for {elf.machine} and this machine is {host_machine()}; run it "
            f"there, replay it with 'tvm-vitq verify --with qemu-{elf.machine}', give verify or "
            "bench a board with --rpc, or compile it again with --target native"
        )
    return elf
