"""Stochastic variational inference with flows: guides, ELBOs and registration for Pyro models."""

from flowpath.svi.amortized import AmortizedFlow
from flowpath.svi.compiled import CompiledSVI
from flowpath.svi.dreg import DRegELBO
from flowpath.svi.elbo import PathELBO, PathGraphELBO, PathMixin
from flowpath.svi.guide import AutoFlow
from flowpath.svi.modules import module
from flowpath.svi.tracing import Traced, TracingError, trace

__all__ = [
    "AmortizedFlow",
    "AutoFlow",
    "CompiledSVI",
    "DRegELBO",
    "PathELBO",
    "PathGraphELBO",
    "PathMixin",
    "Traced",
    "TracingError",
    "module",
    "trace",
]
