"""Canonicalisation: whatever the importers produce becomes one small set of operators.

``canonicalize(mod)`` folds constants, splits fused projections, folds LayerScale, merges attention
scales, brings layouts into one normal form and moves them away from the residual additions, so
that the passes after it see the same module whether a model came from timm, torch.export or ONNX.
Each file of this folder holds one family of rules as a table with a reason per rule.
"""

from __future__ import annotations

from .check import check_canonical
from .driver import Canonicalize, canonicalize

__all__ = ["Canonicalize", "canonicalize", "check_canonical"]
