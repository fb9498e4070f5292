"""Is a flow any good: beside a Gaussian and a mixture, to a classifier, and in its calibration."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowpath.diagnostics.report import Part
from flowpath.flow import Flow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# What keeps a check of 20,000 rows within half a minute.
_C2ST_ROWS = 4000
_LEVELS_GIVEN = 4000  # rows whose credible levels are found under contexts of their own
_MIXTURE_WORK = 3e8  # rows x components x columns^2 of the largest mixture tried
_FEW = 200  # rows below which nothing can be told


def hpd_level(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, draws: int = 1000, seed: int = 0, batch_size: int = 256
) -> Tensor:
    r"""The credible level of each row: the probability, under the flow, of a density higher than at x.

    :math:`u(x) = P_{y \sim q(\cdot \mid c)}[q(y \mid c) > q(x \mid c)]`. Rows from the flow itself have uniform
    levels; levels that crowd at 1 mean a flow that is too narrow, at 0 one that is too wide.

    Args:
        flow: a flow. x: rows `(N, *event)`. context: `(N, C)` or None.
        draws: how many of each conditional density; without a context they are shared by all rows.
        seed: of the draws; torch's random state is not touched.
        batch_size: contexts handled at a time.

    Returns:
        `(N,)` in [0, 1].

    Example:
        >>> import torch, flowpath as fp
        >>> flow = fp.gaussian(2)
        >>> fp.hpd_level(flow, torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
        tensor([0., 1.])
    """
    generator = torch.Generator(flow.base.like.device).manual_seed(seed)
    with torch.no_grad():
        if context is None:
            _, own = flow.rsample_and_log_prob(draws, generator=generator)
            ordered = own.sort().values
            below = torch.searchsorted(ordered, flow.log_prob(x).contiguous())
            return 1.0 - below.to(x.dtype) / draws
        found = []
        for rows, given in zip(x.split(batch_size), context.split(batch_size), strict=True):
            _, own = flow.rsample_and_log_prob(draws, given, generator=generator)
            found.append((own > flow.log_prob(rows, given)).to(x.dtype).mean(0))
        return torch.cat(found)


def beside_baselines(x: Tensor, context: Tensor | None, log_q: Tensor, weights: Tensor | None, seed: int) -> Part:
    """Mean log density beside a full Gaussian's and a Gaussian mixture's, each fitted to the other half of the rows."""
    name = "beside Gaussian and mixture"
    if context is not None:
        return Part(name, "skipped", "they are unconditional, the flow is not")
    rows = x.flatten(1).double().numpy()
    w = np.ones(len(rows)) if weights is None else weights.double().numpy()
    scores = {"Gaussian": np.empty(len(rows)), "mixture": np.empty(len(rows))}
    half = np.random.default_rng(seed).permutation(len(rows)) < len(rows) // 2
    for fold in (half, ~half):
        scores["Gaussian"][fold] = _gaussian(rows[~fold], w[~fold], rows[fold])
        scores["mixture"][fold] = _mixture(rows[~fold], rows[fold], seed)
    numbers = {"flow": float(np.average(log_q.double().numpy(), weights=w))}
    lines, ahead = [], []
    for rival, score in scores.items():
        mean, error = _paired(log_q.double().numpy() - score, w)
        numbers |= {f"ahead of {rival}": mean, f"error against {rival}": error}
        lines.append(f"{mean:+.3f} ± {error:.3f} nats against a {rival}")
        ahead += [f"a {rival} scores {-mean:.3f} ± {error:.3f} nats higher"] if mean < -2 * error else []
    if weights is not None:
        lines.append("the mixture was fitted without weights")
    says = f"mean log density {numbers['flow']:.3f}; " + ", ".join(lines)
    return Part(name, "warn" if ahead else "pass", says, numbers, "; ".join(ahead))


def _paired(difference: Array, w: Array) -> tuple[float, float]:
    mean = float(np.average(difference, weights=w))
    error = float(np.sqrt(np.sum((w * (difference - mean)) ** 2)) / abs(w.sum()))
    return mean, error


def _gaussian(train: Array, w: Array, test: Array) -> Array:
    mean = np.average(train, axis=0, weights=w)
    cov = np.atleast_2d(np.cov(train.T, aweights=np.clip(w, 0, None)))
    cov += 1e-9 * np.trace(cov) / len(cov) * np.eye(len(cov))
    lower = np.linalg.cholesky(cov)
    u = np.linalg.solve(lower, (test - mean).T)
    return -0.5 * (u**2).sum(0) - np.log(np.diag(lower)).sum() - 0.5 * len(cov) * math.log(2 * math.pi)


def _mixture(train: Array, test: Array, seed: int) -> Array:
    """The full-covariance mixture of 1 to 16 components with the lowest BIC."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    scale = train.std(0) + 1e-300
    fit = train[:5000] / scale
    best: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in (1, 2, 4, 8, 16):
            if k > 1 and (k * (train.shape[1] + 2) > len(fit) or k * len(fit) * train.shape[1] ** 2 > _MIXTURE_WORK):
                break
            model = GaussianMixture(k, random_state=seed, reg_covar=1e-6).fit(fit)
            found = model.bic(fit), model
            best = found if best is None or found[0] < best[0] else best
    return best[1].score_samples(test / scale) - np.log(scale).sum()


def two_sample(x: Tensor, context: Tensor | None, draws: Tensor, weights: Tensor | None, seed: int) -> Part:
    """C2ST: how often a classifier, cross-validated, tells rows from draws; 0.5 is perfect."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import PredefinedSplit, cross_val_score

    name = "classifier two-sample test"
    if weights is not None:
        return Part(name, "skipped", "it has no weighted form here")
    sides = [t.flatten(1) if context is None else torch.cat([t.flatten(1), context], 1) for t in (x, draws)]
    table = torch.cat([side[:_C2ST_ROWS] for side in sides]).double().numpy()
    label = np.repeat([0, 1], len(table) // 2)
    # A row and the draw under its context share a fold: a context learnt with one label would betray the other.
    folds = PredefinedSplit(np.tile(np.random.default_rng(seed).permutation(len(table) // 2) % 5, 2))
    found = cross_val_score(HistGradientBoostingClassifier(random_state=seed, max_iter=60), table, label, cv=folds)
    mean, error = float(found.mean()), 0.5 / math.sqrt(len(label))
    says = f"accuracy {mean:.3f} ± {error:.3f} (0.5: draws cannot be told from rows)"
    doubt = f"a classifier tells its draws from the rows ({mean:.0%} right)"
    return Part(name, "warn" if mean > 0.6 else "pass", says, {"accuracy": mean, "error": error}, doubt)


def calibration(flow: Flow, x: Tensor, context: Tensor | None, weights: Tensor | None, seed: int) -> Part:
    """Whether the credible levels of the rows are uniform: the Kolmogorov distance, weighted where rows are."""
    few = 1000 if context is None else 200
    if context is not None:
        x, context = x[:_LEVELS_GIVEN], context[:_LEVELS_GIVEN]
        weights = None if weights is None else weights[:_LEVELS_GIVEN]
    levels = hpd_level(flow, x, context, draws=few, seed=seed).double()
    w = torch.ones_like(levels) if weights is None else weights.double().clamp_min(0)
    order = levels.argsort()
    share = w[order].cumsum(0) / w.sum()
    distance = float((share - levels[order]).abs().max())
    effective = float(w.sum() ** 2 / w.square().sum())
    limit = 1.63 / math.sqrt(effective) + 1.0 / math.sqrt(few)  # 1 % of a Kolmogorov test, and the draws' own noise
    tilt = float((w * levels).sum() / w.sum()) - 0.5
    says = f"credible levels of the rows are {distance:.3f} from uniform (noise alone: up to {limit:.3f})"
    shape = f": it is too {'narrow' if tilt > 0 else 'wide'}" if abs(tilt) > limit / 2 else ""
    doubt = f"its credible levels are off by {distance:.2f}{shape}"
    numbers = {"distance": distance, "tilt": tilt}
    return Part("calibration", "warn" if distance > limit else "pass", says, numbers, doubt)
