"""The one exception that stands for a mistake in the user's input."""

from __future__ import annotations

__all__ = ["VitqError"]


class VitqError(ValueError):
    """The user's model, data or option cannot be used; one line says why and how to mend it."""
