"""fit_posterior: a Pyro model in, a posterior with a verdict out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flowpath.checks import check_count
from flowpath.scope import random
from flowpath.svi.climbing import Climb, Progress, judge, weighted_draws
from flowpath.svi.density import ModelDensity, ModelError
from flowpath.svi.flows import posterior_flow
from flowpath.svi.locating import DENSE, Gaussian, locate
from flowpath.svi.posterior import Held, Posterior, apart
from flowpath.svi.promotion import promoted

_STARTS = 6


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
        particles: draws a step in the first round; they double in the second and third. By default 128, fewer for more
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
    for name, count, least in (("draws", draws, 1000), ("seeds", seeds, 1), ("particles", particles or 2, 2)):
        check_count("fit_posterior", name, count, least=least)
    if max_steps is not None:
        check_count("fit_posterior", "max_steps", max_steps)
    if not tolerance > 0.0 or not learning_rate > 0.0 or (time_limit is not None and not time_limit > 0.0):
        raise ValueError(
            f"fit_posterior expects tolerance, learning_rate and time_limit above 0, got {tolerance}, {learning_rate}, "
            f"{time_limit}"
        )
    began = time.monotonic()
    given = ModelDensity(model, args, dict(kwargs or {}), checked=True)
    with random(seed, False, given.device):
        density = promoted(given) if given.dim <= DENSE else given
        density.asked = given.dtype
        whole, notes = _whole(density)
        settings = {
            "tolerance": tolerance,
            "learning_rate": learning_rate * min(1.0, (50 / density.dim) ** 0.25),
            "particles": particles or max(16, min(128, 6400 // density.dim)),
            "max_steps": max_steps,
            "deadline": None if time_limit is None else began + time_limit,
        }
        found = []
        for _ in range(seeds):
            gaussian = locate(whole or density, _starts(density, init))
            flow = posterior_flow(
                gaussian, list(density.sites.values()), transforms=transforms, hidden_features=hidden_features
            )
            climb = Climb(flow, density, **settings)
            with _Bar(progress, max_steps) as bar:
                climbed = climb.run(bar.show)
            flow.eval().requires_grad_(True)
            found.append(_posterior(density, whole, flow, climbed, draws, [*density.notes, *notes], gaussian))
    best = max(found, key=lambda p: -float("inf") if p.elbo is None else p.elbo)
    best.seconds = time.monotonic() - began
    best.others = [
        {"elbo": float(p.elbo or 0.0), "apart": apart(best.summary(), p.summary())} for p in found if p is not best
    ]
    return best


def _whole(density: ModelDensity) -> tuple[Callable[[Tensor], Tensor] | None, list[str]]:
    """The density of all the data, or None and why not."""
    try:
        return density.of_all_data(), []
    except ModelError as error:
        return None, [f"location by minibatches; no k-hat, evidence or correction: {error}"]


def _starts(density: ModelDensity, init: Mapping[str, Tensor] | None) -> Tensor:
    """The middle of every support, points around it, a draw of the prior; the user's own first."""
    like = density.start
    around = torch.rand(_STARTS - 2, density.dim, dtype=like.dtype, device=like.device) * 4.0 - 2.0
    rows = [torch.zeros_like(like), *around, like]
    if init is not None:
        missing = sorted(set(density.sites) - set(init))
        if missing:
            raise ValueError(f"fit_posterior: init= expects a value for every latent, {', '.join(missing)} lack one")
        rows.insert(0, density.pack({name: torch.as_tensor(v) for name, v in init.items()}))
    return torch.stack(rows)


def _posterior(
    density: ModelDensity,
    whole: Callable[[Tensor], Tensor] | None,
    flow: Any,
    climbed: Progress,
    draws: int,
    notes: list[str],
    gaussian: Gaussian,
) -> Posterior:
    if whole is None:
        u, log_w = flow.sample(draws), None
    else:
        u, log_w = weighted_draws(flow, whole, draws)
    if density.mode != "plate":
        notes = [*notes, f"the density runs over particles by {density.mode}"]
    if climbed.skipped:
        notes = [*notes, f"{climbed.skipped} steps had a gradient that is not finite and were left out"]
    posterior = Posterior(
        flow=flow,
        judgement=None if log_w is None else judge(log_w),
        held=Held(u, {}, log_w),
        history=[{"step": 0, "elbo": gaussian.elbo}, *climbed.history],
        notes=notes,
        reason=climbed.reason,
        seconds=0.0,
        steps=climbed.step,
        density=density,
    )
    posterior.held.values = posterior.values(u)
    return posterior


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
