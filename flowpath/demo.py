"""The demonstration: a spline flow on a density that is known, and on a real table, judged on rows it never saw.

The table is scikit-learn's handwritten digits, 1797 pictures of 8 x 8 pixels with grey levels 0 to 16, made continuous
by uniform noise on [0, 1), so that a density bounds the log probability of the pictures from below ("A note on the
evaluation of generative models", Theis, van den Oord, Bethge 2015, arXiv:1511.01844). Why this table: a fit can be
judged on it, see experiments/README.md.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from flowpath import plot
from flowpath.scope import versions
from flowpath.training import fit
from flowpath.training.loop import State
from flowpath.training.results import FitResult
from flowpath.training.scoring import log_prob

Kind = tuple[str, int, float]  # of mixture: covariances, components, floor on the variance of standardised columns

GAUSSIAN, MIXTURE, FLOW, TRUTH = "full Gaussian", "Gaussian mixture", "flow", "truth"
_SAMPLES = 1000
_TO_CHOOSE = 8000  # training rows on which the kinds of mixture compete


@dataclass(frozen=True)
class Effort:
    """What goes into one comparison.

    Attributes:
        settings: of `fp.fit` and of the flow.
        mixtures: the kinds that compete on validation rows to be the flow's rival.
    """

    settings: dict[str, Any]
    mixtures: tuple[Kind, ...]

    def quick(self) -> Effort:
        """Two epochs and two kinds: shows the steps."""
        return Effort({**self.settings, "epochs": 2}, self.mixtures[:2])


DRAWS = 20_000
KNOWN = Effort(
    {"epochs": 30, "batch_size": 256, "learning_rate": 2e-3, "transforms": 6, "hidden_features": (48, 48)},
    tuple(("full", k, 1e-3) for k in (10, 20, 40)),
)
TABLE = Effort(
    {
        "epochs": 60,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "transforms": 5,
        "hidden_features": (128, 128),
        "dropout": 0.3,
    },
    (
        *(("full", k, floor) for k in (2, 5, 10, 20) for floor in (1e-3, 1e-2, 1e-1)),
        *(("diag", k, floor) for k in (20, 40, 80, 160) for floor in (1e-3, 1e-2)),
    ),
)


def main(out: str | os.PathLike[str], *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Fit both flows, print how they compare, and leave what they gave in a folder.

    Args:
        out: the folder, made where it is missing: flow.safetensors, samples.csv and history.csv of the table,
            summary.json, and figures.
        seed: of draws, splits, fits and samples.
        quick: seconds of training instead of minutes; shows the steps, proves nothing.

    Returns:
        What summary.json holds.
    """
    folder, start = Path(out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        known, first = _known_density(folder, seed, quick)
        table, second = _real_table(folder, seed, quick)
    plot.history({"known density": first.history, "handwritten digits": second.history}).savefig(folder / "history.png")
    seconds = round(time.perf_counter() - start, 1)
    summary = {
        "known density": known,
        "handwritten digits": table,
        "seed": seed,
        "quick": quick,
        "seconds": seconds,
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    left = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"\n{folder} holds {left}; {seconds:.0f} s in all")
    if quick:
        print("this was --quick: the numbers show the steps and prove nothing")
    return summary


def _known_density(folder: Path, seed: int, quick: bool) -> tuple[dict[str, Any], FitResult]:
    """Part (a): the true log density is at hand, so the mean difference on fresh draws is KL(p | q)."""
    generator = torch.Generator().manual_seed(seed)
    draws, effort = (DRAWS // 20, KNOWN.quick()) if quick else (DRAWS, KNOWN)
    x, fresh = Folded.draw(draws, generator), Folded.draw(draws, generator)
    print(f"1. A known density: {len(x)} draws of 5 features with two modes, folds and a funnel", flush=True)
    train, validation = x[len(x) // 10 :], x[: len(x) // 10]
    result, scores = compare(train, validation, fresh, effort, seed)
    scores = Scores({**scores.of, TRUTH: Folded.log_prob(fresh)}, scores.kind)
    samples = result.flow.sample(len(x), generator=torch.Generator().manual_seed(seed))
    plot.log_densities(scores.of[TRUTH], scores.of[FLOW]).savefig(folder / "log_density.png")
    plot.pairs(fresh, samples).savefig(folder / "pairs.png")
    print(f"   mean log density of {len(fresh)} fresh draws, and KL from the truth, in nats:")
    print(scores.table(TRUTH))
    words = conclusion(scores)
    print(f"   {words}")
    report = {"rows": len(x), "fresh rows": len(fresh), **scores.report(TRUTH), "conclusion": words}
    return report | {"fit seconds": round(result.seconds, 1)}, result


def _real_table(folder: Path, seed: int, quick: bool) -> tuple[dict[str, Any], FitResult]:
    """Part (b): the flow beside its rivals on rows that no fit has seen."""
    x, names = digits(seed)
    train, validation, test = split(x, seed)
    print(f"\n2. Handwritten digits of scikit-learn: {len(x)} pictures of {x.shape[1]} pixels, dequantised", flush=True)
    result, scores = compare(train, validation, test, TABLE.quick() if quick else TABLE, seed)
    result.save(folder)
    samples = result.flow.sample(_SAMPLES, generator=torch.Generator().manual_seed(seed))
    with open(folder / "samples.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *([f"{v:.4f}" for v in row] for row in samples.tolist())])
    plot.images(test, samples, (8, 8)).savefig(folder / "digits.png")
    words = conclusion(scores)
    print(f"   mean log density of {len(test)} rows that no fit has seen, and how far the flow is ahead, in nats:")
    print(scores.table(FLOW))
    print(f"   {words}")
    report = {"rows": len(train), "validation rows": len(validation), "held-out rows": len(test)}
    report |= scores.report(FLOW) | {"conclusion": words, "fit seconds": round(result.seconds, 1)}
    return report, result


class Folded:
    r"""A density in five dimensions that is known in closed form: a chain of conditionals.

    .. math:: x_1 \sim \tfrac12 N(-1.5, 0.5^2) + \tfrac12 N(1.5, 0.5^2), \quad x_2 \sim N(x_1^2 - 2, 0.5^2), \quad
              x_3 \sim N(2 \sin x_2, 0.4^2), \\ x_4 \sim N(0, e^{x_1}), \quad
              x_5 \sim \tfrac12 N(x_4, 0.5^2) + \tfrac12 N(-x_4, 0.5^2)
    """

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Tensor:
        """Rows `(count, 5)` in float64."""
        e = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        sign = 2.0 * torch.randint(2, (2, count), generator=generator) - 1.0
        x1 = 1.5 * sign[0] + 0.5 * e[:, 0]
        x2 = x1.square() - 2.0 + 0.5 * e[:, 1]
        x3 = 2.0 * x2.sin() + 0.4 * e[:, 2]
        x4 = (0.5 * x1).exp() * e[:, 3]
        return torch.stack([x1, x2, x3, x4, sign[1] * x4 + 0.5 * e[:, 4]], 1)

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        """Log density in nats of x `(N, 5)`: `(N,)`."""
        x1, x2, x3, x4, x5 = x.unbind(1)
        modes = torch.logaddexp(Normal(-1.5, 0.5).log_prob(x1), Normal(1.5, 0.5).log_prob(x1))
        cross = torch.logaddexp(Normal(x4, 0.5).log_prob(x5), Normal(-x4, 0.5).log_prob(x5))
        bend = Normal(x1.square() - 2.0, 0.5).log_prob(x2) + Normal(2.0 * x2.sin(), 0.4).log_prob(x3)
        return modes + bend + Normal(0.0, (0.5 * x1).exp()).log_prob(x4) + cross - 2.0 * math.log(2.0)


def digits(seed: int) -> tuple[Tensor, list[str]]:
    """The table `(1797, 64)` in float64, dequantised by uniform noise, and the names of its columns."""
    from sklearn.datasets import load_digits

    held = load_digits()
    grey = torch.from_numpy(held.data)
    noise = torch.rand(grey.shape, generator=torch.Generator().manual_seed(seed), dtype=grey.dtype)
    return grey + noise, list(held.feature_names)


def split(x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x at random: 72 % to train on, 8 % to choose by, 20 % to judge by."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, validation = len(x) // 5, len(x) // 5 + len(x) * 8 // 100
    return x[order[validation:]], x[order[test:validation]], x[order[:test]]


def compare(train: Tensor, validation: Tensor, test: Tensor, effort: Effort, seed: int) -> tuple[FitResult, Scores]:
    """Log densities of the test rows under a spline flow, the best mixture and the full Gaussian; rows `(N, d)`.

    All are fitted to `train` and chosen by `validation`. The rivals, once chosen, are fitted to both; the flow is not.
    """
    result = _fit(train, validation, effort.settings, seed)
    kind = choose_mixture(train[:_TO_CHOOSE], validation, effort.mixtures, seed)
    print(f"   mixture: {kind[1]} components ({kind[0]}), the best of {len(effort.mixtures)} kinds on validation rows")
    rows = torch.cat([train, validation])
    rivals = {MIXTURE: Mixture.fit(rows, kind, seed), GAUSSIAN: Mixture.fit(rows, ("full", 1, 1e-6), seed)}
    of = {FLOW: log_prob(result.flow, test)} | {name: rival.log_prob(test) for name, rival in rivals.items()}
    return result, Scores(of, kind)


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


def _fit(train: Tensor, validation: Tensor, settings: dict[str, Any], seed: int) -> FitResult:
    """A neural spline flow, with a line every tenth epoch."""
    return fit(
        "nsf", train, validation=validation, seed=seed, compile=False, progress=False, callbacks=_say, **settings
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Nets this small gain nothing from a second thread, and lose much where other work holds its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(state: State) -> None:
    if state.epoch == 1 or state.epoch % 10 == 0:
        print(
            f"   epoch {state.epoch:3d}: log density {state.train:8.3f} on training rows, {state.validation:8.3f} on "
            f"validation rows, {state.seconds:4.0f} s",
            flush=True,
        )
