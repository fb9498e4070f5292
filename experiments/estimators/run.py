"""Claims: pathwise gradients beat the score function as dimensions grow, path gradients beat both near the optimum.

Five parts; per-sample variances throughout, so that estimators with several samples compare with those of one.

- dimension: closed forms of two costs against the dimension, and of a KL against misfit, with measurements;
- cost: Mohamed's three costs against their parameter, where the score function sometimes wins;
- training: a flow on a Gaussian and on Neal's funnel in 10 dimensions: every estimator at frozen snapshots;
- noise: the variance that scrambled Sobol noise removes, in 2, 10 and 50 dimensions;
- accuracy: what total, path and auto buy at equal steps: KL, ESS, k-hat, marginal distance to exact samples.

    python experiments/estimators/run.py [key=value ...] [--seeds 0..2] [--smoke]   # then plot.py beside it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

import flowpath as fp
from experiments.estimators import closed
from experiments.estimators.targets import TARGETS, Target
from experiments.runner import run_all


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides."""

    parts: tuple[str, ...] = ("dimension", "cost", "noise", "training", "accuracy")
    targets: tuple[str, ...] = ("gaussian", "funnel", "banana")
    dimensions: tuple[int, ...] = (10, 50)
    replicates: int = 20000  # per-sample gradients behind a variance; times dimension at most 400,000
    group: int = 8  # samples that share leave-one-out baselines
    steps: int = 500
    num_samples: int = 64
    learning_rate: float = 3e-3
    transforms: int = 6
    hidden: int = 64
    snapshots: tuple[int, ...] = (0, 30, 100, 250, 500)
    repeats: int = 60  # gradients behind a variance at a snapshot
    draws: int = 20000  # behind KL, ESS and Wasserstein distances


SMOKE = {
    "replicates": 100,
    "steps": 3,
    "num_samples": 16,
    "transforms": 2,
    "hidden": 8,
    "snapshots": (0, 3),
    "repeats": 3,
    "draws": 200,
    "dimensions": (10,),
}
ESTIMATORS = {"total": fp.Pathwise(1.0), "path": fp.Pathwise(0.0), "auto": fp.Pathwise("auto")}
Rows = list[dict[str, Any]]


# --- closed forms -------------------------------------------------------------------------------------------------


def variance(loss: Tensor, leaves: list[Tensor], group: int) -> float:
    """Per-sample variance, summed over the leaves `(replicates, D)` and averaged over D."""
    grads = torch.autograd.grad(loss, leaves)
    return group * sum(float(g.var(0).mean()) for g in grads)


def dimension(c: Config) -> Rows:
    """|z|^2 and a KL against the dimension, and the KL against s."""
    rows: Rows = []
    for d in (1, 2, 5, 10, 20, 50, 100):
        rows.append({"cost": "norm", "x": d, "closed": closed.norm(d, 1.0, c.group), "measured": norm(d, c)})
        s = np.where(np.arange(d) % 2 == 0, 0.5, 1.25)
        rows.append({"cost": "kl", "x": d, "closed": closed.divergence(s, c.group), "measured": divergence(s, c)})
    for width in (0.3, 0.5, 2**-0.5, 0.85, 1.0, 1.2, 1.5):
        s = np.full(2, width)
        rows.append(
            {"cost": "misfit", "x": width, "closed": closed.divergence(s, c.group), "measured": divergence(s, c)}
        )
    return rows


