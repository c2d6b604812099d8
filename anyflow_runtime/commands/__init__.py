"""The commands of `anyflow`, a module each.

A command module has a docstring, whose first line is its help; `add_arguments(parser)`; and `run(args) -> int`, the
exit code. At import it takes nothing heavy, so that `anyflow --help` is quick. To add a command, add its module and its
name here.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast

COMMANDS = ("generate", "serve", "train", "convert", "verify", "tune", "info", "bench")


class UsageError(Exception):
    """Something the user gave is wrong; the message names it, says what came and what was expected."""


class Command(Protocol):
    """What a command module offers."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def load_command(name: str) -> Command:
    """The module of a command in `COMMANDS`."""
    return cast("Command", importlib.import_module(f".{name}", __name__))
