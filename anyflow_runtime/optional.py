"""Packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, purpose: str, extra: str) -> Any:
    """The module, imported.

    Args:
        purpose: what it is needed for.
        extra: of this package, that installs it.
    Raises:
        ImportError: if it is not there, with the command that installs it.
    """
    try:
        __import__(module)
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL.Image": "Pillow", "av": "PyAV"}.get(module, module)
        cure = f"pip install 'anyflow-kernels[{extra}]'"
        raise ImportError(f"{purpose} needs {package}, which is not installed: {cure} ({error})") from error
