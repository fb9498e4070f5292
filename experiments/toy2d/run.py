"""Claim: spline flows fit eight densities of the plane with all their modes and hardly a bridge between them.

Fits each set by each architecture and appends one JSON line a fit. Per fit, on rows it never saw and its own samples:

- `log_prob`, the held-out score, beside `exact`, that of the true density on the same rows;
- `gap` = mean(log p - log q), which estimates KL(p | q), and its standard error;
- `stray`, the share of samples where the true density is below that of all but 0.1 % of the data: bridges, mostly;
- `missed`, the share of held-out rows whose density is less than a twentieth of the true one: modes left out.

    python experiments/toy2d/run.py [key=value ...] [--seeds 0,1] [--smoke]   # then plot.py beside it
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

import flowpath as fp
from experiments.runner import parse, settings, surroundings
from experiments.toy2d.sets import SETS, PlaneSet

HERE = Path(__file__).parent
SIDE = 3.2  # the figure shows [-SIDE, SIDE]^2
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "gaussian": (500, {}),
    "realnvp": (1500, {"transforms": 10, "hidden_features": (64, 64)}),
    "maf": (1500, {"transforms": 8, "hidden_features": (64, 64)}),
    "iaf": (600, {"transforms": 5, "hidden_features": (64, 64)}),  # slow to fit to data, so few steps
    "nsf": (1500, {"transforms": 4, "hidden_features": (64, 64), "bins": 16, "bound": 3.0}),
    "nsf_autoregressive": (1500, {"transforms": 4, "hidden_features": (64, 64), "bins": 16, "bound": 3.0}),
}
"""Steps and options of each architecture."""


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides; `steps=0` takes each architecture's own."""

    sets: tuple[str, ...] = tuple(SETS)
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    steps: int = 0
    batch_size: int = 512
    learning_rate: float = 2e-3
    held_out: int = 20000
    pixels: int = 100
    workers: int = 2


SMOKE = {"sets": ("two moons", "checkerboard"), "steps": 3, "held_out": 200, "pixels": 10, "workers": 1}


def fit(density: PlaneSet, architecture: str, c: Config, seed: int) -> fp.Flow:
    """A flow fitted to fresh draws in every batch, so that it cannot overfit."""
    generator = torch.Generator().manual_seed(seed)
    steps, options = ARCHITECTURES[architecture]
    batches = iter(lambda: density.draw(c.batch_size, generator), None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this flow scores data one feature after another")  # IAF: as asked
        result = fp.fit(
            architecture,
            batches,
            steps=c.steps or steps,
            learning_rate=c.learning_rate,
            validation=None,
            seed=seed,
            device="cpu",
            compile=False,
            progress=False,
            **options,
        )
    return result.flow


def measure(density: PlaneSet, flow: fp.Flow, c: Config, seed: int) -> dict[str, float]:
    """The numbers of the module's docstring."""
    x = density.draw(c.held_out, torch.Generator().manual_seed(seed + 1))
    log_p, log_q = density.log_prob(x.double()), fp.log_prob(flow, x)
    gap = log_p - log_q
    samples = flow.sample(c.held_out, generator=torch.Generator().manual_seed(seed + 2)).double()
    least = log_p.quantile(0.001) - 1e-9
    return {
        "log_prob": float(log_q.mean()),
        "exact": float(log_p.mean()),
        "gap": float(gap.mean()),
        "gap_se": float(gap.std() / math.sqrt(len(gap))),
        "stray": float((density.log_prob(samples) < least).double().mean()),
        "missed": float((gap > math.log(20.0)).double().mean()),
    }


def grid(pixels: int) -> Tensor:
    """Centres of the figure's pixels, row by row from below: `(pixels^2, 2)`."""
    side = (torch.arange(pixels) + 0.5) / pixels * 2 * SIDE - SIDE
    return torch.cartesian_prod(side, side).flip(1)


def shades(log_prob: Tensor, top: float) -> np.ndarray:
    """Square roots of densities `(pixels^2,)` as shades of grey `(pixels, pixels)`, 255 where they reach `top`."""
    pixels = math.isqrt(len(log_prob))
    return (255 * (log_prob.exp() / top).clamp(0.0, 1.0).sqrt()).round().byte().reshape(pixels, pixels).numpy()


def one(c: Config, seed: int, name: str, architecture: str) -> tuple[dict[str, Any], Tensor]:
    """One fit: its numbers, and its log density on the grid."""
    torch.set_num_threads(1)
    density, start = SETS[name](), time.process_time()
    flow = fit(density, architecture, c, seed)
    seconds = round(time.process_time() - start, 1)
    steps, options = ARCHITECTURES[architecture]
    line = {"set": name, "architecture": architecture, **measure(density, flow, c, seed), "cpu_seconds": seconds}
    line |= {"seed": seed, "steps": c.steps or steps, "options": options}
    return line, fp.log_prob(flow, grid(c.pixels))


def report(line: dict[str, Any]) -> str:
    """A line for the terminal."""
    return (
        f"{line['set']:16s} {line['architecture']:19s} score {line['log_prob']:7.3f}, exact {line['exact']:7.3f}, gap "
        f"{line['gap']:.3f} ± {line['gap_se']:.3f}, stray {line['stray']:.1%}, missed {line['missed']:.1%}, "
        f"{line['cpu_seconds']} s"
    )


def main(words: list[str]) -> None:
    """Every fit asked for; leaves results.jsonl and, of the first seed, shades.npz."""
    c, seeds, smoke = parse(words, Config, SMOKE)
    if unknown := {*c.sets} - {*SETS} | {*c.architectures} - {*ARCHITECTURES}:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join([*SETS, *ARCHITECTURES])}")
    folder = HERE / "runs" / "smoke" if smoke else HERE
    folder.mkdir(parents=True, exist_ok=True)
    truth = {name: SETS[name]().log_prob(grid(c.pixels).double()) for name in c.sets}
    tops = {name: float(log_p.exp().max()) for name, log_p in truth.items()}
    maps = {f"{name}/truth": shades(log_p, tops[name]) for name, log_p in truth.items()}
    origin = {"config": settings(c), **surroundings()}
    jobs = list(product([c], seeds, c.sets, c.architectures))
    with ProcessPoolExecutor(c.workers) as pool, open(folder / "results.jsonl", "w", encoding="utf-8") as file:
        for line, log_q in pool.map(one, *zip(*jobs, strict=True)):
            file.write(json.dumps({**line, **origin}) + "\n")
            maps.setdefault(f"{line['set']}/{line['architecture']}", shades(log_q, tops[line["set"]]))
            print(report(line), flush=True)
    np.savez_compressed(folder / "shades.npz", **maps)


if __name__ == "__main__":
    main(sys.argv[1:])
