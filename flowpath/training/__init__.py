"""Training: fit a flow to rows by maximum likelihood, and score rows with it."""

from flowpath.training.fitting import fit
from flowpath.training.loop import State
from flowpath.training.results import FitResult
from flowpath.training.scoring import log_prob

__all__ = ["FitResult", "State", "fit", "log_prob"]
