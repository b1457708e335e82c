"""From the canonical float module to the quantize/dequantize form.

Data flow: ``structure`` reads the module (sites, linears), ``links`` finds what may be rescaled
without changing the function, ``units`` cuts the network at its residual adds; then, unit by unit,
``equalize`` chooses the rescalings, ``ranges`` the activation quantizers, ``weights`` the int8
codes, ``correction`` the biases; ``mixed`` spends the 16-bit budget; ``emit`` writes the new module.
"""

from __future__ import annotations

from tvm_vitq.quantizers.driver import quantize
from tvm_vitq.quantizers.recipe import PRESETS, Recipe, preset

__all__ = ["PRESETS", "Recipe", "preset", "quantize"]
