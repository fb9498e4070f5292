"""How cost grows with the work: a training step against batch, features, depth and bins; sampling; a fit.

    python -m experiments.bench.growth [--quick | --smoke]

CPU time and peak memory of a step of `fp.nsf` (5 couplings of 128 x 2, 8 bins, batch 512, D = 8 where not varied),
sampling of couplings and autoregressive layers against D, and `fp.fit` on 10^4 to 10^6 rows at a fixed number of
epochs. One thread. Results: `results/growth.json`; `plot.py` draws a figure of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import flowpath as fp
from experiments.bench.measure import cpu_seconds
from experiments.bench.memory import give_back, peak
from experiments.runner import surroundings

HERE = Path(__file__).parent
FEATURES, BATCH, TRANSFORMS, BINS = 8, 512, 5, 8

SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {
        "batch": (64, 256, 1024, 4096, 16_384, 65_536),
        "features": (2, 4, 8, 16, 32, 64, 128, 256, 512),
        "transforms": (1, 2, 4, 8, 16),
        "bins": (4, 8, 16, 32, 64),
        "sampling": (2, 4, 8, 16, 32, 64),
        "rows": (10_000, 100_000, 1_000_000),
    },
    "quick": {
        "batch": (64, 1024, 8192),
        "features": (2, 16, 64),
        "transforms": (1, 4, 16),
        "bins": (4, 16),
        "sampling": (2, 16, 32),
        "rows": (10_000, 30_000),
    },
    "smoke": {
        "batch": (8, 16),
        "features": (2, 3),
        "transforms": (1, 2),
        "bins": (2, 4),
        "sampling": (2, 3),
        "rows": (),
    },
}


def step_of(batch: int = BATCH, features: int = FEATURES, transforms: int = TRANSFORMS, bins: int = BINS) -> Callable:
    """A training step of a spline coupling flow."""
    torch.manual_seed(0)
    flow = fp.nsf(features, transforms=transforms, bins=bins, whiten="none")
    adam = torch.optim.Adam(flow.parameters(), lr=1e-5, fused=True)
    x = torch.randn(batch, features)

    def step() -> None:
        adam.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        adam.step()

    return step


def timed(work: Callable[[], object], budget: float = 0.5) -> dict[str, float]:
    """Median milliseconds of CPU time, and the growth of the resident set in one call."""
    work()
    give_back()
    with peak() as grown:
        work()
    once = cpu_seconds(work, 1)
    repeats = max(3, min(20, int(budget / max(once, 1e-4))))
    times = [cpu_seconds(work, 1) for _ in range(repeats)]
    return {"milliseconds": 1e3 * statistics.median(times), "peak_mib": grown[0] / 2**20}


def sampling(name: str, features: int) -> dict[str, float]:
    """4096 draws of an architecture, beside their log_prob."""
    torch.manual_seed(0)
    flow = getattr(fp, name)(features, whiten="none")
    x = torch.randn(4096, features)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
        drawn = timed(lambda: flow.transform.inverse(x))
        scored = timed(lambda: flow.log_prob(x))
    return {"milliseconds": drawn["milliseconds"], "log_prob_milliseconds": scored["milliseconds"]}


def fitting(rows: int) -> dict[str, float]:
    """`fp.fit` of a fixed flow for two epochs at batch 256."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, FEATURES, generator=generator).cumsum(-1)
    begun = time.process_time()
    options = {"transforms": 2, "hidden_features": (32, 32)}
    fp.fit("maf", x, epochs=2, batch_size=256, seed=0, progress=False, compile=False, patience=None, **options)
    return {"seconds": time.process_time() - begun}


def measure(sweeps: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every size of every sweep as a row {"at": size, ...}, as soon as it is measured."""
    for what in ("batch", "features", "transforms", "bins"):
        for n in sweeps[what]:
            yield what, {"at": n, **timed(step_of(**{what: n}))}
    for name in ("nsf", "maf", "nsf_autoregressive"):
        for d in sweeps["sampling"]:
            yield f"sampling {name}", {"at": d, **sampling(name, d)}
    if sweeps["rows"]:
        fitting(1000)  # what a first fit imports is not the rows'
    for n in sweeps["rows"]:
        yield "rows", {"at": n, **fitting(n)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes; results under runs/quick")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; results under runs/smoke")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    kind = "smoke" if args.smoke else "quick" if args.quick else "full"
    folder = HERE / ("results" if kind == "full" else f"runs/{kind}")
    folder.mkdir(parents=True, exist_ok=True)
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for what, row in measure(SWEEPS[kind]):
        print(f"{what} {row['at']}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "at"), flush=True)
        sweeps.setdefault(what, []).append(row)
        held = {"sweeps": sweeps, "surroundings": surroundings()}
        (folder / "growth.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
