"""Diagnostics: is a fit sound and any good, are importance weights to be trusted, how noisy is a gradient."""

from flowpath.diagnostics.gradients import GradientRow, GradientTable, gradient_variance
from flowpath.diagnostics.importance import ess, log_evidence, psis

__all__ = ["GradientRow", "GradientTable", "ess", "gradient_variance", "log_evidence", "psis"]
