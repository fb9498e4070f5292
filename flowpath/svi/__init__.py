"""Stochastic variational inference with flows: guides, ELBOs and registration for Pyro models."""

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
from flowpath.svi.dreg import DRegELBO
from flowpath.svi.elbo import PathELBO, PathGraphELBO, PathMixin
from flowpath.svi.modules import module

__all__ = ["DRegELBO", "PathELBO", "PathGraphELBO", "PathMixin", "module"]
