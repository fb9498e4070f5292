"""The grammar of the command line: subcommands, flags and their help.

It needs the standard library alone, and what a command needs is imported when it runs, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2

Commands = argparse._SubParsersAction  # of a Parser each


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
    """The whole grammar; every subcommand leaves its function in `act`."""
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


def _command(
    commands: Commands, name: str, act: Callable[[argparse.Namespace], None], title: str, *texts: str, example: str = ""
) -> Parser:
    """A subcommand: its line in the list of commands, what it does, and perhaps more to know and an example."""
    description, *more = map(_text, texts)
    p = commands.add_parser(
        name,
        help=title,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog="\n\n".join([*more, *([f"example:\n  {example}"] if example else [])]),
    )
    p.set_defaults(act=act)
    return p


def _add_fit(commands: Commands) -> None:
    p = _command(
        commands,
        "fit",
        _of_tables("fit"),
        "fit a flow to a table",
        """
        Fit a flow to the columns of a table (.csv, .csv.gz, .parquet or .npy) and judge it on rows it did not see. The
        columns are printed first. Then --out holds the fitted estimator, its history, held-out rows and report.html.
        """,
        """
        Ctrl-C and SIGTERM leave the best weights so far and a checkpoint; the same command with --resume goes on. A
        supports file has a line a column, such as: z = "positive", n_det = "integer(0)", p = "interval(0, 1)"; the
        words are real, positive, interval(a, b), above(a), below(b), integer(lo, hi), lattice(step, offset).
        """,
        example="flowpath fit stars.parquet --columns mag,colour --context z --test 0.1 --out run",
    )
    p.add_argument("table", metavar="TABLE", help="file to read")
    p.add_argument("--out", required=True, metavar="DIR", help="run folder to make")
    rows = p.add_argument_group("columns and rows")
    rows.add_argument("--columns", metavar="A,B", help="columns to fit (default: all but those of the next two)")
    rows.add_argument("--context", metavar="C,D", help="columns that the density is conditional on")
    rows.add_argument("--weights", metavar="W", help="column of row weights")
    rows.add_argument("--supports", metavar="TOML", help="where values can lie (default: any number, every column)")
    _add_missing(rows, "error")
    rows.add_argument(
        "--at-bound", choices=("error", "nudge"), default="error", help="values on an open bound (default: error)"
    )
    rows.add_argument(
        "--validation", type=_share, default=0.1, metavar="SHARE", help="of rows that choose the weights (default: 0.1)"
    )
    rows.add_argument("--test", type=_share, metavar="SHARE", help="of rows scored once, at the end (default: none)")
    how = p.add_argument_group("training")
    how.add_argument(
        "--arch", default="nsf", metavar="NAME", help="nsf (default), nsf_autoregressive, maf, realnvp, iaf, gaussian"
    )
    how.add_argument("--epochs", type=_count, metavar="N", help="at most so many passes over the rows")
    how.add_argument("--time-limit", type=_seconds, metavar="S", help="at most so many seconds of training")
    how.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    _add_common(p, device="auto")


def _add_sample(commands: Commands) -> None:
    p = _command(
        commands,
        "sample",
        _of_tables("sample"),
        "draw rows",
        "Draw rows from a run into a new table, in the columns and units of the fit.",
        example="flowpath sample run -n 100000 --given z=0.5 --out mock.parquet",
    )
    _add_run(p)
    p.add_argument("-n", type=_count, metavar="N", help="how many rows (default: 1000, or one a row of --given FILE)")
    p.add_argument(
        "--given",
        nargs="+",
        action="extend",
        metavar="NAME=NUMBER",
        help="the context: a number for each of its columns, or a table with a row for each draw",
    )
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .csv.gz, .parquet or .npy")
    _add_common(p)


def _add_score(commands: Commands) -> None:
    p = _command(
        commands,
        "score",
        _of_tables("score"),
        "score rows",
        """
        Write the log density of each row of a table, in its order: nats, in the units of the columns, times probability
        mass for integers and lattices. Rows outside the supports score -inf, rows that miss a value NaN (with --missing
        drop).
        """,
        example="flowpath score run new.csv --id object --out scores.csv",
    )
    _add_run(p)
    p.add_argument("table", metavar="TABLE", help="file to read")
    p.add_argument("--id", metavar="COLUMN", help="column to carry along (default: the row's number, from 0)")
    _add_missing(p, None)
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .csv.gz, .parquet or .npy")
    _add_common(p)


def _add_check(commands: Commands) -> None:
    p = _command(
        commands,
        "check",
        _of_tables("check_run"),
        "judge a fit",
        "Say whether a run is sound and any good, on a table or on the rows held out; write report.html.",
        example="flowpath check run new.csv --out verdict",
    )
    _add_run(p)
    p.add_argument("table", nargs="?", metavar="TABLE", help="rows the fit did not see (default: those it held out)")
    _add_missing(p, None)
    p.add_argument("--out", metavar="DIR", help="folder to make (default: check, check-2, ... in the run)")
    _add_common(p)


def _add_run(p: Parser) -> None:
    p.add_argument("run", metavar="RUN", help="folder that flowpath fit made")


def _add_missing(p: argparse._ActionsContainer, default: str | None) -> None:
    said = default or "as in the fit"
    p.add_argument("--missing", choices=("error", "drop"), default=default, help=f"rows that miss a value ({said})")


def _add_common(p: Parser, device: str = "cpu") -> None:
    p.add_argument("--device", default=device, metavar="NAME", help="cpu, cuda, cuda:1 or auto (default: %(default)s)")
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of everything random (default: 0)")
    p.add_argument("--force", action="store_true", help="replace what is there")


def _count(word: str) -> int:
    return int(_within(word, "a whole number above 0", lambda v: v >= 1 and v.is_integer()))


def _seed(word: str) -> int:
    return int(_within(word, "a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32 and v.is_integer()))


def _share(word: str) -> float:
    return _within(word, "a share of the rows, from 0 to below 1", lambda v: 0 <= v < 1)


def _seconds(word: str) -> float:
    return _within(word, "seconds above 0", lambda v: 0 < v < float("inf"))


def _within(word: str, want: str, right: Callable[[float], bool]) -> float:
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not right(value):
        raise argparse.ArgumentTypeError(f"expected {want}, got {word!r}")
    return value


def _text(block: str) -> str:
    return textwrap.fill(" ".join(block.split()), 79)


def _of_tables(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of flowpath.commands, imported when it runs."""

    def act(args: argparse.Namespace) -> None:
        from flowpath import commands

        getattr(commands, name)(args)

    return act


