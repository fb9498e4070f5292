"""The posterior that fit_posterior returns: draws, densities, summaries, and how far to trust them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowpath.diagnostics import psis
from flowpath.flow import Flow
from flowpath.io import load, save, storage
from flowpath.svi.climbing import Judgement
from flowpath.svi.density import ModelDensity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowpath.svi.guide import AutoFlow
    from flowpath.svi.refining import Refined

_KEY, _FORMAT = "flowpath-posterior", 1
_TRUSTED = 0.7  # k-hat from which on importance weights have no usable variance


class Summary(dict[str, dict[str, Tensor]]):
    """site -> {mean, sd, 5%, 50%, 95%, mcse}, each of the site's shape; prints as a table."""

    def __str__(self) -> str:
        head = f"{'':24s}" + "".join(f"{key:>11s}" for key in next(iter(self.values()), {}))
        lines = [head]
        for name, columns in self.items():
            shape = next(iter(columns.values())).shape
            for index in (
                [()] if not shape else list(torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)))
            ):
                place = tuple(int(i) for i in index)
                label = name + (f"[{','.join(map(str, place))}]" if place else "")
                lines.append(f"{label:24s}" + "".join(f"{float(v[place]):11.4g}" for v in columns.values()))
        return "\n".join(lines)


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
        others: where several seeds were asked for, the other runs' ELBO and largest difference of a mean, in sds.
        density: the model's log density; None after `load` without a model.
    """

    flow: Flow = field(repr=False)
    judgement: Judgement | None
    held: Held = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    notes: list[str]
    reason: str
    seconds: float
    steps: int
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
        return self.khat is not None and self.khat < _TRUSTED

    def verdict(self) -> str:
        """One line in plain words, and what to do next where it is bad."""
        j = self.judgement
        if j is None:
            return "cannot tell: " + (self.notes[-1] if self.notes else "there is no density of all the data")
        apart = next((o for o in self.others if o["apart"] > 0.2 or abs(o["elbo"] - j.elbo) > 0.5), None)
        if apart is not None:
            return (
                f"two seeds disagree (ELBO {apart['elbo']:.2f} and {j.elbo:.2f}, a mean by {apart['apart']:.1f} sd): "
                "the posterior may have several modes; reparameterise the model, or compare with refine(time_limit)"
            )
        if j.nonfinite > 0.001:
            return (
                f"log p is not finite at {j.nonfinite:.2%} of the flow's draws: check the model's likelihood there "
                "(overflow, a Cholesky factor that fails), or pass init= near the posterior"
            )
        if not j.khat < _TRUSTED:
            return (
                f"k-hat {j.khat:.2f}: importance weights are not to be trusted and the draws may miss the tails; train "
                "longer (max_steps=, time_limit=), reparameterise the model, or use refine(time_limit)"
            )
        if j.ess < 0.1 or j.gap > 1.0:
            return (
                f"k-hat {j.khat:.2f}, but ESS {j.ess:.0%} and KL about {j.gap:.1f} nats: raw draws are not the "
                "posterior's; use corrected draws with care, train longer, or use refine(time_limit)"
            )
        close = "very close to" if j.gap < 0.02 and j.khat < 0.5 else "close to" if j.gap < 0.1 else "near"
        return (
            f"the flow is {close} the posterior as far as its own draws can tell (KL about {max(j.gap, 0.0):.3f} nats, "
            f"k-hat {j.khat:.2f}, ESS {j.ess:.0%}); a mode that no draw came near would not show"
        )

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
        if not corrected:
            return self.values(self.flow.sample(num_samples, generator=generator))
        if self.held.log_weights is None:
            raise ValueError(f"sample(corrected=True) needs the density of all the data: {self.verdict()}")
        u, log_w = self._pool(num_samples, generator)
        rows = _systematic(psis(_usable(log_w))[0].exp(), num_samples, generator)
        return self.values(u[rows.to(u.device)])

    def _pool(self, num_samples: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draws to resample from: those held, or fresh ones where more are asked for."""
        held = self.held.log_weights
        if held is not None and (num_samples <= len(held) // 2 or self.density is None):
            return self.held.u, held
        from flowpath.svi.climbing import weighted_draws

        return weighted_draws(self.flow, self._model().of_all_data(), max(2 * num_samples, 10_000), generator)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at unconstrained points u `(n, D)`: site -> `(n, *shape)`."""
        if self.density is None:
            return self._held_values(u)
        with torch.no_grad():
            parts = [self.density.values(part.to(self.density.dtype)) for part in u.split(1000)]
        dtype = self.density.asked
        return {name: torch.cat([p[name] for p in parts]).to(dtype) for name in self.density.sites}

    def _held_values(self, u: Tensor) -> dict[str, Tensor]:
        """Without a model: the values of held draws, by their points."""
        place = {row.cpu().numpy().tobytes(): i for i, row in enumerate(self.held.u)}
        rows = [place.get(row.cpu().numpy().tobytes()) for row in u]
        if None in rows:
            raise ValueError(
                "this posterior was loaded without its model, so it has its held draws only "
                f"({len(self.held.u)}); pass model= and args= to Posterior.load for new ones"
            )
        return {name: v[torch.tensor(rows)] for name, v in self.held.values.items()}

    def log_prob(self, at: Tensor | Mapping[str, Tensor]) -> Tensor:
        """log q at unconstrained points `(*batch, D)`; or at one value of all latents, whose density it then is.

        For values, constrained, the density is that of the values: log q(u) - log |det dx / du|.
        """
        if isinstance(at, Tensor):
            return self.flow.log_prob(at.to(self.flow.base.like))
        return self._model().log_prob_of_values(dict(at), self.flow.log_prob)

    def summary(self) -> Summary:
        """Mean, sd, quantiles and Monte Carlo error of each latent, importance-corrected where k-hat allows."""
        return summarise(self.held.values, self.weights())

    def weights(self) -> Tensor:
        """Normalised smoothed weights of the held draws `(n,)`; equal ones where weights cannot be trusted."""
        log_w = self.held.log_weights
        if log_w is None or not self.trusted:
            return torch.full((len(self.held.u),), 1.0 / len(self.held.u), dtype=torch.float64)
        return psis(_usable(log_w))[0].exp().cpu()

    # -- with the model

    def _model(self) -> ModelDensity:
        if self.density is None:
            raise ValueError("this posterior was loaded without its model; pass model= and args= to Posterior.load")
        return self.density

    def predictive(
        self, *args: Any, num_samples: int = 1000, seed: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws of the model's other sites given posterior draws, for new arguments: site -> `(num_samples, *shape)`.

        A site that the model observes is drawn where its data argument is None, as in `pyro.infer.Predictive`.
        """
        from pyro.infer import Predictive

        draws = self.sample(num_samples, seed=seed)
        batched = _with_plate_dims(draws, self._model())
        return dict(Predictive(self._model().model, posterior_samples=batched)(*args, **kwargs))

    @property
    def guide(self) -> AutoFlow:
        """The flow as an `AutoFlow` guide of the model, to go on with in Pyro; it shares the flow's parameters."""
        from flowpath.svi.guide import AutoFlow

        density = self._model()
        guide = AutoFlow(density.model, flow=lambda features, context: self.flow)
        guide.setup(*density.args, **density.kwargs)
        guide.flow = self.flow
        return guide

    def refine(self, time_limit: float = 60.0, *, chains: int = 4, seed: int | None = None) -> Refined:
        """NUTS in the flow's noise space, started from corrected draws. See `flowpath.svi.refining.refine`."""
        from flowpath.svi.refining import refine

        return refine(self, time_limit, chains=chains, seed=seed)

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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save(self.flow, folder / "flow.safetensors")
        tensors = {"u": self.held.u, **{f"value/{n}": v for n, v in self.held.values.items()}}
        if self.held.log_weights is not None:
            tensors["log_weights"] = self.held.log_weights
        config = {
            "format": _FORMAT,
            "judgement": None if self.judgement is None else vars(self.judgement),
            "history": self.history,
            "notes": self.notes,
            "reason": self.reason,
            "seconds": self.seconds,
            "steps": self.steps,
            "others": self.others,
        }
        storage.write(folder / "posterior.safetensors", tensors, _KEY, config)
        return folder

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Posterior:
        """What `save` wrote. Without a model: held draws, log_prob of unconstrained points, summary.

        Raises:
            FileNotFoundError, ValueError: no such files, or files of another kind; a model of another size.
        """
        folder = Path(folder)
        tensors, config = storage.read(folder / "posterior.safetensors", _KEY, "Posterior.load")
        storage.check_format(config, _FORMAT, folder, "Posterior.load")
        flow = load(folder / "flow.safetensors")
        density = None if model is None else ModelDensity(model, args, kwargs)
        if density is not None and torch.Size([density.dim]) != flow.event_shape:
            raise ValueError(
                f"Posterior.load: the model has {density.dim} unconstrained latents with these arguments, the "
                f"posterior {flow.event_shape[0]}"
            )
        values = {n.removeprefix("value/"): v for n, v in tensors.items() if n.startswith("value/")}
        judged = config["judgement"]
        return cls(
            flow=flow,
            judgement=None if judged is None else Judgement(**judged),
            held=Held(tensors["u"], values, tensors.get("log_weights")),
            history=config["history"],
            notes=config["notes"],
            reason=config["reason"],
            seconds=config["seconds"],
            steps=config["steps"],
            others=config["others"],
            density=density,
        )


def summarise(values: Mapping[str, Tensor], weights: Tensor) -> Summary:
    """Weighted mean, sd, quantiles and Monte Carlo standard error of draws, site by site."""
    found = Summary()
    for name, v in values.items():
        flat = v.detach().double().cpu().reshape(len(v), -1)
        w = weights.double().unsqueeze(-1)
        mean = (w * flat).sum(0)
        centred = flat - mean
        columns = {"mean": mean, "sd": (w * centred.square()).sum(0).sqrt()}
        order = flat.argsort(0)
        mass = weights.double()[order].cumsum(0)
        for q in (0.05, 0.5, 0.95):
            row = (mass < q).sum(0).clamp_max(len(flat) - 1)
            columns[f"{q:.0%}"] = flat.gather(0, order).gather(0, row.unsqueeze(0)).squeeze(0)
        columns["mcse"] = (w.square() * centred.square()).sum(0).sqrt()
        found[name] = {key: c.reshape(v.shape[1:]) for key, c in columns.items()}
    return found


def _usable(log_w: Tensor) -> Tensor:
    return torch.where(torch.isfinite(log_w), log_w, -torch.inf)


def _systematic(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Row numbers `(count,)` drawn by systematic resampling, shuffled."""
    cpu = None if generator is None else torch.Generator().manual_seed(generator.initial_seed())
    offset = torch.rand((), dtype=torch.float64, generator=cpu)
    places = (torch.arange(count, dtype=torch.float64) + offset) / max(count, 1)
    rows = torch.searchsorted(weights.double().cpu().cumsum(0), places).clamp_max(len(weights) - 1)
    return rows[torch.randperm(count, generator=cpu)]


def _with_plate_dims(draws: dict[str, Tensor], density: ModelDensity) -> dict[str, Tensor]:
    """Draws with room for the model's plates between the sample dim and a site's own dims, as Predictive wants."""
    return {
        name: v.reshape(len(v), *(1,) * (density.nest - density.sites[name].batch_dims), *v.shape[1:])
        for name, v in draws.items()
    }


def apart(one: Summary, other: Summary) -> float:
    """The largest difference of two summaries' means, in units of the first's sd."""
    worst = 0.0
    for name, columns in one.items():
        difference = (columns["mean"] - other[name]["mean"]).abs() / columns["sd"].clamp_min(1e-300)
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst if math.isfinite(worst) else math.inf
