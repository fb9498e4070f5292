"""The posterior that fit_posterior returns: draws, densities, summaries, and how far to trust them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowpath.flow import Flow
from flowpath.scope import random
from flowpath.svi import filing, verdicts
from flowpath.svi.climbing import Judgement, weighted_draws
from flowpath.svi.density import ModelDensity
from flowpath.svi.predicting import predict
from flowpath.svi.resampling import on_cpu, resampled, smoothed
from flowpath.svi.summaries import Summary, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowpath.svi.guide import AutoFlow
    from flowpath.svi.refining import Refined

_CHUNK = 1000
_POOL = 10_000  # draws that corrected ones are resampled from, at least


@dataclass
class Held:
    """Draws that a posterior was judged on, and keeps.

    Attributes:
        u: unconstrained points `(n, D)`.
        values: the latents there, site -> `(n, *shape)`.
        log_weights: log p - log q `(n,)` in float64, with the density of all the data; None where that cannot be had.
    """

    u: Tensor
    values: dict[str, Tensor]
    log_weights: Tensor | None


@dataclass
class Posterior:
    r"""A flow fitted to the posterior of a Pyro model, with draws from it and a verdict.

    Attributes:
        flow: q over the packed unconstrained latents, in the model's order.
        judgement: what fresh draws say; None where the density of all the data cannot be had.
        held: the draws it was judged on.
        history: one dict for each round of training: step, elbo, ess, khat, gap, width, seconds.
        notes: what was found on the way, in words.
        reason: why training ended.
        seconds, steps: what it took.
        missed: mass, in units of what the flow covers, of modes that were seen on the way and that it does not reach.
        unjudged: why there is no judgement, where there is none.
        others: where several seeds were asked for, the other runs' ELBO and largest difference of a mean, in sds.
        density: the model's log density; None after `load` without a model.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> x = torch.linspace(-1.0, 1.0, 20)
        >>> posterior = fp.svi.fit_posterior(model, x, 0.5 * x, max_steps=50, seed=0)
        >>> print(posterior.verdict())
        the flow is very close to the posterior as far as its own draws can tell ...
        >>> posterior.predictive(torch.ones(3), num_samples=100)["y"].shape
        torch.Size([100, 3])
    """

    flow: Flow = field(repr=False)
    judgement: Judgement | None
    held: Held = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    notes: list[str]
    reason: str
    seconds: float
    steps: int
    unjudged: str = ""
    missed: float = 0.0
    others: list[dict[str, float]] = field(default_factory=list)
    density: ModelDensity | None = field(default=None, repr=False)

    # -- numbers

    @property
    def elbo(self) -> float | None:
        """E_q[log p - log q], a lower bound of log Z, in nats."""
        return None if self.judgement is None else self.judgement.elbo

    @property
    def khat(self) -> float | None:
        """Shape of the tail of the importance weights (PSIS)."""
        return None if self.judgement is None else self.judgement.khat

    @property
    def ess(self) -> float | None:
        """Effective sample size of the importance weights, as a share of the draws."""
        return None if self.judgement is None else self.judgement.ess

    @property
    def log_evidence(self) -> float | None:
        """log Z by importance sampling, in nats."""
        return None if self.judgement is None else self.judgement.log_evidence

    @property
    def log_evidence_se(self) -> float | None:
        """Standard error of `log_evidence`."""
        return None if self.judgement is None else self.judgement.log_evidence_se

    @property
    def log_weights(self) -> Tensor | None:
        """log p - log q of the held draws `(n,)`."""
        return self.held.log_weights

    @property
    def trusted(self) -> bool:
        """Whether importance weights may be used: k-hat below 0.7."""
        return self.khat is not None and self.khat < verdicts.TRUSTED

    def verdict(self) -> str:
        """One line in plain words, and what to do next where it is bad."""
        if self.judgement is None:
            return f"cannot tell: {self.unjudged}"
        return verdicts.verdict(self.judgement, self.others, self.missed)

    def __str__(self) -> str:
        lines = [self.verdict()]
        if self.judgement is not None:
            j = self.judgement
            lines.append(
                f"ELBO {j.elbo:.3f} ± {j.elbo_se:.3f} nats, log Z {j.log_evidence:.3f} ± {j.log_evidence_se:.3f}"
            )
        lines.append(f"{self.steps} steps in {self.seconds:.1f} s; ended: {self.reason}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), str(self.summary())])

    # -- draws

    def sample(
        self, num_samples: int, *, corrected: bool | Literal["auto"] = "auto", seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draws of the latents: site -> `(num_samples, *shape)`.

        Args:
            num_samples: how many.
            corrected: True for draws resampled with Pareto-smoothed importance weights, from at least 10,000 of the
                flow's; False for the flow's own; "auto" corrects where k-hat is below 0.7.
            seed: of the draws; without one torch's global generator is drawn from.

        Raises:
            ValueError: corrected=True where there is no density of all the data, or, after `load`, no model.
        """
        generator = None if seed is None else torch.Generator(self.flow.base.like.device).manual_seed(seed)
        if corrected == "auto":
            corrected = self.trusted
        if corrected and self.held.log_weights is None:
            raise ValueError(f"sample(corrected=True) needs the density of all the data: {self.verdict()}")
        if self.density is None:
            return self._held_sample(num_samples, bool(corrected), generator)
        if not corrected:
            return self.values(self.flow.sample(num_samples, generator=generator))
        u, log_w = self._pool(num_samples, generator)
        return self.values(u[resampled(log_w, num_samples, generator).to(u.device)])

    def _pool(self, num_samples: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draws to resample from: those held, or fresh ones where more are asked for."""
        held = self.held.log_weights
        if held is not None and num_samples <= len(held) // 2:
            return self.held.u, held
        return weighted_draws(self.flow, self._model().of_all_data(), max(2 * num_samples, _POOL), generator)

    def _held_sample(self, num_samples: int, corrected: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Without a model: some of the held draws."""
        log_w = self.held.log_weights
        if num_samples > len(self.held.u):
            raise ValueError(
                f"sample: loaded without its model, this posterior holds {len(self.held.u)} draws, {num_samples} "
                "were asked for; pass model= and args= to Posterior.load for new ones"
            )
        if corrected and log_w is not None:
            rows = resampled(log_w, num_samples, generator)
        else:
            rows = torch.randperm(len(self.held.u), generator=on_cpu(generator))[:num_samples]
        return {name: v[rows.to(v.device)] for name, v in self.held.values.items()}

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at unconstrained points u `(n, D)`: site -> `(n, *shape)`."""
        density = self._model()
        with torch.no_grad():
            parts = [density.values(part.to(density.start)) for part in u.split(_CHUNK)]
        return {name: torch.cat([p[name] for p in parts]).to(density.asked) for name in density.sites}

    def log_prob(self, at: Tensor | Mapping[str, Tensor]) -> Tensor:
        """log q at unconstrained points `(*batch, D)`; or at one value of all latents, whose density it then is.

        For values, constrained, the density is that of the values: log q(u) - log |det dx / du|. There is a gradient
        where `at` is a tensor that asks for one.

        Raises:
            ValueError: values: a latent is missing or of another shape; or, after `load`, there is no model.
        """
        if isinstance(at, Tensor):
            with torch.set_grad_enabled(at.requires_grad and torch.is_grad_enabled()):
                return self.flow.log_prob(at.to(self.flow.base.like))
        density = self._model()
        with torch.no_grad():
            u = density.pack(at)
            return self.flow.log_prob(u.to(self.flow.base.like)) - density.ladj(u)

    def summary(self) -> Summary:
        """Mean, sd, quantiles and Monte Carlo error of each latent, importance-corrected where k-hat allows."""
        return summarise(self.held.values, self.weights())

    def weights(self) -> Tensor:
        """Normalised smoothed weights of the held draws `(n,)`; equal ones where weights cannot be trusted."""
        log_w = self.held.log_weights
        if log_w is None or not self.trusted:
            return torch.full((len(self.held.u),), 1.0 / len(self.held.u), dtype=torch.float64)
        return smoothed(log_w)

    # -- with the model

    def _model(self) -> ModelDensity:
        if self.density is None:
            raise ValueError("this posterior was loaded without its model; pass model= and args= to Posterior.load")
        return self.density

    def predictive(
        self, *args: Any, num_samples: int = 1000, seed: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws of the model's other sites given posterior draws, for new arguments: site -> `(num_samples, *shape)`.

        A site that the model observes is drawn where its data argument is None, as in `pyro.infer.Predictive`. A latent
        in a plate that has another size now is drawn anew, given the latents outside: new groups, not the old ones.
        """
        model = self._model()
        with random(seed, False, model.device):
            return predict(model.model, self.sample(num_samples), args, kwargs)

    @property
    def guide(self) -> AutoFlow:
        """The flow as an `AutoFlow` guide of the model, to go on with in Pyro; it shares the flow's parameters."""
        from flowpath.svi.guide import AutoFlow

        density = self._model()
        guide = AutoFlow(density.model, flow=lambda features, context: self.flow)
        guide.setup(*density.args, **density.kwargs)
        guide.flow = self.flow
        return guide

    def refine(
        self, time_limit: float = 60.0, *, chains: int = 4, draws: int = 1000, seed: int | None = None
    ) -> Refined:
        """NUTS in the flow's noise space, started from corrected draws. See `flowpath.svi.refining.refine`."""
        from flowpath.svi.refining import refine

        return refine(self, time_limit, chains=chains, draws=draws, seed=seed)

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Pair plot: the flow's draws, and the importance-corrected ones where they are to be had."""
        from flowpath.plot import pairs

        raw = self.sample(2000, corrected=False, seed=0)
        other = self.sample(2000, seed=1)
        chosen = [n for n in (names or raw) if n in raw]
        if not chosen:
            raise ValueError(f"plot: there is no site {list(names or ())}; there are {', '.join(raw)}")
        flat = [torch.cat([d[n].reshape(len(d[n]), -1) for n in chosen], 1)[:, :8].cpu() for d in (other, raw)]
        labels = [f"{n}[{i}]" if raw[n][0].numel() > 1 else n for n in chosen for i in range(raw[n][0].numel())][:8]
        return pairs(flat[0].numpy(), flat[1].numpy(), labels)

    def to_arviz(self, num_samples: int = 4000, *, seed: int | None = 0) -> Any:
        """ArviZ's container: posterior, log_likelihood, observed_data, dims named after plates.

        An `InferenceData` with ArviZ below 1.0, an xarray `DataTree` from 1.0 on.
        """
        from flowpath.svi.export import to_arviz

        return to_arviz(self, num_samples, seed)

    # -- files

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write flow.safetensors and posterior.safetensors into a folder, no pickle. `load` reads them."""
        filing.write(self, Path(folder))
        return Path(folder)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Posterior:
        """What `save` wrote. Without a model: held draws, log_prob of unconstrained points, summary.

        Raises:
            FileNotFoundError, ValueError: no such files, or files of another kind; a model of another size.
        """
        return cls(**filing.read(Path(folder), model, args, kwargs))