def norm(d: int, c: Config) -> dict[str, float]:
    """Measured variances of `closed.norm`: one mean a replicate, so that one backward gives all gradients."""
    n = min(c.replicates, 400_000 // d)

    def one(estimator: fp.Estimator, group: int) -> float:
        mu = torch.zeros(n, d, dtype=torch.float64, requires_grad=True)
        q = Independent(Normal(mu, 1.0), 1)
        return variance(
            fp.expectation(lambda z: z.square().sum(-1), q, estimator, num_samples=group).sum(), [mu], group
        )

    return {
        "pathwise": one(fp.Pathwise(), 1),
        "score": one(fp.Score(baseline=None), 1),
        "leave-one-out": one(fp.Score(), c.group),
    }


def divergence(s: np.ndarray, c: Config) -> dict[str, float]:
    """Measured variances of `closed.divergence`; "auto" with the weight that `fp.ReverseKL` estimates."""
    n, d = min(c.replicates, 400_000 // len(s)), len(s)

    def one(estimator: fp.Estimator, group: int = 1) -> float:
        mu = torch.zeros(n, d, dtype=torch.float64, requires_grad=True)
        log_s = torch.as_tensor(s).log().expand(n, d).clone().requires_grad_()
        q = Independent(Normal(mu, log_s.exp()), 1)
        values = estimator.surrogate(target, q, group, log_q_weight=1.0)
        return variance(values.mean(0).sum(), [mu, log_s], group)

    def target(z: Tensor) -> Tensor:
        return -Independent(Normal(torch.zeros(d, dtype=torch.float64), 1.0), 1).log_prob(z)

    return {
        "score": one(fp.Score(baseline=None)),
        "leave-one-out": one(fp.Score(), c.group),
        "total": one(fp.Pathwise(1.0)),
        "path": one(fp.Pathwise(0.0)),
        "auto": one(fp.Pathwise(estimated_weight(s))),
    }


def estimated_weight(s: np.ndarray) -> float:
    """The weight of the score part that ReverseKL finds for N(0, diag s^2) as a flow with parameters (mu, log s)."""
    flow = fp.Flow(fp.Inverse(fp.Elementwise(len(s), fp.Affine(log_bound=1e3))), fp.StandardNormal(len(s))).double()
    with torch.no_grad():
        flow.transform.transform.params[0].copy_(torch.as_tensor(s).log())  # type: ignore[union-attr, index]
    objective = fp.ReverseKL(flow, normal_density, num_samples=256, update_every=1)
    for _ in range(30):
        objective()
    return float(objective.score_weight)


COSTS: dict[str, tuple[Callable[..., Any], Callable[[float, float, float], tuple[float, float]], tuple[float, ...]]] = {
    "square": (lambda z, k, m: (z - k) ** 2, closed.square, (-3, -2, -1, 0, 1, 2, 3)),
    "cosine": (lambda z, k, m: m.cos(k * z), closed.cosine, (0.25, 0.5, 1, 1.5, 2, 3, 5)),
    "bump": (lambda z, k, m: m.exp(-k * z**2), closed.bump, (0.1, 0.3, 0.6, 1, 3, 10)),
}


def cost(c: Config) -> Rows:
    """Mohamed's costs at mu = s = 1: variance in mu against k."""
    rows: Rows = []
    for name, (f, formula, grid) in COSTS.items():
        for k in grid:

            def one(estimator: fp.Estimator, group: int, f: Any = f, k: float = k) -> float:
                mu = torch.ones(10 * c.replicates // group, 1, dtype=torch.float64, requires_grad=True)
                loss = fp.expectation(partial(f, k=k, m=torch), Normal(mu, 1.0), estimator, num_samples=group)
                return variance(loss.sum(), [mu], group)

            path, score = formula(k, 1.0, 1.0)
            loo = closed.leave_one_out(partial(f, k=k, m=np), 1.0, 1.0, c.group)
            truth = {"pathwise": path, "score": score, "leave-one-out": loo}
            measured = {
                "pathwise": one(fp.Pathwise(), 1),
                "score": one(fp.Score(baseline=None), 1),
                "leave-one-out": one(fp.Score(), c.group),
            }
            rows.append({"cost": name, "x": k, "closed": truth, "measured": measured})
    return rows


# --- flows --------------------------------------------------------------------------------------------------------


def noise(c: Config) -> Rows:
    """Variance of a batch's gradient with independent noise over that with Sobol noise: a rough flow, normal target."""
    rows: Rows = []
    for d in (2, 10, 50):
        flow = fp.realnvp(d, transforms=4, hidden_features=(c.hidden, c.hidden), whiten="none")
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.5 * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
        for n in (64, 256):
            losses = {
                (kind, sobol): fp.ReverseKL(
                    flow, normal_density, ESTIMATORS[kind], num_samples=n, noise=fp.Sobol() if sobol else None
                )
                for kind in ("total", "path")
                for sobol in (False, True)
            }
            table = fp.gradient_variance({str(k): v for k, v in losses.items()}, flow.parameters(), repeats=c.repeats)
            found = dict(zip(losses, (row.variance for row in table), strict=True))
            gain = {kind: found[kind, False] / found[kind, True] for kind in ("total", "path")}
            rows.append({"features": d, "num_samples": n, "gain": gain})
    return rows


def normal_density(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1)


def steps(objective: fp.ReverseKL, c: Config) -> Iterator[int]:
    """Adam with a cosine schedule; yields the number of steps taken, 0 first."""
    flow = objective.flow
    optimizer = torch.optim.Adam(flow.parameters(), c.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c.steps)
    yield 0
    for step in range(1, c.steps + 1):
        optimizer.zero_grad()
        objective().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100.0)
        optimizer.step()
        schedule.step()
        yield step


def new_flow(features: int, c: Config) -> fp.Flow:
    return fp.realnvp(features, transforms=c.transforms, hidden_features=(c.hidden, c.hidden), whiten="none")


def training(target: Target, c: Config) -> Rows:
    """A flow trained with "auto"; at the snapshots the variance of each estimator in its parameters."""
    objective = fp.ReverseKL(new_flow(10, c), target.log_prob, fp.Pathwise("auto"), num_samples=c.num_samples)
    rows: Rows = []
    for step in steps(objective, c):
        if step in c.snapshots:
            if step == 0:
                objective()  # estimates the first weight
            rows.append({"step": step, **quality(objective.flow, target, c), **snapshot(objective, c)})
    return rows


def snapshot(objective: fp.ReverseKL, c: Config) -> dict[str, Any]:
    """Per-sample variance, SNR of one batch and milliseconds a gradient, by estimator; the flow is left as it is."""
    weight = float(objective.score_weight)
    estimators: Mapping[str, fp.Estimator] = {
        "score": fp.Score(baseline=None),
        "leave-one-out": fp.Score(),
        "total": fp.Pathwise(1.0),
        "path": fp.Pathwise(0.0),
        "auto": fp.Pathwise(weight),
    }
    losses = {
        name: fp.ReverseKL(objective.flow, objective.log_density, e, num_samples=c.num_samples)
        for name, e in estimators.items()
    }
    table = fp.gradient_variance(losses, objective.flow.parameters(), repeats=c.repeats, seed=1)
    return {
        "weight": weight,
        "variance": {row.name: row.variance * c.num_samples for row in table},
        "snr": {row.name: row.snr for row in table},
        "milliseconds": {row.name: row.milliseconds for row in table},
    }


@torch.no_grad()
def quality(flow: fp.Flow, target: Target, c: Config) -> dict[str, float]:
    """KL(q | p), ESS and k-hat of the importance weights, and the mean marginal W1 in standard deviations of p."""
    generator = torch.Generator().manual_seed(12345)
    z, log_q = flow.rsample_and_log_prob(c.draws, generator=generator)
    log_w = (target.log_prob(z) - log_q).double()
    exact, other = (target.from_noise(torch.randn(c.draws, z.shape[-1], generator=generator)) for _ in range(2))
    scale = exact.std(0)
    return {
        "kl": -float(log_w.mean()),
        "kl_error": float(log_w.std() / c.draws**0.5),
        "ess": float(fp.ess(log_w)),
        "khat": fp.psis(log_w)[1],
        "w1": float(((z.sort(0).values - exact.sort(0).values).abs().mean(0) / scale).mean()),
        "w1_floor": float(((other.sort(0).values - exact.sort(0).values).abs().mean(0) / scale).mean()),
    }


def accuracy(target: Target, features: int, estimator: fp.Estimator, c: Config) -> dict[str, float]:
    """Quality after equal steps, and the weight at the end."""
    objective = fp.ReverseKL(new_flow(features, c), target.log_prob, estimator, num_samples=c.num_samples)
    for _ in steps(objective, c):
        pass
    return {**quality(objective.flow, target, c), "weight": float(objective.score_weight)}


def run(c: Config, seed: int) -> Iterator[dict[str, Any]]:
    """Every part asked for."""
    torch.set_num_threads(1)
    for part, work in (("dimension", dimension), ("cost", cost), ("noise", noise)):
        if part in c.parts:
            torch.manual_seed(seed)
            yield {"part": part, "rows": work(c)}
    if "training" in c.parts:
        for name in ("gaussian", "funnel"):
            torch.manual_seed(seed)
            yield {"part": "training", "target": name, "rows": training(TARGETS[name](10), c)}
    if "accuracy" in c.parts:
        for name in c.targets:
            for features in c.dimensions:
                for kind, estimator in ESTIMATORS.items():
                    torch.manual_seed(seed)
                    result = accuracy(TARGETS[name](features), features, estimator, c)
                    yield {"part": "accuracy", "target": name, "features": features, "estimator": kind, **result}


if __name__ == "__main__":
    run_all(run, Config, SMOKE, Path(__file__).parent)
