"""Which codes a site takes: dtype by who reads it, scale by an observer.

int16 costs nothing where no matrix product reads the codes (residual stream, scores, what goes into
GELU or LayerNorm, the logits): there it is always taken. What a product reads is int8: symmetric if
the other operand is an activation, asymmetric if it is a weight.
"""

from __future__ import annotations

import math
from enum import Enum

import torch

from tvm_vitq.calibration.observers import OBSERVERS
from tvm_vitq.calibration.statistics import ChannelStatistics
from tvm_vitq.quantizers.draft import Quantizer
from tvm_vitq.quantizers.links import Links
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.structure import GELU, SOFTMAX, Site

__all__ = ["HEADROOM", "Form", "form_of", "propose", "wide"]

HEADROOM = 1.25
"""int16 ranges are this much wider than what was seen: the codes are fine enough."""


class Form(Enum):
    """Kinds of activation codes."""

    STREAM = "int16, power-of-two scale"
    WIDE = "int16"
    PROBABILITY = "of [0, 1]"
    PRODUCT = "int8 symmetric"
    LINEAR = "int8 asymmetric"


def form_of(site: Site, links: Links, recipe: Recipe) -> Form:
    """Return the form of the codes of a site."""
    if site.kind in ("residual", "embed"):
        return Form.STREAM
    steps = [links.program.steps[i] for i in links.readers_of(site.slot)[0]]
    products = [s for s in steps if s.op == "matmul"]
    if site.kind == "softmax":
        return Form.PROBABILITY
    if any(all(s.lifted) for s in products):
        return Form.PRODUCT
    if products:
        return Form.LINEAR
    if any(s.op in GELU for s in steps) and not recipe.wide_gelu:
        return Form.LINEAR
    if any(s.op in SOFTMAX for s in steps):
        return Form.WIDE
    return Form.WIDE


def wide(statistics: ChannelStatistics) -> Quantizer:
    """int16 codes with headroom."""
    lo, hi = statistics.bounds
    return Quantizer.symmetric(max(abs(lo), abs(hi)) * HEADROOM, "int16")


def propose(form: Form, statistics: ChannelStatistics, recipe: Recipe) -> dict[str, Quantizer]:
    """Return the quantizers worth trying for a site, by the name of their observer."""
    lo, hi = statistics.bounds
    peak = max(abs(lo), abs(hi), 1e-12)
    if form is Form.STREAM:
        step = 2.0 ** math.ceil(math.log2(peak * HEADROOM / 32767.0))
        return {"stream": Quantizer(step, 0, "int16")}
    if form is Form.WIDE:
        return {"wide": wide(statistics)}
    if form is Form.PROBABILITY:
        if recipe.probabilities == "int16":
            return {"probability": Quantizer(2.0**-15, 0, "int16")}
        return {"probability": Quantizer(float(torch.tensor(1.0 / 255.0)), 0, "uint8")}
    symmetric = form is Form.PRODUCT
    levels = 254 if symmetric else 255
    names = tuple(OBSERVERS) if recipe.observer == "search" else (recipe.observer,)
    found: dict[str, Quantizer] = {}
    for name in names:
        lo, hi = OBSERVERS[name](statistics, levels, symmetric)
        quantizer = (
            Quantizer.symmetric(max(abs(lo), abs(hi)), "int8")
            if symmetric
            else Quantizer.asymmetric(lo, hi)
        )
        if quantizer not in found.values():
            found[name] = quantizer
    return found
