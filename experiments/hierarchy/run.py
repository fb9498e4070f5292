"""Claim: fit_posterior takes a hierarchy of a thousand groups, D about 2,000, in five CPU minutes.

A logistic regression whose intercept and slope differ by group, ten rows a group, four hyperparameters. The reference
is Pyro's NUTS on the same posterior, the groups' offsets standardised, its gradient traced. One line for NUTS, one for
fit_posterior: mean, sd and Monte Carlo error of each hyperparameter, and for the fit its distance from NUTS in NUTS'
sds, ELBO, k-hat, ESS.

    python experiments/hierarchy/run.py [groups=1000] [time_limit=300] [draws=2500] [--smoke]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

import flowpath as fp
from experiments.runner import run_all
from flowpath.svi.refining import potential_of

GLOBALS = ("mean_a", "mean_b", "sd_a", "sd_b")


@dataclass(frozen=True)
class Config:
    groups: int = 1000
    rows: int = 10  # of each group
    time_limit: float = 300.0  # seconds of the fit; on a loaded machine fewer of them are CPU seconds
    draws: int = 2500  # of NUTS
    warmup: int = 400


SMOKE = {"groups": 60, "rows": 3, "time_limit": 3.0, "draws": 60, "warmup": 100}


def data(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, group and y of every row."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(config.groups).repeat_interleave(config.rows)
    x = torch.randn(len(group), generator=generator)
    a = 0.5 + torch.randn(config.groups, generator=generator)
    b = -0.3 + 0.7 * torch.randn(config.groups, generator=generator)
    y = (torch.rand(len(group), generator=generator) < torch.sigmoid(a[group] + b[group] * x)).float()
    return x, group, y


def model(x: Tensor, group: Tensor, y: Tensor, groups: int, standard: bool = False) -> None:
    """The regression; `standard` samples the groups' offsets in units of their sds."""
    mean_a, mean_b = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in GLOBALS[:2])
    sd_a, sd_b = (pyro.sample(name, dist.HalfNormal(2.0)) for name in GLOBALS[2:])
    with pyro.plate("groups", groups):
        if standard:
            a = mean_a + sd_a * pyro.sample("a", dist.Normal(0.0, 1.0))
            b = mean_b + sd_b * pyro.sample("b", dist.Normal(0.0, 1.0))
        else:
            a, b = pyro.sample("a", dist.Normal(mean_a, sd_a)), pyro.sample("b", dist.Normal(mean_b, sd_b))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a[..., group] + b[..., group] * x), obs=y)


def nuts(config: Config, rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Means, sds and errors of the hyperparameters by Pyro's NUTS."""
    density = fp.svi.ModelDensity(model, (*rows, config.groups, True))

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = density.value_and_grad(z.unsqueeze(0))
        return -value[0], -slope[0]

    kernel = NUTS(potential_fn=potential_of(fp.svi.trace(value_and_grad, [density.start])), max_tree_depth=8)
    start = 0.1 * torch.randn(density.dim)
    mcmc = MCMC(
        kernel,
        num_samples=config.draws,
        warmup_steps=config.warmup,
        initial_params={"z": start},
        disable_progbar=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run()
    values = density.values(mcmc.get_samples()["z"])
    effective = {n: float(effective_sample_size(values[n].reshape(1, -1), 0, 1)) for n in GLOBALS}
    return {
        "mean": {n: float(values[n].mean()) for n in GLOBALS},
        "sd": {n: float(values[n].std()) for n in GLOBALS},
        "error": {n: float(values[n].std()) / effective[n] ** 0.5 for n in GLOBALS},
    }


def run(config: Config, seed: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(seed)
    rows = data(config, seed)
    reference = nuts(config, rows)
    yield {"method": "NUTS", **reference}
    began = time.process_time()
    posterior = fp.svi.fit_posterior(
        model, *rows, config.groups, time_limit=config.time_limit, max_steps=None, draws=4000, seed=seed
    )
    found = posterior.summary()
    yield {
        "method": "fit_posterior",
        "mean": {n: float(found[n]["mean"]) for n in GLOBALS},
        "sd": {n: float(found[n]["sd"]) for n in GLOBALS},
        "error": {n: float(found[n]["mcse"]) for n in GLOBALS},
        "distance": {n: (float(found[n]["mean"]) - reference["mean"][n]) / reference["sd"][n] for n in GLOBALS},
        "elbo": posterior.elbo,
        "khat": posterior.khat,
        "ess": posterior.ess,
        "kl": None if posterior.judgement is None else posterior.judgement.gap,
        "steps": posterior.steps,
        "fit_cpu_seconds": round(time.process_time() - began, 1),
        "verdict": posterior.verdict(),
    }


if __name__ == "__main__":
    run_all(run, Config, SMOKE, Path(__file__).parent)
