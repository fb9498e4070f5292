"""Claim: a step of SVI costs a fraction of Pyro's once it is traced, and less again once it is compiled.

Steps per second on three posteriors, 16 vectorised particles, one process and thread, float32, `Trace_ELBO`, Adam:

- `pyro`: `pyro.infer.SVI` with Pyro's guide;
- `eager`: `pyro.infer.SVI` with flowpath's guide of the same size (where Pyro's guide is no flow: the same);
- `theirs`: `fp.svi.CompiledSVI(compile=False)` with Pyro's guide;
- `traced`: `fp.svi.CompiledSVI(compile=False)` with flowpath's guide;
- `compiled`: `fp.svi.CompiledSVI(compile=True)` with flowpath's guide;
- `path`: as `compiled`, with `fp.svi.PathELBO()`, its weight of the score part followed.

The ways take turns in blocks of steps, and the order is reversed from round to round; a figure is the median over
rounds, of process CPU time on a CPU and of wall time on a GPU, and `ratio` the median of the ratios to `pyro` in the
same round; `setup_wall_seconds` is the wall time of the first three steps, compilers included. Then whole fits of
`fit_steps` steps, set-up included: `pyro`, and `auto`, CompiledSVI as it is by default.

    python experiments/svi_speed/run.py [key=value ...] [--seeds 0] [--smoke]   # then plot.py beside it
"""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

import flowpath as fp
from experiments.runner import run_all
from experiments.svi_speed.problems import PROBLEMS, Problem


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides."""

    problems: tuple[str, ...] = ("schools", "logistic", "hierarchy")
    ways: tuple[str, ...] = ("pyro", "eager", "theirs", "traced", "compiled", "path")
    devices: tuple[str, ...] = ("cpu", "cuda")
    particles: int = 16
    learning_rate: float = 1e-3
    rounds: int = 11
    block: int = 60
    fit_steps: int = 2_000


SMOKE = {
    "problems": ("logistic",),
    "ways": ("pyro", "eager", "traced"),
    "devices": ("cpu",),
    "rounds": 2,
    "block": 3,
    "fit_steps": 6,
}


class Way:
    """One way to take steps, with its own parameter store.

    Args:
        name: one of the module's docstring, or "auto".
        problem: what to fit.
        c: settings.
        clock: what to read the time from.
    """

    def __init__(self, name: str, problem: Problem, c: Config, clock: Callable[[], float]) -> None:
        self.name, self.problem, self.clock = name, problem, clock
        self.store = pyro.get_param_store()
        start, wall = clock(), time.perf_counter()
        with self.store.scope() as self.state:
            self.svi = self._make(c)
            for _ in range(3):  # the first is Pyro's, the second traces
                self.svi.step(*next(problem.batches))
        self.setup, self.setup_wall = clock() - start, time.perf_counter() - wall

    def _make(self, c: Config) -> Any:
        guide = (self.problem.theirs if self.name in ("pyro", "theirs") else self.problem.ours)(self.problem.model)
        kind = fp.svi.PathELBO if self.name == "path" else Trace_ELBO
        elbo = kind(num_particles=c.particles, vectorize_particles=True)
        parts = self.problem.model, guide, pyro.optim.Adam({"lr": c.learning_rate}), elbo
        if self.name in ("pyro", "eager"):
            return SVI(*parts)
        compile: Any = {"compiled": True, "path": True, "auto": "auto"}.get(self.name, False)
        return fp.svi.CompiledSVI(*parts, compile=compile)

    def seconds(self, steps: int) -> float:
        """The time of so many steps."""
        data = list(itertools.islice(self.problem.batches, steps))
        with self.store.scope(self.state):
            start = self.clock()
            for args in data:
                self.svi.step(*args)
            return self.clock() - start

    @property
    def mode(self) -> str:
        return getattr(self.svi, "mode", "eager")


def steps_per_second(ways: list[Way], c: Config) -> Iterator[dict[str, Any]]:
    """Each way's steps per second, and its ratio to the first way."""
    taken: dict[str, list[float]] = {w.name: [] for w in ways}
    for turn in range(c.rounds):
        for way in ways if turn % 2 else reversed(ways):
            taken[way.name].append(way.seconds(c.block) / c.block)
    for way in ways:
        ratios = [a / b for a, b in zip(taken[ways[0].name], taken[way.name], strict=True)]
        yield {
            "way": way.name,
            "mode": way.mode,
            "steps_per_second": round(1 / statistics.median(taken[way.name]), 1),
            "milliseconds": round(1e3 * statistics.median(taken[way.name]), 3),
            "ratio": round(statistics.median(ratios), 2),
            "setup_wall_seconds": round(way.setup_wall, 2),
        }


def whole_fits(make: Callable[[str], Way], c: Config) -> Iterator[dict[str, Any]]:
    """The time of whole fits, set-up included, twice each in turns; the lesser one counts."""
    found: dict[str, list[tuple[float, str]]] = {"pyro": [], "auto": []}
    for name in ("pyro", "auto", "auto", "pyro"):
        way = make(name)
        found[name].append((way.setup + way.seconds(c.fit_steps - 3), way.mode))
    for name, times in found.items():
        seconds, mode = min(times)
        yield {"way": name, "mode": mode, "fit_steps": c.fit_steps, "fit_seconds": round(seconds, 2)}


def run(c: Config, seed: int) -> Iterator[dict[str, Any]]:
    """All problems on all devices that there are."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    for device in c.devices:
        if device == "cuda" and not torch.cuda.is_available():
            print("no CUDA device: its part is left out")
            continue
        clock = time.process_time if device == "cpu" else time.perf_counter
        for name in c.problems:
            with torch.device(device), torch.random.fork_rng(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Encountered NaN")
                torch.manual_seed(seed)
                problem = PROBLEMS[name](torch.device(device), seed)
                about = {"problem": name, "guide": problem.size, "device": device}

                def make(way: str, problem: Problem = problem, clock: Callable[[], float] = clock) -> Way:
                    return Way(way, problem, c, clock)

                for line in steps_per_second([make(way) for way in c.ways], c):
                    yield about | line
                for line in whole_fits(make, c):
                    yield about | line


if __name__ == "__main__":
    run_all(run, Config, SMOKE, Path(__file__).parent)
