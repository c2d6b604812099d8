"""Lets `mkdocs build --strict` pass where griffe cannot follow: `anyflow_kernels.__all__` takes names from a tuple."""

from __future__ import annotations

import logging
from typing import Any


def on_startup(**_: Any) -> None:
    """Called by mkdocs."""
    logging.getLogger("mkdocs.plugins.griffe").addFilter(lambda record: "Unsupported item" not in record.getMessage())
