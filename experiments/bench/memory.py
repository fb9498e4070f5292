"""Peak memory of one training step: ten spline couplings on 43 features, each library in a process of its own.

    python -m experiments.bench.memory [--rows 65536] [--libraries flowpath,nflows,...]

What is reported is how far the resident set of a process grows during the step, read every few milliseconds, beside
the bytes its graph holds. Heavy: at 65,536 rows nflows takes 7 GiB and zuko 10. Results: `results/memory.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import flowpath as fp
from experiments.bench.peers import LIBRARIES, Rival, Shape
from experiments.runner import surroundings
from flowpath.training.joint import JointStep

HERE = Path(__file__).parent
SHAPE = Shape(43, transforms=10)
CHECKPOINTED = "flowpath, checkpoint_layers"
GRAPHED = "flowpath, one graph"
NAMES = ("flowpath", GRAPHED, CHECKPOINTED, *(name for name in LIBRARIES if name != "flowpath"))
_MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak() -> Iterator[list[int]]:
    """How far the resident set grows inside: the list holds the bytes afterwards."""
    base, found, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            found[0] = max(found[0], resident() - base)
            time.sleep(0.003)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def give_back() -> None:
    """Give memory that is free back to the system, where the C library can: what grows afterwards is the call's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def build(name: str) -> Rival:
    rival = LIBRARIES[name.split(",")[0]]["coupling"](SHAPE)
    if name == CHECKPOINTED:
        rival.module.checkpoint_layers = True  # type: ignore[assignment]
    return rival


def step(name: str, rows: int) -> dict[str, Any]:
    """One training step in this process."""
    torch.manual_seed(0)
    rival = build(name)
    (-rival.log_prob(torch.randn(8, SHAPE.features)).mean()).backward()  # what is allocated once is there
    x = 1.5 * torch.randn(rows, SHAPE.features)
    held: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    graph = JointStep(fp.MaximumLikelihood(rival.module), (x,)) if name == GRAPHED else None  # type: ignore[arg-type]
    give_back()
    with peak() as grown:
        begun = time.process_time()
        if graph is None:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = -rival.log_prob(x).mean()
            loss.backward()
        else:
            graph((x,))
        spent = time.process_time() - begun
    return {
        "name": name,
        "rows": rows,
        "peak_mib": grown[0] / _MIB,
        "kept_mib": sum(held.values()) / _MIB if graph is None else None,
        "cpu_seconds": spent,
    }


def in_child(name: str, rows: int) -> dict[str, Any]:
    """`step` in a fresh process."""
    root = HERE.parents[1]
    command = [sys.executable, "-m", "experiments.bench.memory", "--child", name, "--rows", str(rows)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--libraries", default=";".join(NAMES), help="names separated by semicolons")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(step(args.child, args.rows)))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for name in args.libraries.split(";"):
        found.append(in_child(name, args.rows))
        kept = found[-1]["kept_mib"]
        print(f"{name:30s} peak {found[-1]['peak_mib']:8.0f} MiB, graph {kept or math.nan:8.0f} MiB", flush=True)
        held = {"steps": found, "shape": "10 spline couplings, D = 43, hidden 128 x 2", "surroundings": surroundings()}
        args.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
