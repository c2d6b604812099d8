"""What the browser is told of: a request that cannot be met."""

from __future__ import annotations


class RequestError(ValueError):
    """A message of the browser that asks for something that cannot be; the text is shown to the user."""
