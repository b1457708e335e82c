"""Every device function by name."""

from __future__ import annotations

from .device import DEVICE
from .warpgroup_device import WARPGROUP

__all__ = ["FUNCTIONS"]

FUNCTIONS = {function.name: function for function in (*DEVICE, *WARPGROUP)}
