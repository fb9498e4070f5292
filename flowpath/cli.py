"""The command line: one subcommand a verb, each a thin door to a function of the library.

What a command needs is imported when it runs, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
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
    for add in (_add_fit, _add_sample, _add_score, _add_check, _add_demo, _add_doctor):
        add(commands)
    return top


def _add_fit(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser(
        "fit",
        help="fit a flow to a table",
        description=(
            "Fit a flow to the columns of a .csv, .csv.gz, .parquet or .npy table and judge it on rows it did not see. "
            "Prints the columns first; leaves the estimator, its history, the held-out rows and report.html in --out."
        ),
        epilog="Ctrl-C leaves the best weights and a checkpoint; the same command with --resume goes on.",
    )
    p.add_argument("table", help="the table")
    p.add_argument("--out", required=True, metavar="DIR", help="run folder to make")
    p.add_argument("--columns", metavar="A,B,...", help="columns to fit (default: all but context and weights)")
    p.add_argument("--context", metavar="C,...", help="columns the density is given")
    p.add_argument("--weights", metavar="W", help="column of row weights")
    p.add_argument("--supports", metavar="TOML", help='file of lines such as: z = "positive", n = "integer(0)"')
    p.add_argument("--test", type=float, metavar="SHARE", help="share of rows scored once, at the end")
    p.add_argument(
        "--validation", type=float, default=0.1, metavar="SHARE", help="share to stop early on (%(default)s)"
    )
    p.add_argument("--arch", default="nsf", metavar="NAME", help="nsf, nsf_autoregressive, maf, realnvp, iaf, gaussian")
    p.add_argument("--missing", choices=("error", "drop"), default="error", help="rows with missing values")
    p.add_argument("--at-bound", choices=("error", "nudge"), default="error", help="values exactly on an open bound")
    p.add_argument("--epochs", type=int, metavar="N", help="at most so many passes over the rows")
    p.add_argument("--time-limit", type=float, metavar="S", help="at most so many seconds of training")
    p.add_argument("--device", default="auto", help='"cpu", "cuda", or "auto" (default)')
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    _add_common(p)
    p.set_defaults(run=_of_tables("fit"))


def _add_sample(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser("sample", help="draw rows", description="Draw rows from a run into a new table.")
    p.add_argument("run_folder", metavar="RUN", help="folder that `flowpath fit` made")
    p.add_argument("-n", type=int, default=1000, metavar="N", help="how many rows (default: %(default)s)")
    p.add_argument("--given", nargs="+", metavar="NAME=NUMBER", help="values of the context")
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .csv.gz, .parquet or .npy")
    _add_common(p)
    p.set_defaults(run=_of_tables("sample"))


def _add_score(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser(
        "score", help="score rows", description="Write the log density in nats of each row of a table, in its order."
    )
    p.add_argument("run_folder", metavar="RUN", help="folder that `flowpath fit` made")
    p.add_argument("table", help="the table")
    p.add_argument("--id", metavar="COLUMN", help="column to carry along (default: the row's number)")
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .csv.gz or .parquet")
    _add_common(p)
    p.set_defaults(run=_of_tables("score"))


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    p = commands.add_parser(
        "check",
        help="judge a fit",
        description="Say whether a run is sound and any good, on a table or on the rows held out; write report.html.",
    )
    p.add_argument("run_folder", metavar="RUN", help="folder that `flowpath fit` made")
    p.add_argument("table", nargs="?", help="rows the fit did not see (default: those it held out)")
    _add_common(p)
    p.set_defaults(run=_of_tables("check_run"))


def _add_common(p: Parser) -> None:
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    p.add_argument("--force", action="store_true", help="replace what is there")


def _of_tables(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of flowpath.commands, imported when it runs."""

    def run(args: argparse.Namespace) -> None:
        from flowpath import commands

        args.run = getattr(args, "run_folder", None)
        getattr(commands, name)(args)

    return run


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
