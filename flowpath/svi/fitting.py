"""fit_posterior: a Pyro model in, a posterior with a verdict out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowpath.checks import check_count
from flowpath.flow import Flow
from flowpath.objectives import LogDensity
from flowpath.scope import random
from flowpath.svi.climbing import Climb, Progress, judge, weighted_draws
from flowpath.svi.density import ModelDensity
from flowpath.svi.flows import posterior_flow
from flowpath.svi.locating import Gaussian, locate, missed
from flowpath.svi.looking import ModelError
from flowpath.svi.posterior import Held, Posterior
from flowpath.svi.promotion import promoted
from flowpath.svi.summaries import apart


def fit_posterior(
    model: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    init: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.01,
    max_steps: int | None = 4000,
    time_limit: float | None = None,
    learning_rate: float = 1e-2,
    particles: int | None = None,
    transforms: int = 8,
    hidden_features: int = 48,
    draws: int = 10_000,
    seeds: int = 1,
    seed: int | None = None,
    progress: bool | Literal["auto"] = "auto",
) -> Posterior:
    r"""Fit a flow to the posterior of a Pyro model, judge it, and keep what corrects it.

    (a) Newton's method from several starts finds the Gaussian of best ELBO (`locate`); (b) the flow starts as that
    Gaussian, inside out: an affine layer, then couplings at the identity; (c) it climbs the ELBO by path gradients in
    rounds (`Climb`) until log Z - ELBO, as its own draws see it, is below `tolerance` and k-hat below 0.5, or nothing
    more is gained; (d) fresh draws judge it: ELBO, ESS, k-hat, log evidence, a verdict; (e) their smoothed importance
    weights correct `Posterior.sample`.

    Latents may be continuous of any support, also one that depends on another latent; discrete ones that can be
    enumerated are summed out. The model's own parameters are taken as they are. Where the model runs in float64,
    all of it is done there up to 300 latents, and draws come back in the model's dtype. With a subsampling plate
    training uses minibatches, and location and verdict the density of all rows.

    Path gradients: Roeder et al. 2017, arXiv:1703.09194. The recipe of a flow inside a Gaussian: "Advances in
    Black-Box VI" (Agrawal, Sheldon, Domke 2020, arXiv:2006.10343). k-hat: Yao et al. 2018, arXiv:1802.02538.

    Args:
        model: a Pyro model.
        *args: what it is called with.
        kwargs: keyword arguments it is called with.
        init: values of all latents to start from, beside the other starts.
        tolerance: KL, in nats, that is close enough.
        max_steps: gradient steps at most.
        time_limit: seconds at most, of training; what there is then is returned. Ctrl-C does the same.
        learning_rate: Adam's peak step size, of the first round; for more than 50 latents it is lowered.
        particles: draws a step in the first round; they double from the fourth on. By default 128, fewer for more
            than 50 latents.
        transforms, hidden_features: couplings of the flow and width of their conditioners.
        draws: fresh draws that it is judged on, at least 1,000.
        seeds: independent fits; the best is returned, and the verdict says where they disagree.
        seed: of everything; torch's generator is put back afterwards.
        progress: a bar with ELBO, ESS and k-hat; "auto" on a terminal only.

    Returns:
        Posterior: draws, log_prob, predictive, summary, khat, log_evidence, refine, to_arviz, save.

    Raises:
        ModelError: a latent that cannot be had this way, by name; local latents in a subsampling plate.
        ValueError: settings out of range; log p finite at no starting point.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fp.svi.fit_posterior(model, torch.tensor([1.0, 2.0, 3.0]), max_steps=50, seed=0)
        >>> posterior.sample(100)["mu"].shape
        torch.Size([100])
        >>> abs(posterior.summary()["mu"]["mean"] - 2.0) < 0.05
        tensor(True)
    """
    counts = {"draws": (draws, 1000), "seeds": (seeds, 1), "particles": (particles, 2), "max_steps": (max_steps, 1)}
    _check(counts, tolerance=tolerance, learning_rate=learning_rate, time_limit=time_limit)
    began = time.monotonic()
    with random(seed, False, _generators()):
        given = ModelDensity(model, args, kwargs, checked=True)
    with random(seed, False, given.device):
        density = promoted(given)
        task = _Task(density, *_whole(density), draws, transforms, hidden_features)
        if task.whole is None and max_steps is None and time_limit is None:
            raise ValueError(f"fit_posterior: without max_steps or time_limit nothing ends this fit; {task.unjudged}")
        settings = {
            "tolerance": tolerance,
            "learning_rate": learning_rate * min(1.0, (50 / density.dim) ** 0.25),
            "particles": particles or max(16, min(128, 6400 // density.dim)),
            "max_steps": max_steps,
            "deadline": None if time_limit is None else began + time_limit,
        }
        found: list[Posterior] = []
        for _ in range(seeds):
            found.append(task.run(density.starts(init), settings, progress))
            if found[-1].reason == "interrupted":
                break
    best = max(found, key=lambda p: -math.inf if p.elbo is None else p.elbo)
    best.seconds = time.monotonic() - began
    best.others = [_compared(p, best) for p in found if p is not best and p.elbo is not None]
    return best


def _check(counts: Mapping[str, tuple[int | None, int]], **positive: float | None) -> None:
    for name, (count, least) in counts.items():
        if count is not None:
            check_count("fit_posterior", name, count, least=least)
    for name, value in positive.items():
        if value is not None and not value > 0.0:
            raise ValueError(f"fit_posterior expects {name} above 0, got {value}")


def _generators() -> torch.device:
    """Whose random state a first look at a model may move: before the device is known, that of CUDA if it is in use."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")


