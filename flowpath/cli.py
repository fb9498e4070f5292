"""The command line: one subcommand a verb, each a thin door to a function of the library."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from flowpath.grammar import USER_ERROR, parser

INTERRUPTED = 128  # and the signal's number: 130 after Ctrl-C, 143 after SIGTERM

# The library speaks of its arguments; here they are flags.
_FLAGS = {
    "FlowDensity.to_cells": "check",
    "FlowDensity.score_samples": "score",
    "FlowDensity.": "",
    "FlowDensity knows no architecture": "--arch: there is no architecture",
    "without resume=": "with --force",
    "pass missing='drop'": "pass --missing drop",
    "at_bound='nudge'": "--at-bound nudge",
    "sample_weight": "--weights",
    "see test=": "see --test",
    "drop or encode them": "name the columns you want (--columns)",
    "; pass overwrite=True": "; pass --force",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the signal's number, and what to tell the user."""

    def __init__(self, number: int, says: str = "interrupted") -> None:
        super().__init__(says)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 2 where the user can mend what went wrong (one line says what), 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    args = parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _warning
            args.act(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"flowpath: {_one_line(stop) if stop.args else 'interrupted'}", file=sys.stderr)
        return INTERRUPTED + getattr(stop, "number", signal.SIGINT)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug or not _is_users(error):
            raise
        print(f"flowpath: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that nothing is left half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _is_users(error: Exception) -> bool:
    """Whether the user can mend it: of torch's RuntimeErrors only a lack of memory."""
    return not isinstance(error, RuntimeError) or "memory" in str(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    for python, flag in _FLAGS.items():
        text = text.replace(python, flag)
    return text


def _warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flowpath: warning: {_one_line(Warning(message))}", file=sys.stderr)
