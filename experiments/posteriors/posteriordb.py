"""The posteriors to be fitted: where their data lie, their reference draws and log evidences.

Files `posteriordb/NAME.npz` under the folder that FLOWPATH_DATA names (unset: data/ in the project), of
github.com/stan-dev/posteriordb (BSD-3): `data_json` the data, `names` and `draws` the reference draws `(10000, P)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from experiments.posteriors import models

Values = dict[str, Tensor]
Numbers = Mapping[str, Any]  # tensors, and sizes as integers

MISSING = (
    "skipped: no data. Fetch data and reference draws from github.com/stan-dev/posteriordb (BSD-3), store each "
    "posterior as posteriordb/NAME.npz with data_json (the data), names and draws (the 10,000 reference draws, one "
    "column a parameter) in a folder, and set FLOWPATH_DATA to that folder; --smoke runs without"
)


@dataclass(frozen=True)
class Problem:
    """A posterior, ready to be fitted.

    Attributes:
        name: of it; model: the Pyro model.
        args: its arguments, of the dtype asked for; wide: the same in float64.
        reference: draws by site, float64 `(n, *shape)`.
        log_z: log evidence, nats.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    wide: tuple[Tensor, ...]
    reference: Values
    log_z: float


@dataclass(frozen=True)
class Source:
    """How a file becomes a Problem: `args` of its data, `sites` or `reference` of its draws."""

    file: str
    model: Callable[..., None]
    args: Callable[[Numbers], tuple[Tensor, ...]]
    log_z: float
    sites: tuple[str, ...] = ()
    reference: Callable[[Values, Numbers], Values] | None = None


def folder() -> Path:
    """Where the files are, whether or not they are there."""
    data = os.environ.get("FLOWPATH_DATA") or Path(__file__).resolve().parents[2] / "data"
    return Path(data) / "posteriordb"


def available() -> list[str]:
    """The posteriors whose file is there."""
    return [name for name, source in SOURCES.items() if (folder() / f"{source.file}.npz").is_file()]


def load(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A posterior by its name, or "toy", which needs no file."""
    if name == "toy":
        return _toy(dtype)
    source = SOURCES[name]
    with np.load(folder() / f"{source.file}.npz") as file:
        data = {k: _tensor(v) for k, v in json.loads(str(file["data_json"])).items()}
        draws = dict(zip(map(str, file["names"]), torch.from_numpy(file["draws"].astype(np.float64)).T, strict=True))
    found = source.reference(draws, data) if source.reference else {site: _site(draws, site) for site in source.sites}
    args = source.args(data)
    return Problem(name, source.model, tuple(a.to(dtype) for a in args), args, found, source.log_z)


def _tensor(value: Any) -> Any:
    return value if isinstance(value, int) else torch.tensor(value, dtype=torch.float64)


def _site(draws: Values, site: str) -> Tensor:
    """`(n,)`, or `(n, K)` from the columns site[1] ... site[K]."""
    return draws[site] if site in draws else torch.stack([v for k, v in draws.items() if k.startswith(f"{site}[")], -1)


def _toy(dtype: torch.dtype) -> Problem:
    """Two coefficients, six rows: Gaussian evidence and posterior in closed form."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=generator).double(), torch.randn(6, generator=generator).double()
    precision = torch.eye(2).double() + x.T @ x
    evidence = MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double() + x @ x.T).log_prob(y)
    noise = torch.randn(10_000, 2, generator=generator).double()
    draws = torch.linalg.solve(precision, x.T @ y) + noise @ torch.linalg.inv(torch.linalg.cholesky(precision))
    return Problem("toy", models.toy, (x.to(dtype), y.to(dtype)), (x, y), {"beta": draws}, float(evidence))


# -- arguments of data, references of draws, where they are more than their columns


def _earnings(d: Numbers) -> tuple[Tensor, ...]:
    return torch.stack([torch.ones_like(d["height"]), d["height"]], -1), d["earn"]


def _kids(d: Numbers) -> tuple[Tensor, ...]:
    school, iq = d["mom_hs"], d["mom_iq"]
    return torch.stack([torch.ones_like(iq), school, iq, school * iq], -1), d["kid_score"]


def _mesquite(d: Numbers) -> tuple[Tensor, ...]:
    logs = [d[k].log() for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return torch.stack([torch.ones_like(d["group"]), *logs, d["group"]], -1), d["weight"].log()


def _lags(d: Numbers) -> tuple[Tensor, ...]:
    k, y = d["K"], d["y"]
    return torch.stack([y[k - 1 - i : len(y) - 1 - i] for i in range(k)], -1), y[k:]


def _standardised(r: Values, d: Numbers) -> Values:
    theta, mu, tau = _site(r, "theta"), r["mu"], r["tau"]
    return {"theta_trans": (theta - mu[:, None]) / tau[:, None], "mu": mu, "tau": tau}


def _share(r: Values, d: Numbers) -> Values:
    return {k: r[k] for k in ("mu", "alpha0", "alpha1")} | {"beta1_frac": r["beta1"] / (1.0 - r["alpha1"])}


def _noise(r: Values, d: Numbers) -> Values:
    scale, f = models.factor(d["x"], r["alpha"], r["rho"]), _site(r, "f")
    noise = torch.linalg.solve_triangular(scale, f[..., None], upper=False)[..., 0]
    return {"rho": r["rho"], "alpha": r["alpha"], "f_tilde": noise}


# Log evidences were computed for this project by importance sampling from flows fitted to the reference draws, to
# 0.005 nat; fits to these posteriors, with ESS of 99 %, put gp_pois_regr's lower by 0.015, eight_schools_centered's by
# 0.007.
SOURCES: dict[str, Source] = {
    "eight_schools_noncentered": Source(
        "eight_schools-eight_schools_noncentered",
        models.schools_noncentered,
        lambda d: (d["y"], d["sigma"]),
        -31.3110,
        reference=_standardised,
    ),
    "eight_schools_centered": Source(
        "eight_schools-eight_schools_centered",
        models.schools_centered,
        lambda d: (d["y"], d["sigma"]),
        -31.3137,
        ("theta", "mu", "tau"),
    ),
    "arK": Source("arK-arK", models.autoregression, _lags, 58.5870, ("alpha", "beta", "sigma")),
    "garch11": Source(
        "garch-garch11", models.garch, lambda d: (d["y"], torch.as_tensor(d["sigma1"])), -451.0000, reference=_share
    ),
    "kidscore_interaction": Source(
        "kidiq-kidscore_interaction", models.kidscore_interaction, _kids, -1872.8148, ("beta", "sigma")
    ),
    "logmesquite": Source("mesquite-logmesquite", models.flat_regression, _mesquite, -20.5263, ("beta", "sigma")),
    "earn_height": Source("earnings-earn_height", models.flat_regression, _earnings, -13405.7187, ("beta", "sigma")),
    "sblrc": Source("sblrc-blr", models.sblrc, lambda d: (d["X"], d["y"]), -194.9669, ("beta", "sigma")),
    "gp_pois_regr": Source(
        "gp_pois_regr-gp_pois_regr",
        models.poisson_process,
        lambda d: (d["x"], d["k"]),
        -47.6065,
        reference=_noise,
    ),
    "low_dim_gauss_mix": Source(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        models.mixture,
        lambda d: (d["y"],),
        -2115.6836,
        ("mu", "sigma", "theta"),
    ),
    "hmm_drive_0": Source(
        "bball_drive_event_0-hmm_drive_0",
        models.drive,
        lambda d: (d["alpha"], d["u"], d["v"]),
        -1902.9880,
        ("theta1", "theta2", "phi", "lambda"),
    ),
}
