"""The one exception that stands for a mistake in the user's input."""

from __future__ import annotations

__all__ = ["VitqError"]


class VitqError(ValueError):
    """The user's model, data or option cannot be used; the message is one line that says how to mend it."""
