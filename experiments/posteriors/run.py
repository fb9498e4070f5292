"""Claim: fit_posterior comes within 0.02 nat of real posteriors in seconds, where Pyro's guides stay far off.

Eleven posteriors of posteriordb (see posteriordb.py) and eight ways to fit them:

- `fit_posterior`: `fp.svi.fit_posterior(model, *args)` as it is by default;
- `autoflow`: `fp.svi.AutoFlow(model).locate(data)` with `fp.svi.PathELBO` in `pyro.infer.SVI`;
- `traced`: the same in `fp.svi.CompiledSVI(compile=False)`, whose work is all this process's;
- `diagonal`, `multivariate`, `iaf`: Pyro's AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal of two layers;
- `spline`, `affine_ar`: Pyro's AutoNormalizingFlow of four spline couplings, of four affine autoregressive layers.

Guides train by Adam, 16 vectorised particles, gradients clipped at norm 10, a step size that falls from .01 (ours:
.002) to a twentieth, for the CPU time that fit_posterior took on the same posterior, at least 15 seconds (`budget=`
overrides). Then all are judged by 10,000 fresh draws: KL = log Z - ELBO in nats, k-hat, ESS, the largest and mean
|error of a mean| in reference standard deviations and the least and largest ratio of a standard deviation to the
reference's, of raw draws (`mean_error_max`, ...) and of importance-weighted ones (`corrected_...`; fit_posterior's own
`summary()`). Draws come in the dtype asked for, log p is in float64. A way that fails leaves a line with the error.

    FLOWPATH_DATA=folder OMP_NUM_THREADS=1 python experiments/posteriors/run.py [key=value ...] [--seeds 0,1] [--smoke]

`methods=fit_posterior posteriors=arK,garch11 dtype=float32` choose; then table.py and plot.py beside it.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro
import torch
from pyro.distributions.transforms import affine_autoregressive, iterated, spline_coupling
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as auto
from torch import Tensor

import flowpath as fp
from experiments.posteriors.posteriordb import MISSING, Problem, available, load
from experiments.runner import load as saved
from experiments.runner import run_all
from flowpath.diagnostics import psis
from flowpath.svi.climbing import judge
from flowpath.svi.density import ModelDensity
from flowpath.svi.handlers import default_dtype
from flowpath.svi.summaries import Summary, summarise

HERE = Path(__file__).parent
LEAST = 15.0  # CPU seconds a guide has at least
Drawn = Callable[[int], tuple[Tensor, Tensor]]  # how many -> u (n, D), log q (n,)

GUIDES: dict[str, Callable[[Any], Any]] = {
    "autoflow": fp.svi.AutoFlow,
    "traced": fp.svi.AutoFlow,
    "diagonal": auto.AutoDiagonalNormal,
    "multivariate": auto.AutoMultivariateNormal,
    "iaf": partial(auto.AutoIAFNormal, num_transforms=2),
    "spline": lambda model: auto.AutoNormalizingFlow(model, partial(iterated, 4, spline_coupling)),
    "affine_ar": lambda model: auto.AutoNormalizingFlow(model, partial(iterated, 4, affine_autoregressive)),
}


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides. Without `posteriors`: all whose file is there."""

    methods: tuple[str, ...] = ("fit_posterior", *GUIDES)
    posteriors: tuple[str, ...] = ("",)
    dtype: str = "float64"
    budget: float = 0.0  # CPU seconds a guide has; 0: what fit_posterior took
    max_steps: int = 0  # of fit_posterior; 0: its default
    draws: int = 10_000
    particles: int = 16
    learning_rate: float = 1e-2  # of Pyro's guides
    our_learning_rate: float = 2e-3  # of AutoFlow
    clip: float = 10.0  # norm of a parameter's gradient; one huge early gradient freezes Adam for thousands of steps


SMOKE = {"posteriors": ("toy",), "budget": 0.1, "max_steps": 30, "draws": 1000}


def fit(problem: Problem, c: Config, seed: int) -> tuple[Drawn, dict[str, Any], Summary]:
    """fit_posterior: how to draw from it, what it took, its summary."""
    steps: dict[str, Any] = {"max_steps": c.max_steps} if c.max_steps else {}
    posterior = fp.svi.fit_posterior(problem.model, *problem.args, seed=seed, progress=False, **steps)
    took = {"steps": posterior.steps, "ended": posterior.reason, "verdict": posterior.verdict()}
    rounds = [{k: round(v, 4) for k, v in line.items()} for line in posterior.history]
    return partial(_of_flow, posterior.flow), took | {"rounds": rounds}, posterior.summary()


def train(method: str, problem: Problem, c: Config, budget: float) -> tuple[Drawn, dict[str, Any]]:
    """A guide by SVI for so many CPU seconds."""
    guide, began = GUIDES[method](problem.model), time.process_time()
    ours = method in ("autoflow", "traced")
    if ours:
        guide.locate(*problem.args)
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": c.our_learning_rate if ours else c.learning_rate},
            "lr_lambda": lambda _: 0.05 ** min(1.0, (time.process_time() - began) / budget),
        },
        {"clip_norm": c.clip},
    )
    elbo = (fp.svi.PathELBO if ours else Trace_ELBO)(num_particles=c.particles, vectorize_particles=True)
    kind = partial(fp.svi.CompiledSVI, compile=False) if method == "traced" else SVI
    svi: Any = kind(problem.model, guide, optimizer, elbo)
    steps = bad = 0
    while time.process_time() - began < budget:
        bad += not math.isfinite(svi.step(*problem.args))
        steps += 1
        if steps % 20 == 0:
            optimizer.step()
    return partial(_drawn, guide, problem), {"steps": steps, "infinite_losses": bad}


