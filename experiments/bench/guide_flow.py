"""Which flow AutoFlow should be built of: KL at equal steps and at their cost, over real posteriors.

FLOWPATH_DATA must hold posteriors/ (Pyro models with `load`, `model` and logZ.json).
Run by `FLOWPATH_DATA=folder python -m experiments.bench.guide_flow [steps]`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

import flowpath as fp

POSTERIORS = ["eight_schools_centered", "eight_schools_noncentered", "gp_pois_regr", "arK", "logmesquite"]
FLOWS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "realnvp": {"transforms": 6, "hidden_features": (64, 64)},
    "realnvp tanh": {"transforms": 6, "hidden_features": (64, 64), "activation": nn.Tanh},
    "iaf": {"transforms": 3, "hidden_features": (64, 64)},
    "iaf tanh": {"transforms": 3, "hidden_features": (64, 64), "activation": nn.Tanh},
    "nsf": {"transforms": 4, "hidden_features": (64, 64)},
}
PARTICLES, RATE, DRAWS = 32, 2e-3, 10_000


class Bound(pyro.nn.PyroModule):
    """A posterior's model with its data."""

    def __init__(self, module: Any, data: Any) -> None:
        super().__init__()
        self._run = lambda: module.model(data)

    def forward(self) -> Any:
        return self._run()


def shape(t: float) -> float:
    """A step size that rises over the first tenth and falls by a cosine."""
    return min(10 * t, 1.0) * 0.5 * (1 + math.cos(math.pi * t)) + 0.01


def fit(model: Bound, name: str, steps: int, seed: int = 0) -> tuple[fp.svi.AutoFlow, float]:
    """A guide trained by Adam under a cosine, and the CPU seconds it took."""
    torch.manual_seed(seed)
    guide = fp.svi.AutoFlow(model, name.split()[0], **FLOWS[name]).setup()
    elbo = fp.svi.PathELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    loss_fn = elbo(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: shape(i / steps))
    start = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn().backward()
        if torch.nn.utils.clip_grad_norm_(guide.parameters(), 100.0).isfinite():
            optimizer.step()
        schedule.step()
    return guide, time.process_time() - start


@torch.no_grad()
def bound(model: Bound, guide: fp.svi.AutoFlow) -> tuple[float, float]:
    """The ELBO and its standard error from fresh draws."""
    found = []
    for _ in range(DRAWS // 1000):
        with pyro.plate("draws", 1000, dim=-1):
            trace = pyro.poutine.trace(guide).get_trace()
            target = pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace()
        target.compute_log_prob()
        trace.compute_log_prob()
        sums = [sum(s["log_prob"] for s in t.nodes.values() if s["type"] == "sample") for t in (target, trace)]
        found.append(sums[0] - sums[1])
    values = torch.cat(found)
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    folder = Path(os.environ.get("FLOWPATH_DATA", "data"))
    if not (folder / "posteriors").is_dir():
        sys.exit(f"no posteriors/ in {folder}; point FLOWPATH_DATA at the benchmark data")
    sys.path.insert(0, str(folder))
    torch.set_default_dtype(torch.float64)
    evidence = json.loads((folder / "posteriors" / "logZ.json").read_text())
    print(f"| posterior | {' | '.join(f'{f}: KL (se), CPU s' for f in FLOWS)} |")
    print("|---|" + "---|" * len(FLOWS))
    for posterior in POSTERIORS:
        module = importlib.import_module(f"posteriors.{posterior}")
        model, cells = Bound(module, module.load()[0]), []
        for name in FLOWS:
            pyro.clear_param_store()
            guide, seconds = fit(model, name, steps)
            elbo, error = bound(model, guide)
            cells.append(f"{evidence[posterior] - elbo:.3f} ({error:.3f}), {seconds:.0f}")
        print(f"| {posterior} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
