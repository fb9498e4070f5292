"""Diagnostics: is a fit sound and any good, are importance weights to be trusted, how noisy is a gradient."""

from flowpath.diagnostics.checking import check
from flowpath.diagnostics.gradients import GradientRow, GradientTable, gradient_variance
from flowpath.diagnostics.importance import ess, log_evidence, psis
from flowpath.diagnostics.quality import hpd_level
from flowpath.diagnostics.report import Report

__all__ = [
    "GradientRow",
    "GradientTable",
    "Report",
    "check",
    "ess",
    "gradient_variance",
    "hpd_level",
    "log_evidence",
    "psis",
]
