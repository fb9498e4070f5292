"""A posterior as ArviZ's container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from flowpath.svi.density import ModelDensity
from flowpath.svi.handlers import quiet

if TYPE_CHECKING:
    from flowpath.svi.posterior import Posterior


def to_arviz(posterior: Posterior, num_samples: int, seed: int | None) -> Any:
    """Draws, log likelihoods and observations, as one chain. See `Posterior.to_arviz`.

    Raises:
        ImportError: ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError:
        raise ImportError("to_arviz needs ArviZ: pip install 'flowpath[arviz]'") from None
    draws = posterior.sample(num_samples, seed=seed)
    groups: dict[str, dict[str, Any]] = {"posterior": {n: _chain(v) for n, v in draws.items()}}
    dims: dict[str, list[str]] = {}
    if posterior.density is not None:
        likelihood, observed, dims = _observations(posterior.density, draws)
        groups |= {"log_likelihood": {n: _chain(v) for n, v in likelihood.items()}, "observed_data": observed}
    groups = {name: group for name, group in groups.items() if group}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, dims=dims)
    return arviz.from_dict(**groups, dims=dims)  # type: ignore[arg-type]


def _chain(v: Tensor) -> Any:
    return v.detach().cpu().numpy()[np.newaxis]


def _observations(
    density: ModelDensity, draws: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[str]]]:
    """Log likelihood of each observation at each draw, the observations, and the names of batch dims."""
    likelihood: dict[str, list[Tensor]] = {}
    observed: dict[str, Any] = {}
    dims: dict[str, list[str]] = {}
    for i in range(len(next(iter(draws.values())))):
        values = {n: v[i].to(density.dtype) for n, v in draws.items()}
        with torch.no_grad(), quiet(), poutine.block(), poutine.trace() as tracer, poutine.condition(data=values):
            density.model(*density.args, **density.kwargs)
        nodes: dict[str, Any] = tracer.trace.nodes
        for name, site in nodes.items():
            if site["type"] != "sample" or name.startswith("_") or not _drawn(site):
                continue
            if i == 0:
                dims[name] = _dims(name, site)
            if name in draws or site["infer"].get("is_auxiliary"):
                continue
            likelihood.setdefault(name, []).append(site["fn"].log_prob(site["value"]))
            if i == 0:
                observed[name] = site["value"].detach().cpu().numpy()
    found = {name: torch.stack(rows) for name, rows in likelihood.items()}
    return found, observed, {n: d for n, d in dims.items() if d and (n in draws or n in observed)}


def _drawn(site: Any) -> bool:
    """Whether a site is a latent or an observation: no plate, no factor, no deterministic value."""
    if type(site["fn"]).__name__ in ("_Subsample", "Unit") or site["infer"].get("_deterministic"):
        return False
    return bool(site["is_observed"])  # latents are conditioned, so observed here


def _dims(name: str, site: Any) -> list[str]:
    """A name for each dim: the plate's, or site_dim_i for those of the event."""
    batch = len(site["fn"].batch_shape)
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None}
    shape = site["value"].shape
    lead = [plates.get(i - batch, f"{name}_dim_{i}") for i in range(batch)]
    return [*lead, *(f"{name}_dim_{i}" for i in range(batch, len(shape)))][: len(shape)]
