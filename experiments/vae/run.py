"""Claims: one pathwise sample trains a VAE where the score function hardly does; a flow as posterior does better.

The model is p(z) = N(0, I), p(x | z) = Bernoulli(decoder(z)) on binarised 28 x 28 images. The posterior q(z | x) is a
flow whose context are the encoder's features, z = mu(x) + sigma(x) u with u ~ N(0, I) ("gaussian"), or with u from a
conditional IAF ("iaf") or spline flow ("spline") that looks at the same features. One objective for all,

    ELBO = E_q[log p(x | z) + log p(z) - log q(z | x)],

its gradient by an estimator of flowpath: pathwise with ONE sample, or the score function, without a baseline (one
sample) and with leave-one-out (two samples). On the way, each snapshot gives the bound on the test rows against the CPU
time spent on training, and each estimator's variance in the encoder's and the posterior's parameters at that point: per
sample and per row. Afterwards log p(x) of test rows by importance weighting.

    FLOWPATH_DATA=folder python experiments/vae/run.py [key=value ...] [--seeds 0..2] [--smoke]
    FLOWPATH_DATA=folder python experiments/vae/run.py full=true device=cuda               # sizes as published

full=true is the one-layer model of "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2015,
arXiv:1509.00519): 50 latents, all 60,000 rows, all 10,000 test rows.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowpath as fp
from experiments.runner import run_all
from experiments.vae.data import MISSING, blobs, images


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides. `methods`: of METHODS."""

    methods: tuple[str, ...] = ("pathwise", "score", "leave-one-out", "iaf", "spline")
    data: Path = Path()
    rows: int = 10000
    test_rows: int = 1000
    weighted_rows: int = 500  # test rows for log p(x)
    weighted_samples: int = 500
    steps: int = 3000
    batch_size: int = 100
    learning_rate: float = 2e-3
    hidden: int = 200
    latent: int = 20
    flow_hidden: int = 100
    snapshots: tuple[int, ...] = (0, 100, 250, 500, 1000, 2000, 3000)
    repeats: int = 25  # gradients behind a variance
    synthetic: bool = False  # blobs where there are no images
    device: str = "cpu"
    full: bool = False  # the published size