def _whole(density: ModelDensity) -> tuple[LogDensity | None, str]:
    """The density of all the data, or None and why not."""
    try:
        return density.of_all_data(), ""
    except ModelError as error:
        return None, str(error)


def _compared(posterior: Posterior, best: Posterior) -> dict[str, float]:
    return {"elbo": float(posterior.elbo or 0.0), "apart": apart(best.summary(), posterior.summary())}


@dataclass(frozen=True)
class _Task:
    """What every seed's fit has in common."""

    density: ModelDensity
    whole: LogDensity | None
    unjudged: str
    draws: int
    transforms: int
    hidden_features: int

    def run(self, starts: Tensor, settings: dict[str, Any], progress: bool | Literal["auto"]) -> Posterior:
        """Locate, climb, judge."""
        gaussian, *rest = locate(self.whole or self.density, starts)
        sites = list(self.density.sites.values())
        flow = posterior_flow(gaussian, sites, transforms=self.transforms, hidden_features=self.hidden_features)
        with _Bar(progress, settings["max_steps"]) as bar:
            climbed = Climb(flow, self.density, whole=self.whole, **settings).run(bar.show)
        flow.eval().requires_grad_(True)
        posterior = self._judged(flow, climbed, gaussian)
        if self.whole is not None and posterior.log_evidence is not None:
            modes = missed(flow, self.whole, posterior.log_evidence, rest)
            posterior.missed = sum(math.exp(q.elbo - posterior.log_evidence) for q in modes)
        return posterior

    def _judged(self, flow: Flow, climbed: Progress, gaussian: Gaussian) -> Posterior:
        u, log_w = flow.sample(self.draws), None
        if self.whole is not None:
            u, log_w = weighted_draws(flow, self.whole, self.draws)
        posterior = Posterior(
            flow=flow,
            judgement=None if log_w is None else judge(log_w),
            held=Held(u, {}, log_w),
            history=[{"step": 0, "elbo": gaussian.elbo}, *climbed.history],
            notes=self._notes(climbed),
            unjudged=self.unjudged,
            reason=climbed.reason,
            seconds=0.0,
            steps=climbed.step,
            density=self.density,
        )
        posterior.held.values = posterior.values(u)
        return posterior

    def _notes(self, climbed: Progress) -> list[str]:
        notes = list(self.density.notes)
        if self.whole is None:
            notes.append(f"located by minibatches; no k-hat, evidence or correction: {self.unjudged}")
        if self.density.discrete:
            notes.append(f"summed out: {', '.join(self.density.discrete)}")
        if self.density.mode != "plate":
            notes.append(f"the density runs over particles by {self.density.mode}")
        if climbed.skipped:
            notes.append(f"{climbed.skipped} steps had a gradient that is not finite and were left out")
        return notes


class _Bar:
    """A tqdm bar over the steps, with the last round's ELBO, ESS and k-hat."""

    def __init__(self, show: bool | Literal["auto"], total: int | None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, disable=None if show == "auto" else not show, unit="step", desc="posterior")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        last = progress.history[-1]
        self._bar.update(progress.step - self._bar.n)
        self._bar.set_postfix_str(f"ELBO {last['elbo']:.2f}, ESS {last['ess']:.0%}, k-hat {last['khat']:.2f}")
