"""Stochastic variational inference with flows: guides, ELBOs, posteriors, compiled SVI for Pyro models."""

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
from flowpath.svi.amortized import AmortizedFlow
from flowpath.svi.compiled import CompiledSVI
from flowpath.svi.density import ModelDensity
from flowpath.svi.dreg import DRegELBO
from flowpath.svi.elbo import PathELBO, PathGraphELBO, PathMixin
from flowpath.svi.fitting import fit_posterior
from flowpath.svi.guide import AutoFlow
from flowpath.svi.looking import ModelError
from flowpath.svi.modules import module
from flowpath.svi.posterior import Posterior
from flowpath.svi.refining import Refined
from flowpath.tracing import Traced, TracingError, trace

__all__ = [
    "AmortizedFlow",
    "AutoFlow",
    "CompiledSVI",
    "DRegELBO",
    "ModelDensity",
    "ModelError",
    "PathELBO",
    "PathGraphELBO",
    "PathMixin",
    "Posterior",
    "Refined",
    "Traced",
    "TracingError",
    "fit_posterior",
    "module",
    "trace",
]
