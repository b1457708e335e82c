"""What an artefact for a GPU says of its kernels: registers, launches, and that none has floats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax, tirx

from relay_passes.errors import VitqError
from schedules.operands import linear_shape, product

from .disassemble import BOUNDARY_KERNELS

__all__ = ["Launches", "check_ptx", "count_launches", "describe_gpu_kernels", "float_mnemonics",
           "products_of"]

_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+(?:::\w+)?)+)", re.MULTILINE)
_FLOAT = re.compile(r"\.(?:f16|f16x2|bf16|bf16x2|tf32|f32|f32x2|f64|e4m3x2|e5m2x2)\b")
_PRODUCTS = ("wgmma", "mma.sync", "dp4a")
_BLOCK = re.compile(r"^(.*?blocks_\d+)_")
_BOUNDARY = re.compile(rf"^(?:{'|'.join(BOUNDARY_KERNELS)})\d*$")


def float_mnemonics(ptx: str) -> Counter[str]:
    """Count the instructions of a PTX text that have a floating-point type, by mnemonic."""
    return Counter(name for name in _INSTRUCTION.findall(ptx) if _FLOAT.search(name))


def check_ptx(kernels: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Check that no kernel but the boundary's has a floating-point instruction.

    Parameters
    ----------
    kernels
        PTX text by the name of its ``__global__`` function.

    Returns
    -------
    dict
        The boundary kernels' floating-point instructions: ``{kernel: {mnemonic: count}}``.

    Raises
    ------
    VitqError
        Naming the first other kernel that has one.
    """
    found = {}
    for name, text in kernels.items():
        counts = float_mnemonics(text)
        if counts and not _BOUNDARY.match(name.removesuffix("_kernel")):
            raise VitqError(
                f"{name}: has {min(counts)} in its PTX; only vitq.quantize and vitq.dequantize "
                "may hold floats, a defect of tvm-vitq"
            )
        if counts:
            found[name] = dict(counts)
    return found


def products_of(kernels: Mapping[str, str]) -> dict[str, str]:
    """Return the instruction that multiplies, by the name of a kernel's ``__global__`` function.

    Kernels without one are left out.

    Parameters
    ----------
    kernels
        PTX text by that name.
    """
    found = {name: next((one for one in _PRODUCTS if one in text), "")
             for name, text in kernels.items()}
    return {name: one for name, one in found.items() if one}


def describe_gpu_kernels(
    mod: tvm.IRModule, resources: Mapping[str, Any], plans: Mapping[str, Any],
    products: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Describe the kernels of a VM-ready module.

    Parameters
    ----------
    mod
        With scheduled PrimFuncs.
    resources
        What each takes, by the name of its ``__global__`` function.
    plans
        Those that ``MatmulPlans`` kept.
    products
        What :func:`products_of` told.

    Returns
    -------
    dict
        Symbol -> ``op`` (of a group: its members' joined by ``+``), ``registers`` of a thread, and
        ``local_bytes``: what it keeps in device memory for want of registers; ``products``, the
        instruction that multiplies, of matmuls and attention. Of matmuls by weights
        also ``shape`` (``[M, N, K]``; of several side by side, N is that of all) and ``macs``.
    """
    kernels = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = gvar.name_hint
        operator = str(func.attrs.get("vitq.op", "")) or name.rstrip("0123456789_")
        entry: dict[str, Any] = {"op": operator.replace("packed_", "")}
        if f"{name}_kernel" in resources:
            taken = resources[f"{name}_kernel"]
            entry["registers"] = taken.registers
            entry["local_bytes"] = taken.stack + taken.spill_stores + taken.spill_loads
        if f"{name}_kernel" in products:
            entry["products"] = products[f"{name}_kernel"]
        shape = [int(extent) for extent in func.attrs.get("vitq.shape", ())]
        plan = plans.get(name)
        if plan is not None and "linear" in plan.kind:
            shape = list(linear_shape(func.params, plan.gather))
        if shape:
            entry |= {"shape": shape, "macs": product(shape)}
        kernels[name] = entry
    return kernels


def count_launches(mod: tvm.IRModule) -> dict[str, Any]:
    """Count the kernel launches of ``main_codes``, all of them and those of transformer blocks.

    Blocks are told apart by the names that timm gives their layers: a launch whose result has such
    a name begins or continues its block, one with a name of no layer belongs to the block before.

    Parameters
    ----------
    mod
        With kernels grouped, and layout operators that are views already.

    Returns
    -------
    dict
        ``total``; ``blocks``, how many blocks there are; ``per_block``, the launches of the
        largest, and ``typical``, those of most blocks (None where layers have other names).
    """
    total, current = 0, ""
    blocks: Counter[str] = Counter()
    for part in mod["main_codes"].body.blocks:
        for binding in part.bindings:
            value = binding.value
            if not isinstance(value, relax.Call) or getattr(value.op, "name", "") != (
                    "relax.call_tir"):
                continue
            total += 1
            name = binding.var.name
            match = _BLOCK.match(name)
            if match:
                current = match[1]
            elif not re.match(r"(lv|linears|attention)\d*", name):
                current = ""
            if current:
                blocks[current] += 1
    typical = Counter(blocks.values()).most_common(1)
    return {"total": total, "blocks": len(blocks),
            "per_block": max(blocks.values()) if blocks else None,
            "typical": typical[0][0] if typical else None}


@tvm.instrument.pass_instrument
class Launches:
    """A pass instrument that counts launches, :func:`count_launches`, once kernels are grouped."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {}

    def run_before_pass(self, mod: tvm.IRModule, info: Any) -> None:
        """Count just before the kernels are made."""
        if info.name == "vitq.ApplySchedules":
            self.counts = count_launches(mod)
