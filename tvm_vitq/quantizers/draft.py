"""The quantized network while it is being made: constants, quantizers, weight codes; simulation.

A draft starts equal to the float network. Rescalings replace its float constants, ranges give its
sites quantizers, rounding gives its linears int8 codes. Executing a draft executes the quantized
network as far as it has been decided, in float arithmetic that follows the integer contract.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from tvm_vitq.quantizers.structure import Linear, Structure
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.reference.float_interpreter import Program, Step, code_range, fake_quantize

__all__ = ["CHUNK", "Draft", "Quantizer", "WeightCodes"]

CHUNK = 8
"""Images that are executed at once."""


@dataclass(frozen=True)
class Quantizer:
    """Activation quantizer: ``q = clamp(floor(x / scale + 0.5) + zero_point)``; float32 scale."""

    scale: float
    zero_point: int
    dtype: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` after one trip through the codes."""
        return fake_quantize(x, self.scale, self.zero_point, self.dtype)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest real value that has a code."""
        lo, hi = code_range(self.dtype, self.zero_point)
        return (lo - self.zero_point) * self.scale, (hi - self.zero_point) * self.scale

    @classmethod
    def symmetric(cls, bound: float, dtype: str) -> Quantizer:
        """Zero point 0 and a scale whose largest code is ``bound``."""
        return cls(_scale(bound, float(np.iinfo(dtype).max)), 0, dtype)

    @classmethod
    def asymmetric(cls, lo: float, hi: float, dtype: str = "int8") -> Quantizer:
        """Codes of the whole dtype for [lo, hi], which is widened to hold 0 exactly."""
        info = np.iinfo(dtype)
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        scale = _scale(hi - lo, float(info.max) - float(info.min))
        zero_point = int(np.clip(np.floor(info.min - lo / scale + 0.5), info.min, info.max))
        return cls(scale, zero_point, dtype)


def _scale(extent: float, steps: float) -> float:
    """Step that divides ``extent``; a constant channel (extent 0) gets the step 1/steps."""
    extent = extent if np.isfinite(extent) and extent > 1e-20 else 1.0
    return float(np.float32(extent / steps))


@dataclass(frozen=True)
class WeightCodes:
    """int8 codes [K, N] in [-127, 127] and the step of every output channel, float32 [N]."""

    codes: torch.Tensor
    scale: torch.Tensor

    @cached_property
    def real(self) -> torch.Tensor:
        """The weight that the codes stand for."""
        return self.codes.float() * self.scale


@dataclass
class Draft:
    """State of the quantization of one program.

    Attributes
    ----------
    constants : dict of int to torch.Tensor
        Float constants that differ from the program's (after rescaling and bias correction).
    quantizers : dict of int to Quantizer
        By the *group* of the site.
    factors : dict of int to torch.Tensor
        Site of a GELU -> factor of each channel, multiplied before it is quantized.
    weights : dict of int to WeightCodes
        By weight slot.
    extra : dict of int to torch.Tensor
        Result slot of a matmul without bias -> the bias that it was given.
    means : dict of int to torch.Tensor
        Slot that a linear reads -> float32 [K], mean of its float rows.
    """

    structure: Structure
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    quantizers: dict[int, Quantizer] = field(default_factory=dict)
    factors: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: dict[int, WeightCodes] = field(default_factory=dict)
    extra: dict[int, torch.Tensor] = field(default_factory=dict)
    means: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """The float program."""
        return self.structure.program

    def constant(self, slot: int) -> torch.Tensor:
        """Return the present float value of a constant."""
        return self.constants.get(slot, self.program.constants[slot])

    def quantizer(self, site: int) -> Quantizer | None:
        """Return the quantizer of a site, None where it has none yet or one of its own."""
        return self.quantizers.get(self.structure.sites[site].group)

    def set_quantizer(self, site: int, quantizer: Quantizer) -> None:
        """Give a site, and all that shares its scale, a quantizer."""
        self.quantizers[self.structure.sites[site].group] = quantizer

    @property
    def chunk(self) -> int:
        """Lifted chunks that are executed at once."""
        return max(1, CHUNK // self.program.input_shape[0])

    def copy(self) -> Draft:
        """Return a draft that may be changed without changing this one."""
        return Draft(
            self.structure,
            dict(self.constants),
            dict(self.quantizers),
            dict(self.factors),
            dict(self.weights),
            dict(self.extra),
            dict(self.means),
        )

    def bias(self, linear: Linear) -> torch.Tensor:
        """Return the present bias of a linear, float32 [N]."""
        if linear.bias >= 0:
            value = self.constant(linear.bias).reshape(-1)
            columns = self.program.constants[linear.weight].shape[-1]
            return value if value.numel() == columns else value.expand(columns)
        result = self.program.steps[linear.step].out
        columns = self.program.constants[linear.weight].shape[-1]
        return self.extra.get(result, torch.zeros(columns))

    def set_bias(self, linear: Linear, value: torch.Tensor) -> None:
        """Replace the bias of a linear, or give it one."""
        if linear.bias >= 0:
            shape = self.program.constants[linear.bias].shape
            self.constants[linear.bias] = value.reshape(shape) if shape.numel() > 1 else value
        else:
            self.extra[self.program.steps[linear.step].out] = value

    # -- simulation ----------------------------------------------------------------------------
    def values(self) -> dict[int, torch.Tensor]:
        """Constants as the quantized network sees them."""
        out = dict(self.constants)
        out.update({slot: weight.real for slot, weight in self.weights.items()})
        for slot, group in self.structure.concat_constants.items():
            quantizer = self.quantizers.get(group)
            if quantizer is not None:
                out[slot] = quantizer(self.constant(slot))
        return out

    def hook(self, step: Step, result: torch.Tensor) -> torch.Tensor:
        """Add a made bias; quantize the result of a step if it is a site."""
        extra = self.extra.get(step.out)
        if extra is not None:
            result = result + extra
        site = self.structure.sites.get(step.out)
        if site is None:
            return result
        factor = self.factors.get(site.slot)
        if factor is not None:
            result = result * factor
        quantizer = self.quantizers.get(site.group)
        return result if quantizer is None else quantizer(result)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize lifted input images."""
        quantizer = self.quantizer(self.program.input_slot)
        return x if quantizer is None else quantizer(x.float())

    def run_unit(self, unit: Unit, x: torch.Tensor) -> torch.Tensor:
        """Execute one unit on lifted activations ``[n, ...]``, chunk by chunk."""
        values = self.values()
        parts = [
            self.program.execute(
                {unit.source: part},
                start=unit.start,
                stop=unit.stop,
                keep=frozenset({unit.result}),
                hook=self.hook,
                constants=values,
            )[unit.result]
            for part in x.split(self.chunk)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run(self, x: torch.Tensor, units: Iterable[Unit]) -> torch.Tensor:
        """Execute the whole network on images ``[N, ...]``; returns ``[N, classes]``."""
        out = self.enter(self.program.lift(x))
        for unit in units:
            out = self.run_unit(unit, out)
        return out.reshape(-1, *out.shape[2:])[: x.shape[0]]
