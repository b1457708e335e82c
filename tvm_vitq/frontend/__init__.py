"""Three ways in, one canonical form out.

``load_model`` takes a timm name or a factory ``package.module:function``, a ``.pt2`` from
``torch.export``, or an ``.onnx`` file, and returns the canonical float module with the model's
description in the attribute ``vitq.model``. torch, timm and onnx are imported where
they are needed.
"""

from __future__ import annotations
