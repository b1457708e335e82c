"""From the canonical float module to the quantize/dequantize form.

Data flow: ``structure`` reads the module (sites, linears), ``links`` finds what may be rescaled
without changing the function, ``units`` cuts the network at its residual adds, ``importance`` says
how much the logits depend on what. Then, unit by unit, ``observe`` records statistics and
``search`` chooses rescalings (``equalize``) and activation quantizers (``ranges``); ``mixed``
spends the 16-bit budget; ``finish`` rounds the weights (``weights``) and corrects the biases;
``emit`` writes the new module. ``draft`` is the network on its way.
"""

from __future__ import annotations

from tvm_vitq.quantizers.driver import quantize
from tvm_vitq.quantizers.recipe import PRESETS, Recipe, preset

__all__ = ["PRESETS", "Recipe", "preset", "quantize"]
