"""What the experiments share: settings from the command line, seeds, and one JSON line a run.

    from experiments.runner import run_all
    run_all(run, Config, SMOKE, Path(__file__).parent)       # run(config, seed) yields dicts, one a line

Command line: `key=value` for the fields of Config, `--seeds 0..4` or `--seeds 0,2,7`, `--smoke` (tiny sizes, results
under runs/smoke). Lines are appended to results.jsonl; fields of type Path are written by their last part alone.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

C = TypeVar("C")


class Command(NamedTuple):
    """A command line, read."""

    config: Any
    seeds: list[int]
    smoke: bool


def parse(words: list[str], kind: type[C], smoke: Mapping[str, Any]) -> Command:
    """The settings of a command line; an unknown key ends the program and names the known ones."""
    known = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    tiny = "--smoke" in words
    chosen, seeds = dict(smoke) if tiny else {}, "0"
    rest = iter(w for w in words if w != "--smoke")
    for word in rest:
        key, equals, value = word.partition("=")
        if key == "--seeds":
            seeds = value if equals else next(rest, "")
        elif key in known and equals:
            chosen[key] = _cast(key, value, known[key])
        else:
            raise SystemExit(f"expected key=value with a key of {', '.join(known)}, or --seeds, --smoke; got {word!r}")
    return Command(kind(**chosen), _seeds(seeds), tiny)


def _cast(key: str, value: str, default: Any) -> Any:
    """The text as the kind of the default: bool, int, float, str, Path, or a tuple of one of them."""
    try:
        if isinstance(default, tuple):
            return tuple(_cast(key, v, default[0]) for v in value.split(","))
        return {"true": True, "false": False}[value] if isinstance(default, bool) else type(default)(value)
    except (KeyError, ValueError):
        raise SystemExit(f"{key} expects a value like {default!r}, got {value!r}") from None


def _seeds(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    try:
        return list(range(int(first), int(last) + 1)) if dots else [int(s) for s in text.split(",")]
    except ValueError:
        raise SystemExit(f"--seeds expects a range such as 0..4 or a list such as 0,2,7, got {text!r}") from None


def run_all(
    run: Callable[[Any, int], Iterable[dict[str, Any]]],
    kind: type,
    smoke: Mapping[str, Any],
    folder: Path,
    words: list[str] | None = None,
) -> None:
    """Run every seed; append each result that `run` yields to results.jsonl as soon as it is there."""
    command = parse(sys.argv[1:] if words is None else words, kind, smoke)
    folder = folder / "runs" / "smoke" if command.smoke else folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed in command.seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        for result in run(command.config, seed):
            now = time.perf_counter(), time.process_time()
            took = {"seconds": round(now[0] - wall, 2), "cpu_seconds": round(now[1] - cpu, 2)}
            line = {**result, "seed": seed, **took, "config": settings(command.config), **surroundings()}
            with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(" ".join(f"{k}={_short(v)}" for k, v in {**result, "seed": seed, **took}.items()), flush=True)
            wall, cpu = time.perf_counter(), time.process_time()


def settings(config: Any) -> dict[str, Any]:
    """The config as JSON, without the paths of this machine."""
    return {k: v.name if isinstance(v, Path) else v for k, v in asdict(config).items()}


def surroundings() -> dict[str, Any]:
    """Commit ("+" where files differ from it, None outside a repository), torch and processor."""
    words = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    return {"commit": done.stdout.strip() or None, "torch": torch.__version__, "cpu": cpu}


def load(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl in a folder."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds; the error of a single value is 0."""
    x = torch.tensor(list(values), dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"[{len(value)}]" if isinstance(value, list | dict) and len(value) > 4 else str(value)