def _add_demo(commands: Commands) -> None:
    p = _command(
        commands,
        "demo",
        _demo,
        "fit three flows and show how good they are",
        """
        Fit a spline flow to draws of a known density and to a real table that ships with scikit-learn. Compare it, on
        rows the fit never saw, with a full Gaussian and a Gaussian mixture. Then fit the posterior of a Pyro model,
        eight schools. Takes up to five minutes on two cores.
        """,
        "--out then holds a run, as flowpath fit leaves one, which flowpath sample, score and check take.",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for flow, samples.csv, scores.csv, report.html and the figures (default: %(default)s)",
    )
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of data, fit and samples (default: 0)")
    p.add_argument("--quick", action="store_true", help="a few seconds of training: shows the steps, proves nothing")
    p.add_argument("--force", action="store_true", help="replace what is there")


def _add_doctor(commands: Commands) -> None:
    _command(
        commands,
        "doctor",
        _doctor,
        "report versions, devices, threads, compiler and extras",
        "Report what flowpath finds on this machine. Paste it into a bug report.",
    )


def _demo(args: argparse.Namespace) -> None:
    from flowpath import demo

    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise FileExistsError(f"--out {args.out} holds files already: pass --force to replace them, or another --out")
    demo.main(args.out, seed=args.seed, quick=args.quick)


def _doctor(_: argparse.Namespace) -> None:
    from flowpath import doctor

    print(doctor.report())
