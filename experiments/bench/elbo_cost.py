"""What a step of `fp.svi.PathELBO` costs beside one of `pyro.infer.Trace_ELBO`, by guide.

    python -m experiments.bench.elbo_cost [rounds]

Eight schools (centred), 16 vectorised particles, one thread; CPU time of loss and backward. The two take turns, and the
median ratio of a turn is printed with its quartiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal

import flowpath as fp

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GUIDES: dict[str, Callable[[], pyro.nn.PyroModule]] = {
    "AutoFlow (iaf)": lambda: fp.svi.AutoFlow(schools),
    "AutoFlow (realnvp)": lambda: fp.svi.AutoFlow(schools, "realnvp"),
    "AutoIAFNormal": lambda: AutoIAFNormal(schools, hidden_dim=[64], num_transforms=3),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(schools),
}


def schools() -> None:
    """mu, tau and eight effects."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.set_num_threads(1)
    how = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 1}
    print("| guide | Trace_ELBO, ms | PathELBO / Trace_ELBO |\n|---|---|---|")
    for name, make in GUIDES.items():
        pyro.clear_param_store()
        guide, ratios, plain = make(), [], []
        elbos = (Trace_ELBO(**how), fp.svi.PathELBO(**how, estimator=fp.Pathwise(0.0)))
        for i in range(rounds + 3):
            spent = []
            for elbo in elbos:
                start = time.process_time()
                elbo.loss_and_grads(schools, guide)
                spent.append(time.process_time() - start)
                guide.zero_grad()
            if i >= 3:
                ratios.append(spent[1] / spent[0])
                plain.append(1e3 * spent[0])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {statistics.median(plain):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
