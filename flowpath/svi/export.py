"""A posterior as ArviZ's container."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowpath.svi.density import ModelDensity

if TYPE_CHECKING:
    from flowpath.svi.posterior import Posterior


def to_arviz(posterior: Posterior, num_samples: int, seed: int | None) -> Any:
    """Draws, log likelihoods and observations, as one chain. See `Posterior.to_arviz`.

    Raises:
        ImportError: ArviZ is not installed.
    """
    arviz = _imported()
    draws = posterior.sample(num_samples, seed=seed)
    groups: dict[str, dict[str, Any]] = {"posterior": {n: _chain(v) for n, v in draws.items()}}
    dims: dict[str, list[str]] = {}
    if posterior.density is not None:
        likelihood, observed, dims = _observations(posterior.density, draws)
        groups |= {"log_likelihood": {n: _chain(v) for n, v in likelihood.items()}, "observed_data": observed}
    groups = {name: group for name, group in groups.items() if group}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, dims=dims)
    return arviz.from_dict(**groups, dims=dims)


def _imported() -> Any:
    """ArviZ, without the notice of its last 0.x versions that 1.0 differs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError:
        raise ImportError("to_arviz needs ArviZ: pip install 'flowpath[arviz]'") from None
    return arviz


def _chain(v: Tensor) -> Any:
    return v.detach().cpu().numpy()[np.newaxis]


def _observations(
    density: ModelDensity, draws: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[str]]]:
    """Log likelihood of each observation at each draw, the observations, and the names of batch dims.

    Rows of a plate that subsamples are left out. With summed-out sites there is no log likelihood: that of an
    observation hangs on their values.
    """
    likelihood: dict[str, list[Tensor]] = {}
    observed: dict[str, Any] = {}
    dims: dict[str, list[str]] = {}
    told = not density.discrete
    for i in range(len(next(iter(draws.values()))) if told else 1):
        with torch.no_grad():
            nodes: dict[str, Any] = density.at({n: v[i] for n, v in draws.items()}).nodes
        sites = {
            n: s for n, s in nodes.items() if s["type"] == "sample" and _drawn(s) and not _in(s, density.subsampled)
        }
        if i == 0:
            dims = {n: _dims(n, s) for n, s in sites.items()}
            observed = {n: s["value"].detach().cpu().numpy() for n, s in sites.items() if n not in draws}
        for name in observed if told else ():
            likelihood.setdefault(name, []).append(sites[name]["fn"].log_prob(sites[name]["value"]))
    found = {name: torch.stack(rows) for name, rows in likelihood.items()}
    return found, observed, {n: d for n, d in dims.items() if d}


def _drawn(site: Any) -> bool:
    """Whether a site is a latent or an observation: no plate, no factor, no deterministic value."""
    if type(site["fn"]).__name__ in ("_Subsample", "Unit") or site["infer"].get("_deterministic"):
        return False
    return bool(site["is_observed"])  # latents are conditioned, so observed here


def _in(site: Any, plates: Container[str]) -> bool:
    """Whether a site shows a part of its rows only."""
    return any(f.name in plates for f in site["cond_indep_stack"])


def _dims(name: str, site: Any) -> list[str]:
    """A name for each dim: the plate's, or site_dim_i for those of the event."""
    batch = len(site["fn"].batch_shape)
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None}
    shape = site["value"].shape
    lead = [plates.get(i - batch, f"{name}_dim_{i}") for i in range(batch)]
    return [*lead, *(f"{name}_dim_{i}" for i in range(batch, len(shape)))][: len(shape)]