def _of_flow(flow: fp.Flow, count: int) -> tuple[Tensor, Tensor]:
    return flow.rsample_and_log_prob((count,))


def _drawn(guide: Any, problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    q = guide.get_posterior(*problem.args)
    u = q.rsample((count,))
    return u, q.log_prob(u)


@torch.no_grad()
def judged(problem: Problem, draw: Drawn, count: int, summary: Summary | None) -> dict[str, Any]:
    """KL, k-hat, ESS and the errors against the reference draws, from fresh draws."""
    density = ModelDensity(problem.model, problem.wide)
    points, weights = [], []
    for at in range(0, count, 1000):
        u, log_q = draw(min(1000, count - at))
        points.append(u.double())
        weights.append(density(u.double()) - log_q.double())
    u, log_w = torch.cat(points), torch.cat(weights)
    j = judge(log_w)
    parts = [density.values(part) for part in u.split(1000)]
    values = {name: torch.cat([p[name] for p in parts]) for name in density.sites}
    found = {
        "kl": problem.log_z - j.elbo,
        "kl_se": j.elbo_se,
        "khat": j.khat,
        "ess": j.ess,
        "elbo": j.elbo,
        "log_evidence": j.log_evidence,
        "log_evidence_se": j.log_evidence_se,
    }
    raw = errors(summarise(values, torch.full((len(u),), 1.0 / len(u), dtype=torch.float64)), problem)
    if summary is None:
        usable = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
        summary = summarise(values, psis(usable)[0].exp())
    return found | raw | {f"corrected_{k}": v for k, v in errors(summary, problem).items()}


def errors(summary: Summary, problem: Problem) -> dict[str, float]:
    """Errors of means in reference sds, ratios of sds, over all numbers of all sites that are not constant."""
    shifts, ratios = [], []
    for name, reference in problem.reference.items():
        mean, sd = reference.mean(0), reference.std(0)
        shifts.append(((summary[name]["mean"].double() - mean).abs() / sd).flatten())
        ratios.append((summary[name]["sd"].double() / sd).flatten())
    shift, ratio = torch.cat(shifts), torch.cat(ratios)
    return {
        "mean_error_max": float(shift.max()),
        "mean_error_mean": float(shift.mean()),
        "sd_ratio_min": float(ratio.min()),
        "sd_ratio_max": float(ratio.max()),
    }


def one(method: str, problem: Problem, c: Config, seed: int, budget: float) -> dict[str, Any]:
    """A line: a method on a posterior, or the error that it ended with."""
    line: dict[str, Any] = {"posterior": problem.name, "method": method, "dtype": c.dtype}
    torch.manual_seed(seed)
    began, summary = time.process_time(), None
    try:
        if method == "fit_posterior":
            draw, took, summary = fit(problem, c, seed)
        else:
            with default_dtype(problem.args[0].dtype):
                draw, took = train(method, problem, c, budget)
        line |= {"fit_cpu": round(time.process_time() - began, 1), **took}
        return line | {k: float(f"{v:.10g}") for k, v in judged(problem, draw, c.draws, summary).items()}
    except Exception as error:  # whatever another library raises is a result here
        return line | {
            "fit_cpu": round(time.process_time() - began, 1),
            "error": f"{type(error).__name__}: {error}"[:300],
        }


def _time_of_fit(name: str, c: Config, seed: int) -> float:
    """CPU seconds that fit_posterior took by the saved results: this seed's, or any."""
    lines = saved(HERE) if (HERE / "results.jsonl").is_file() else []
    found = [x for x in lines if (x["posterior"], x["method"], x["dtype"]) == (name, "fit_posterior", c.dtype)]
    return next((x["fit_cpu"] for x in reversed(found) if x["seed"] == seed), found[-1]["fit_cpu"] if found else LEAST)


def run(c: Config, seed: int) -> Iterator[dict[str, Any]]:
    """Every method on every posterior."""
    logging.getLogger("pyro").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = available() if c.posteriors == ("",) else c.posteriors
    missing = sorted({*names} - {*available(), "toy"})
    if missing or not names:
        print(f"{MISSING} (missing: {', '.join(missing) or 'all'})")
        return
    unknown = sorted({*c.methods} - {"fit_posterior", *GUIDES})
    if unknown:
        raise SystemExit(f"unknown method {', '.join(unknown)}; there are fit_posterior, {', '.join(GUIDES)}")
    for name in names:
        problem = load(name, getattr(torch, c.dtype))
        taken = _time_of_fit(name, c, seed)
        for method in c.methods:
            with torch.random.fork_rng(), pyro.get_param_store().scope(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                line = one(method, problem, c, seed, c.budget or max(LEAST, taken))
            taken = line["fit_cpu"] if method == "fit_posterior" else taken
            yield line


if __name__ == "__main__":
    run_all(run, Config, SMOKE, HERE)
