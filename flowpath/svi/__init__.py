"""Stochastic variational inference with flows: guides, ELBOs and registration for Pyro models."""

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
from flowpath.svi.density import ModelDensity, ModelError
from flowpath.svi.dreg import DRegELBO
from flowpath.svi.elbo import PathELBO, PathGraphELBO, PathMixin
from flowpath.svi.fitting import fit_posterior
from flowpath.svi.modules import module
from flowpath.svi.posterior import Posterior

__all__ = [
    "DRegELBO",
    "ModelDensity",
    "ModelError",
    "PathELBO",
    "PathGraphELBO",
    "PathMixin",
    "Posterior",
    "fit_posterior",
    "module",
]
