"""A flow's rivals on the same rows, and what their paired scores allow one to say."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kind = tuple[str, int, float]  # of mixture: covariances, components, floor on the variance of standardised columns

GAUSSIAN, MIXTURE, FLOW, TRUTH = "full Gaussian", "Gaussian mixture", "flow", "truth"


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture of scikit-learn on standardised columns; with one full component, the full Gaussian."""

    model: Any
    loc: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor, kind: Kind, seed: int) -> Mixture:
        """Fit rows `(N, d)` by EM."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        covariance, components, floor = kind
        model = GaussianMixture(components, covariance_type=covariance, reg_covar=floor, random_state=seed)
        loc, scale = x.mean(0), x.std(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(((x - loc) / scale).numpy())
        return cls(model, loc, scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats of x `(N, d)`: `(N,)`."""
        z = (x - self.loc) / self.scale
        return torch.from_numpy(self.model.score_samples(z.numpy())) - self.scale.log().sum()


def choose_mixture(train: Tensor, validation: Tensor, kinds: Sequence[Kind], seed: int) -> Kind:
    """The kind that, fitted to `train`, scores highest on `validation`."""
    possible = [kind for kind in kinds if kind[1] < len(train)]
    return max(possible, key=lambda kind: float(Mixture.fit(train, kind, seed).log_prob(validation).mean()))


@dataclass(frozen=True)
class Scores:
    """Log densities of the same rows, `(N,)` for each name, and the kind of mixture among them."""

    of: Mapping[str, Tensor]
    kind: Kind

    def mean(self, name: str) -> float:
        """Mean log density in nats."""
        return float(self.of[name].mean())

    def ahead(self, a: str, b: str) -> tuple[float, float]:
        """By how much a's mean is above b's, and the standard error of that: the rows are paired."""
        gap = self.of[a] - self.of[b]
        return float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))

    def table(self, reference: str) -> str:
        """A line a name: its score, and how far `reference` is ahead of it."""
        width = max(map(len, self.of))
        lines = []
        for name in self.of:
            line = f"     {name:{width}s} {self.mean(name):9.3f}"
            if name != reference:
                mean, se = self.ahead(reference, name)
                line += f"   {mean:7.3f} ± {se:.3f}"
            lines.append(line)
        return "\n".join(lines)

    def report(self, reference: str) -> dict[str, Any]:
        """The same as JSON values."""
        gaps = {name: self.ahead(reference, name) for name in self.of if name != reference}
        return {
            "mean log density": {name: self.mean(name) for name in self.of},
            f"{reference} ahead of": {name: {"mean": m, "standard error": s} for name, (m, s) in gaps.items()},
            "mixture": dict(zip(("covariance", "components", "floor"), self.kind, strict=True)),
        }


def verdict(mean: float, se: float) -> str:
    """What a paired difference allows one to say, at two standard errors."""
    if mean > 2.0 * se:
        return "beats"
    return "loses to" if mean < -2.0 * se else "cannot be told from"


def conclusion(scores: Scores) -> str:
    """The comparison with both rivals in words, from the numbers."""
    verdicts = {name: verdict(*scores.ahead(FLOW, name)) for name in (MIXTURE, GAUSSIAN)}
    start = "The flow wins" if set(verdicts.values()) == {"beats"} else "The flow does not win"
    return f"{start}: it " + " and it ".join(f"{word} the {name}" for name, word in verdicts.items()) + "."