SMOKE = {
    "rows": 60,
    "test_rows": 20,
    "weighted_rows": 4,
    "weighted_samples": 10,
    "steps": 2,
    "batch_size": 20,
    "hidden": 16,
    "latent": 4,
    "flow_hidden": 8,
    "snapshots": (0, 2),
    "repeats": 2,
    "synthetic": True,
}
FULL: dict[str, Any] = {
    "rows": 60000,
    "test_rows": 10000,
    "weighted_rows": 10000,
    "steps": 120000,
    "latent": 50,
    "learning_rate": 1e-3,
    "flow_hidden": 200,
    "snapshots": (0, 100, 1000, 3000, 10000, 30000, 60000, 120000),
}
# method -> posterior, estimator, samples
METHODS: dict[str, tuple[str, fp.Estimator, int]] = {
    "pathwise": ("gaussian", fp.Pathwise(), 1),
    "path": ("gaussian", fp.Pathwise(0.0), 1),
    "score": ("gaussian", fp.Score(baseline=None), 1),
    "leave-one-out": ("gaussian", fp.Score(), 2),
    "iaf": ("iaf", fp.Pathwise(), 1),
    "spline": ("spline", fp.Pathwise(), 1),
}
COMPARED = ("pathwise", "path", "score", "leave-one-out")  # estimators at the snapshots of a Gaussian posterior


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for a, b in pairwise(widths[1:]):
        layers += [nn.Tanh(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def posterior(kind: str, c: Config) -> fp.Flow:
    """q(z | x) as a flow that takes an image as its context: mu(x) + sigma(x) u, with u normal or from a flow."""
    heads = fp.MLP(0, c.latent, num_params=2, context=c.hidden, hidden_features=())
    layers: list[fp.Transform] = [fp.Inverse(fp.Elementwise(c.latent, fp.Affine(), heads, context=c.hidden))]
    widths = (c.flow_hidden, c.flow_hidden)
    if kind == "iaf":
        layers.append(fp.iaf(c.latent, c.hidden, transforms=2, hidden_features=widths, whiten="none").transform)
    if kind == "spline":
        layers.append(fp.nsf(c.latent, c.hidden, transforms=2, hidden_features=widths, whiten="none").transform)
    encoder = nn.Sequential(mlp(784, c.hidden, c.hidden), nn.Tanh())
    return fp.Flow(fp.Chain(layers), fp.StandardNormal(c.latent), encoder)


class VAE(nn.Module):
    """The negative ELBO of rows x `(B, 784)` as an objective; `estimator` carries the gradient."""

    def __init__(self, kind: str, c: Config) -> None:
        super().__init__()
        self.q, self.decoder = posterior(kind, c), mlp(c.latent, c.hidden, c.hidden, 784)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) for x `(B, 784)` and z `(n, B, latent)`: `(n, B)`."""
        logits = self.decoder(z)
        log_x = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return log_x - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def forward(self, x: Tensor, estimator: fp.Estimator, num_samples: int) -> Tensor:
        values = estimator.surrogate(lambda z: -self.log_joint(x, z), self.q(x), num_samples, log_q_weight=1.0)
        return values.mean()

    @torch.no_grad()
    def log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z | x) of draws z from the posterior: `(num_samples, B)`."""
        z, log_q = self.q.rsample_and_log_prob(num_samples, x)
        return self.log_joint(x, z) - log_q


def gradient_table(model: VAE, x: Tensor, names: tuple[str, ...], c: Config) -> dict[str, Any]:
    """Per-sample, per-row variance and SNR of one gradient over rows x in the posterior's parameters."""
    losses = {name: (lambda e=e, n=n: model(x, e, n)) for name, (_, e, n) in METHODS.items() if name in names}
    table = fp.gradient_variance(losses, model.q.parameters(), repeats=c.repeats, seed=1)
    return {
        "variance": {r.name: r.variance * len(x) * METHODS[r.name][2] for r in table},
        "snr": {r.name: r.snr for r in table},
        "milliseconds": {r.name: r.milliseconds for r in table},
    }


def snapshot(model: VAE, test: Tensor, names: tuple[str, ...], c: Config) -> dict[str, Any]:
    """Bound per image on the test rows, and the gradients' table on the first batch of them."""
    bound = torch.cat([model.log_weights(x, 4).mean(0) for x in test.split(500)])
    return {"bound": float(bound.mean()), **gradient_table(model, test[: c.batch_size], names, c)}


def fit(method: str, train: Tensor, test: Tensor, c: Config) -> tuple[VAE, list[dict[str, Any]]]:
    """Adam on batches in a fresh order each epoch; the snapshots on the way."""
    kind, estimator, samples = METHODS[method]
    model = VAE(kind, c).to(c.device)
    optimizer = torch.optim.Adam(model.parameters(), c.learning_rate)
    names = COMPARED if kind == "gaussian" else (method,)
    clock = time.process_time if c.device == "cpu" else time.perf_counter
    rows = []
    spent, order = 0.0, torch.empty(0, dtype=torch.long)
    for step in range(c.steps + 1):
        if step in c.snapshots:
            rows.append({"step": step, "time": round(spent, 3), **snapshot(model, test, names, c)})
        if step == c.steps:
            break
        start = clock()
        if len(order) < c.batch_size:
            order = torch.randperm(len(train), device=train.device)
        x, order = train[order[: c.batch_size]], order[c.batch_size :]
        optimizer.zero_grad()
        model(x, estimator, samples).backward()
        optimizer.step()
        spent += clock() - start
    return model, rows


def weighted(model: VAE, test: Tensor, c: Config) -> dict[str, float]:
    """log p(x) by importance weighting, beside the bound from the same draws, and the weights' mean ESS."""
    log_w = torch.cat([model.log_weights(x, c.weighted_samples) for x in test[: c.weighted_rows].split(25)], 1)
    log_p, _ = fp.log_evidence(log_w)
    return {
        "log_p": float(log_p.mean()),
        "log_p_error": float(log_p.std() / len(log_p) ** 0.5),
        "bound": float(log_w.mean()),
        "gap": float((log_p - log_w.mean(0)).mean()),
        "ess": float(fp.ess(log_w).mean()),
    }


def run(c: Config, seed: int) -> Iterator[dict[str, Any]]:
    """Every method asked for."""
    c = replace(c, **FULL) if c.full else c
    unknown = set(c.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"expected methods of {', '.join(METHODS)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    found = images(c.data, c.rows, c.test_rows) or (blobs(c.rows, c.test_rows) if c.synthetic else None)
    if found is None:
        print(MISSING)
        return
    name, train, test = found
    train, test = train.to(c.device), test.to(c.device)
    for method in c.methods:
        torch.manual_seed(seed)
        model, rows = fit(method, train, test, c)
        yield {"data": name, "method": method, **weighted(model, test, c), "rows": rows}


if __name__ == "__main__":
    run_all(run, Config, SMOKE, Path(__file__).parent)
