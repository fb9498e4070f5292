"""Claim: a flowpath flow is a density estimator of sbi: NPE with it does what NPE with sbi's own does.

Two moons (Greenberg et al. 2019, arXiv:1905.07488): two parameters, two data, a posterior of two crescents. sbi trains
q(theta | x) on simulations, once with a flowpath flow behind `fp.to_nflows` and once with its own neural spline flow,
and is asked for the posterior at the benchmark's observations. Draws are compared with the reference posterior's by a
classifier, C2ST ("Benchmarking Simulation-Based Inference", Lueckmann et al. 2021, arXiv:2101.04653): 0.5 cannot tell
them apart. There NPE has 0.725, 0.606, 0.542 at 10^3, 10^4, 10^5 simulations. Beside it the held-out log density, and
what it takes to move sbi's flow into flowpath: the largest |difference| of its log densities, wrapped and native.

    pip install sbi
    FLOWPATH_DATA=folder python experiments/sbi_npe/run.py [key=value ...] [--seeds 0..2] [--smoke]

The folder holds sbibm/two_moons.npz with obs_i `(2,)` and ref_i `(10000, 2)`; without it there is no C2ST.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

import flowpath as fp
from experiments.runner import run_all

MISSING = "skipped: sbi is not installed; pip install sbi"


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides. `methods`: flowpath, sbi."""

    methods: tuple[str, ...] = ("flowpath", "sbi")
    data: Path = Path()
    simulations: int = 10000
    test_rows: int = 5000
    batch_size: int = 200
    epochs: int = 300  # at most; sbi stops early
    observations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    samples: int = 10000
    transforms: int = 5
    hidden: int = 50
    bins: int = 10


SMOKE = {
    "simulations": 200,
    "test_rows": 50,
    "epochs": 2,
    "observations": (1,),
    "samples": 50,
    "transforms": 2,
    "hidden": 8,
    "bins": 4,
}


class Silent:
    """A tracker for sbi, which without one writes TensorBoard files into the working directory."""

    log_dir: str | None = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_params(self, params: dict[str, Any]) -> None:
        pass

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        pass

    def flush(self) -> None:
        pass


def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
    """x `(N, 2)`: a point of a half circle's thin band, moved by |theta_1 + theta_2| and theta_2 - theta_1."""
    a = torch.pi * (torch.rand(len(theta), generator=generator) - 0.5)
    r = 0.1 + 0.01 * torch.randn(len(theta), generator=generator)
    moon = torch.stack([r * a.cos() + 0.25, r * a.sin()], -1)
    s, d = theta.sum(-1), theta[:, 1] - theta[:, 0]
    return moon + torch.stack([-s.abs(), d], -1) / 2.0**0.5


def pairs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """theta ~ U(-1, 1)^2 and x, `(rows, 2)` each."""
    generator = torch.Generator().manual_seed(seed)
    theta = 2.0 * torch.rand(rows, 2, generator=generator) - 1.0
    return theta, simulate(theta, generator)


def estimator(method: str, c: Config) -> Any:
    """What sbi's NPE takes as `density_estimator`: a function of the first batch."""
    if method == "sbi":
        from sbi.neural_nets import posterior_nn

        return posterior_nn("nsf", num_transforms=c.transforms, hidden_features=c.hidden, num_bins=c.bins)

    def build(theta: Tensor, x: Tensor) -> Any:
        from sbi.neural_nets.estimators import NFlowsFlow

        widths = (c.hidden, c.hidden)
        flow = fp.nsf(2, context=2, transforms=c.transforms, hidden_features=widths, bins=c.bins, whiten="none")
        whiten = fp.Whiten(2).set_from(theta)
        flow = fp.Flow(fp.Chain([whiten, flow.transform]), flow.base, fp.Standardize(2).set_from(x))
        return NFlowsFlow(fp.to_nflows(flow), input_shape=theta[0].shape, condition_shape=x[0].shape)

    return build


def references(c: Config) -> dict[int, tuple[Tensor, Tensor]]:
    """Observation `(2,)` and reference draws `(10000, 2)` by number; empty where there is no file."""
    path = c.data if c.data != Path() else Path(os.environ.get("FLOWPATH_DATA", "")) / "sbibm" / "two_moons.npz"
    if not path.is_file():
        return {}
    file = np.load(path)
    return {i: (torch.from_numpy(file[f"obs_{i}"]), torch.from_numpy(file[f"ref_{i}"])) for i in c.observations}


def moved(net: Any, theta: Tensor, x: Tensor) -> dict[str, float]:
    """Largest |difference| of log densities when sbi's flow comes into flowpath, in float64."""
    net, theta, x = net.double().eval(), theta.double(), x.double()
    want = net.log_prob(theta, x)
    gaps = {k: fp.from_nflows(net, native=k == "native").log_prob(theta, x) - want for k in ("wrapped", "native")}
    return {f"gap_{k}": float(gap.abs().max()) for k, gap in gaps.items()}


def run(c: Config, seed: int) -> Iterator[dict[str, Any]]:
    """Every method asked for."""
    if importlib.util.find_spec("sbi") is None:
        print(MISSING)
        return
    warnings.filterwarnings("ignore")  # sbi's and nflows' deprecations
    from sbi.inference import NPE
    from sbi.utils import BoxUniform
    from sbi.utils.metrics import c2st

    torch.set_num_threads(1)
    known, (theta, x) = references(c), pairs(c.simulations, seed)
    test = pairs(c.test_rows, 10_000 + seed)
    for method in c.methods:
        torch.manual_seed(seed)
        prior = BoxUniform(-torch.ones(2), torch.ones(2))
        npe = NPE(prior, density_estimator=estimator(method, c), show_progress_bars=False, tracker=Silent())
        trained = npe.append_simulations(theta, x).train(training_batch_size=c.batch_size, max_num_epochs=c.epochs)
        posterior = npe.build_posterior(trained)
        with torch.no_grad():
            result = {"method": method, "log_q": float(trained.log_prob(test[0][None], test[1]).mean())}
            for i, (observed, reference) in known.items():
                draws = posterior.sample((c.samples,), x=observed, show_progress_bars=False)
                result[f"c2st_{i}"] = float(c2st(reference[: c.samples], draws, seed=1))
            if known:
                result["c2st"] = sum(result[f"c2st_{i}"] for i in known) / len(known)
            if method == "sbi":
                result |= moved(trained.net, *test)
        yield {**result, "parameters": sum(p.numel() for p in trained.parameters())}


if __name__ == "__main__":
    run_all(run, Config, SMOKE, Path(__file__).parent)
