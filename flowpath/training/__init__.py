"""Training: fit a flow to rows or to an unnormalised density, and score rows with it."""

from flowpath.training.fitting import fit
from flowpath.training.loop import State
from flowpath.training.results import FitResult
from flowpath.training.scoring import log_prob
from flowpath.training.target import TargetResult, fit_target

__all__ = ["FitResult", "State", "TargetResult", "fit", "fit_target", "log_prob"]
