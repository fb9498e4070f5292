"""Run folders: what they hold, what may be written where, and on which device a command works.

A run folder holds flow.safetensors and table.json (the estimator), history.csv and fit.json (how it came about),
held_out.parquet (rows the weights were not fitted to), run.json (what was asked), checkpoint.safetensors, report.html
and its figures.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from flowpath import report, tables
from flowpath.cli import Interrupted
from flowpath.density import FlowDensity

if TYPE_CHECKING:
    from flowpath.training.loop import State

FLOW, CHECKPOINT, HELD, NOTE = "flow.safetensors", "checkpoint.safetensors", "held_out.parquet", "run.json"
_MADE = (FLOW, CHECKPOINT, HELD, NOTE, "table.json", "history.csv", "fit.json", *report.FILES)


def folder_of(run: str) -> Path:
    """The folder of a run, which may also be named by its flow's file."""
    path = Path(run)
    return path.parent if path.name == FLOW else path


def load(run: str, device: str) -> FlowDensity:
    """The estimator of a run, its flow on the device."""
    folder, device = folder_of(run), usable_device(device)
    if not (folder / FLOW).is_file():
        there = folder.parent.iterdir() if folder.parent.is_dir() else ()
        like = get_close_matches(folder.name, [p.name for p in there if (p / FLOW).is_file()], 1)
        hint = f"did you mean {like[0]!r}?" if like else "make one with flowpath fit"
        if (folder / CHECKPOINT).is_file():
            hint = "it holds the checkpoint of an unfinished fit: go on with flowpath fit ... --resume"
        raise FileNotFoundError(f"{folder} is no run: there is no {FLOW} in it; {hint}")
    try:
        model = FlowDensity.load(folder)
    except KeyError as error:
        raise ValueError(f"{folder / FLOW} is damaged: its description has no {error}") from None
    model.flow_.to(device)
    return model


def noted(run: Path) -> dict[str, Any]:
    """What run.json holds; it can do without."""
    try:
        held = json.loads((run / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def check_free(run: Path, args: Namespace) -> None:
    """The run folder is free, or may be replaced or gone on with."""
    if args.resume and args.force:
        raise ValueError("--resume goes on with what is there, --force starts anew: choose one of them")
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"--out {run} is a file; a run is a folder")
    there = [name for name in _MADE if (run / name).exists()]
    if args.resume and CHECKPOINT not in there:
        raise FileNotFoundError(f"--resume: there is no checkpoint in {run}; leave --resume out to begin anew")
    if there and not (args.resume or args.force):
        held = "a run" if FLOW in there else "an unfinished run" if CHECKPOINT in there else there[0]
        resume = "--resume to go on with it, " if CHECKPOINT in there else ""
        raise FileExistsError(f"--out {run} holds {held} already: pass --force to replace it, {resume}or another --out")
    _check_place(run)


def check_resumed(run: Path, asked: Mapping[str, Any]) -> None:
    """What was asked is what the checkpoint's fit was asked, or an error that says what differs."""
    then = noted(run).get("asked", {})
    for name, now in asked.items():
        if name in then and then[name] != now:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--resume: {flag} was {_shown(then[name])} and is now {_shown(now)}; give the command as it was, or "
                "start anew with --force"
            )


@contextmanager
def same_rows(run: Path) -> Iterator[None]:
    """A checkpoint of other rows, told without its checksums."""
    try:
        yield
    except ValueError as error:
        if "fingerprint" not in str(error):
            raise
        raise ValueError(
            f"--resume: the checkpoint in {run} is of a fit to other rows; give it the same table, or start anew with "
            "--force"
        ) from None


def free_file(out: str, force: bool) -> Path:
    """Where a table can be written, found out before the work."""
    path = Path(out)
    if not path.name.lower().endswith(tables.ENDINGS):
        raise ValueError(f"--out {path}: a table's file ends in {', '.join(tables.ENDINGS)}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder, not a file")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists and stays as it is; pass --force to replace it, or another --out")
    _check_place(path)
    return path


def free_folder(run: Path, out: str | None, force: bool) -> Path:
    """Where a report can be written: the folder named, or the first free one of check, check-2, ... in the run."""
    path = run / "check" if out is None else Path(out)
    if out is None and not force:
        tried = 1
        while path.exists():
            tried += 1
            path = run / f"check-{tried}"
    there = [name for name in report.FILES if (path / name).exists()]
    if there and not force:
        raise FileExistsError(f"{path / there[0]} exists and stays as it is; pass --force, or another --out")
    _check_place(path)
    return path


def _check_place(path: Path) -> None:
    """What is missing of a path can be made: found out before the work.

    Raises:
        OSError: a part of it is a file, or may not be written into.
    """
    there = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if not there.is_dir():
        raise NotADirectoryError(f"--out {path}: {there.name} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out {path}: {there} cannot be written")


def usable_device(word: str) -> str:
    """A device that torch can use; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        why = "known are cpu, cuda, cuda:1, ... and auto" if why.startswith("Expected one of") else why
        raise ValueError(f"--device {word}: torch cannot use it here ({why})") from None
    if device.type == "meta":
        raise ValueError("--device meta: holds no numbers; use cpu, cuda or auto")
    return word


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


class Watch:
    """Looks on while a fit runs: what was asked is noted once it trains, and a SIGTERM may not cost what it found.

    Args:
        run: the run folder.
        asked: settings that a resumed fit must share.
    """

    def __init__(self, run: Path, asked: Mapping[str, Any]) -> None:
        self.run, self.asked, self.number = run, dict(asked), int(signal.SIGINT)
        self._state: State | None = None

    def __call__(self, state: State) -> None:
        if self._state is None:
            self._state = state
            self.note()

    def note(self, **more: Any) -> None:
        """Write run.json."""
        text = json.dumps({"asked": self.asked, **more}, indent=2) + "\n"
        (self.run / NOTE).write_text(text, encoding="utf-8")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted where training has ended because of it, and ends the command anywhere else."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminated)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._state is None or self._state.stop_reason != "interrupted":
            raise Interrupted(number)
