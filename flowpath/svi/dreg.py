"""The importance-weighted bound of a Pyro model with the doubly reparameterised gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import warn_if_nan
from torch import Tensor

from flowpath.checks import check_count
from flowpath.svi.modules import Watch
from flowpath.svi.replay import Recording, Site, is_delta, is_subsample, latents, scaled, sites_of, subsampled


class DRegELBO(Watch, ELBO):
    r"""The importance-weighted bound -E[log mean_k p(x, z_k) / q(z_k)], with the DReG gradient.

    .. math:: \sum_k w_k^2\, \nabla_z \log\frac{p(x, z_k)}{q(z_k)} \frac{\partial z_k}{\partial \phi}, \qquad
        \sum_k w_k\, \nabla_\theta \log p_\theta(x, z_k), \qquad w = \text{softmax}_k \log\frac{p(x, z_k)}{q(z_k)}

    for the parameters of the guide and of the model. Its signal-to-noise ratio grows with K, where that of Pyro's
    `RenyiELBO(alpha=0)` falls. Guide and model are run at leaf copies of the draws, as in `PathMixin`; one weight is
    made of all latents of a particle, so a subsampled plate is refused: there the bound is biased.

    "Doubly Reparameterized Gradient Estimators" (Tucker, Lawson, Gu, Maddison 2018, arXiv:1810.04152).

    Args:
        num_samples: K.
        vectorize_particles: False for a loop over the samples.
        max_plate_nesting, and further options: as `pyro.infer.Trace_ELBO`.

    Raises:
        ValueError: from a step: a draw without rsample, a subsampled plate, a flow that nothing would train.

    Example:
        >>> import flowpath as fp, pyro, pyro.distributions as dist
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        >>> svi = pyro.infer.SVI(model, fp.svi.AutoFlow(model), pyro.optim.Adam({"lr": 1e-3}), fp.svi.DRegELBO(8))
        >>> loss = svi.step()
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        num_samples: int,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        **options: Any,
    ) -> None:
        check_count("DRegELBO", "num_samples", num_samples)
        super().__init__(
            num_particles=num_samples,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            **options,
        )

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The bound's negative, a float."""
        return _watched(self._loss_and_surrogate(model, guide, args, kwargs)[0])

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The same after a backward pass that leaves the gradient estimate in the parameters."""
        with self.watching([]):
            loss, surrogate = self._loss_and_surrogate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        return _watched(loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound's negative, a scalar tensor whose gradient is the estimate."""
        with self.watching_modules(model, guide):
            loss, surrogate = self._loss_and_surrogate(model, guide, args, kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_surrogate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The bound's negative, and a scalar whose gradient is the estimate: nothing in it reads a tensor's value."""
        return self._loss_and_surrogate(model, guide, args, kwargs)

    def _loss_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            runs = [self._run(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
            log_w = torch.cat([run.log_w for run in runs]).detach()
            weights = torch.softmax(log_w, 0).split([len(run.log_w) for run in runs])
            surrogates = [run.surrogate(w) for run, w in zip(runs, weights, strict=True)]
        return math.log(self.num_particles) - torch.logsumexp(log_w, 0), -torch.stack(surrogates).sum()

    def _get_trace(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Recording, dict[str, Tensor], Trace, Trace]:
        recording = Recording(guide)
        recording(*args, **kwargs)
        guide_trace, leaves = recording.again(args, kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        self.refuse_untrained(s for t in (model_trace, recording.trace) for _, s in sites_of(t))
        for name, site in (*latents(recording.trace), *model_trace.iter_stochastic_nodes()):
            _refuse(name, site, of_guide=name in recording.trace)
        return recording, leaves, prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)

    def _run(self, recording: Recording, leaves: dict[str, Tensor], guide_trace: Trace, model_trace: Trace) -> _Run:
        model_trace.compute_log_prob()
        log_p = [s["log_prob"] for s in model_trace.nodes.values() if s["type"] == "sample"]
        volume = [scaled(s["fn"].log_prob(s["value"]), s) for _, s in latents(guide_trace) if is_delta(s["fn"])]
        log_q = [q for _, q in recording.log_q(guide_trace, leaves)]
        return _Run(recording, leaves, self._by_particle(log_p) - self._by_particle(volume), self._by_particle(log_q))

    def _by_particle(self, terms: list[Tensor]) -> Tensor:
        """The terms summed over all dims but the particles': `(particles,)`, one where they come in a loop."""
        if not (self.vectorize_particles and self.num_particles > 1):
            return sum((t.sum() for t in terms), torch.zeros(())).unsqueeze(0)
        rows = (t.movedim(-int(self.max_plate_nesting), 0).reshape(self.num_particles, -1).sum(1) for t in terms)
        return sum(rows, torch.zeros(self.num_particles))


@dataclass(frozen=True)
class _Run:
    """A run of guide and model at leaf copies of the draws.

    Args:
        log_p: log p less what Delta sites cost, `(particles,)`; a function of the leaves and of parameters.
        log_q: log q of the draws, `(particles,)`; wanted as a function of the leaves only.
    """

    recording: Recording
    leaves: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor

    @property
    def log_w(self) -> Tensor:
        return self.log_p - self.log_q

    def surrogate(self, w: Tensor) -> Tensor:
        """A scalar: along the draws w^2 d log(p / q), in the parameters of log p w d log p."""
        direct = (w * self.log_p).sum()
        if not self.leaves or not self.log_w.requires_grad:
            return direct
        leaves = list(self.leaves.values())
        slopes = torch.autograd.grad((w.square() * self.log_w).sum(), leaves, retain_graph=True, allow_unused=True)
        return direct + sum(self.recording.along(self.leaves, slopes).values())


def _watched(loss: Tensor) -> float:
    """The loss as a number; NaN is warned of, as Pyro does."""
    return float(warn_if_nan(loss.detach(), "loss"))


def _refuse(name: str, site: Site, *, of_guide: bool) -> None:
    part = subsampled(site)
    if part is not None:
        raise ValueError(
            f"DRegELBO: plate {part!r} shows a part of its data, and the log of a mean of minibatch weights is no "
            "bound; give the model all of it, or use PathELBO"
        )
    if of_guide and not is_subsample(site) and not getattr(site["fn"], "has_rsample", False):
        raise ValueError(
            f"DRegELBO: site {name!r} ({type(site['fn']).__name__}) has no rsample, so no gradient travels through its "
            "draw; use PathELBO, or sum the site out"
        )
