"""The command line: one subcommand a verb, each a thin door to a function of the library.

What a command needs is imported when it runs, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Version(argparse.Action):
    """Prints flowpath's version, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from flowpath import __version__

        print(f"flowpath {__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole grammar; every subcommand leaves its function in `run`."""
    top = Parser(
        prog="flowpath",
        description="Normalizing flows for densities and for pathwise-gradient variational inference.",
        epilog="`flowpath COMMAND --help` explains one command. `python -m flowpath` is the same program.",
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    top.add_argument("--debug", action="store_true", help="on an error show the traceback, for a bug report")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_doctor(commands)
    return top


def _add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser(
        "demo",
        help="fit two flows and show how they compare",
        description=(
            "Fit a spline flow to draws of a known density and to a real table that ships with scikit-learn. "
            "Compare it, on rows the fit never saw, with a full Gaussian and a Gaussian mixture. "
            "Takes up to three minutes on two cores."
        ),
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for flow.safetensors, samples.csv, history.csv and the figures (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data, fit and samples (default: 0)")
    p.add_argument("--quick", action="store_true", help="a few seconds of training: shows the steps, proves nothing")
    p.set_defaults(run=_demo)


def _add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser(
        "doctor",
        help="report versions, devices, threads, compiler and extras",
        description="Report what flowpath finds on this machine. Paste it into a bug report.",
    )
    p.set_defaults(run=_doctor)


def _demo(args: argparse.Namespace) -> None:
    from flowpath import demo

    demo.main(args.out, seed=args.seed, quick=args.quick)


def _doctor(args: argparse.Namespace) -> None:
    from flowpath import doctor

    print(doctor.report())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 2 where the user can mend what went wrong (one line says what), 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("flowpath: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"flowpath: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
