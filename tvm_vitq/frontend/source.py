"""What a front end hands over: an imported Relax module and what is known of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm

__all__ = ["Imported"]


@dataclass
class Imported:
    """Result of a front end, before canonicalisation.

    Parameters
    ----------
    mod : tvm.IRModule
        What TVM's importer made of the model.
    name : str
        Name of the model, for reports.
    names : dict
        Function argument -> parameter name in the model.
    constants : dict
        Digest of a constant's content -> parameter name, where the importer keeps no argument.
    preprocess : dict
        Preprocessing that the model itself declares (may be empty).
    labels : list of str, optional
        Class names that the model itself declares.
    factory : dict
        How to build the float model again.
    """

    mod: tvm.IRModule
    name: str
    names: dict[str, str] = field(default_factory=dict)
    constants: dict[bytes, str] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    factory: dict[str, Any] = field(default_factory=dict)
