"""Claim: spline flows fit eight densities of the plane with all their modes and hardly a bridge between them.

Fits each set by each architecture and appends one JSON line a fit. Per fit, on rows it never saw and its own samples:

- `log_prob`, the held-out score, beside `exact`, that of the true density on the same rows;
- `gap` = mean(log p - log q), which estimates KL(p | q), and its standard error;
- `stray`, the share of samples where the true density is below that of all but 0.1 % of the data: bridges, mostly;
- `missed`, the share of held-out rows whose density is less than a twentieth of the true one: modes left out.

    python experiments/toy2d/run.py [key=value ...] [--smoke]       # then: python experiments/toy2d/plot.py
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sets import SETS, PlaneSet
from torch import Tensor

import flowpath as fp

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
    """The settings of a run; `key=value` on the command line overrides.

    `sets` and `architectures` are names
    with commas between; `steps` 0 takes each architecture's own.
    """

    sets: str = ",".join(SETS)
    architectures: str = ",".join(ARCHITECTURES)
    steps: int = 0
    batch_size: int = 512
    learning_rate: float = 2e-3
    held_out: int = 20000
    pixels: int = 100
    seed: int = 0
    workers: int = 2
    out: str = str(HERE)


SMOKE = {"sets": "two moons,checkerboard", "steps": 3, "held_out": 200, "pixels": 10, "workers": 1}


def config(words: list[str]) -> Config:
    """The Config of a command line; an unknown key or name is an error."""
    kinds = {f.name: type(f.default) for f in fields(Config)}
    smoke = "--smoke" in words
    chosen: dict[str, Any] = {**SMOKE, "out": str(HERE / "runs" / "smoke")} if smoke else {}
    for word in words:
        if word == "--smoke":
            continue
        key, equals, value = word.partition("=")
        if key not in kinds or not equals:
            raise SystemExit(f"expected key=value with a key of {', '.join(kinds)}, or --smoke; got {word!r}")
        chosen[key] = kinds[key](value)
    c = Config(**chosen)
    for kind, asked, known in (("set", c.sets, SETS), ("architecture", c.architectures, ARCHITECTURES)):
        for name in asked.split(","):
            if name not in known:
                raise SystemExit(f"expected a {kind} of {', '.join(known)}; got {name!r}")
    return c


def fit(density: PlaneSet, architecture: str, c: Config) -> fp.Flow:
    """A flow fitted to fresh draws in every batch, so that it cannot overfit."""
    generator = torch.Generator().manual_seed(c.seed)
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
            seed=c.seed,
            device="cpu",
            compile=False,
            progress=False,
            **options,
        )
    return result.flow


def measure(density: PlaneSet, flow: fp.Flow, c: Config) -> dict[str, float]:
    """The numbers of the module's docstring."""
    x = density.draw(c.held_out, torch.Generator().manual_seed(c.seed + 1))
    log_p, log_q = density.log_prob(x.double()), fp.log_prob(flow, x)
    gap = log_p - log_q
    samples = flow.sample(c.held_out, generator=torch.Generator().manual_seed(c.seed + 2)).double()
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


def density_map(log_prob: Tensor, pixels: int) -> np.ndarray:
    """Density on the grid: `(pixels, pixels)` in float16."""
    return log_prob.exp().reshape(pixels, pixels).to(torch.float16).numpy()


def one(name: str, architecture: str, c: Config) -> tuple[dict[str, Any], np.ndarray]:
    """One fit: its JSON line, and its density on the grid."""
    torch.set_num_threads(1)
    density, start = SETS[name](), time.perf_counter()
    flow = fit(density, architecture, c)
    seconds = round(time.perf_counter() - start, 1)
    line = {"set": name, "architecture": architecture, **measure(density, flow, c), "seconds": seconds}
    line |= {"options": ARCHITECTURES[architecture][1], "config": asdict(c), "commit": commit()}
    return line, density_map(fp.log_prob(flow, grid(c.pixels)), c.pixels)


def commit() -> str | None:
    """The commit that is checked out, "+" where files differ from it; None outside a repository."""
    words = ("git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main(words: list[str]) -> None:
    """Every fit asked for: results.jsonl and densities.npz in `out`."""
    c = config(words)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    names, kinds = c.sets.split(","), c.architectures.split(",")
    maps = {f"{name}/true": density_map(SETS[name]().log_prob(grid(c.pixels).double()), c.pixels) for name in names}
    jobs = [(name, kind) for name in names for kind in kinds]
    with ProcessPoolExecutor(c.workers) as pool, open(out / "results.jsonl", "w", encoding="utf-8") as file:
        for (name, kind), (line, image) in zip(jobs, pool.map(one, *zip(*jobs), [c] * len(jobs)), strict=True):
            maps[f"{name}/{kind}"] = image
            file.write(json.dumps(line) + "\n")
            print(
                f"{name:16s} {kind:19s} score {line['log_prob']:7.3f}, exact {line['exact']:7.3f}, "
                f"gap {line['gap']:.3f} ± {line['gap_se']:.3f}, stray {line['stray']:.1%}, missed {line['missed']:.1%}, "
                f"{line['seconds']} s",
                flush=True,
            )
    np.savez_compressed(out / "densities.npz", **maps)


if __name__ == "__main__":
    main(sys.argv[1:])
