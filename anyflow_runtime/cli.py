"""The command `anyflow`.

Exit codes: 0 done; 1 the command ran and found a failure (`verify`); 2 bad input or a machine that cannot do it, one
line on stderr; 130 interrupted; 143 terminated (SIGTERM). What is finished when a command is stopped is kept.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .commands import COMMANDS, UsageError, load_command
from .signals import Terminated, terminable
from .threads import settle_threads

_LONGEST_MESSAGE = 600
# What input can cause: our own checks, files, libraries, a full device. Anything else is a defect, with a traceback.
_INPUT_ERRORS = (UsageError, ValueError, TypeError, OSError, RuntimeError, ImportError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of `COMMANDS`. No heavy library is imported for it."""
    parser = _Parser(prog="anyflow", description="Fast kernels and a runtime for AnyFlow video diffusion models.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name in COMMANDS:
        module = load_command(name)
        description = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="on an error, also show the traceback")
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (that of the process if None) and return the exit code."""
    settle_threads()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    program = " ".join(["anyflow", *(name for name in arguments[:1] if name in COMMANDS)])
    try:
        try:
            args = parser.parse_args(arguments)
        except SystemExit as stop:  # argparse has printed the help
            return int(stop.code or 0)
        if args.version:
            from importlib.metadata import version

            print(version("anyflow-kernels"))
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        with terminable():
            return int(args.run(args))
    except Terminated:
        print(f"{program}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except _INPUT_ERRORS as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    if len(message) <= _LONGEST_MESSAGE:
        return message + notes
    return f"{message[:_LONGEST_MESSAGE]} ...{notes} (--debug shows all of it)"


if __name__ == "__main__":
    sys.exit(main())
