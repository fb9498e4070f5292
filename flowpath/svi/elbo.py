"""ELBOs with path gradients: what `pyro.infer.Trace_ELBO` estimates, with less variance near the posterior."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import is_identically_zero
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.trace_tail_adaptive_elbo import TraceTailAdaptive_ELBO
from pyro.infer.tracegraph_elbo import JitTraceGraph_ELBO
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from pyro.util import warn_if_nan
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.estimators import Pathwise, least_variance_weight
from flowpath.svi.modules import Watch, leaf_of
from flowpath.svi.replay import Recording, is_delta, latents, sites_of

_HONOURED = (Trace_ELBO, TraceGraph_ELBO)
_OTHERS = (JitTrace_ELBO, JitTraceGraph_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO)


class PathMixin(Watch, ELBO):
    r"""Path gradients for an ELBO of Pyro: a base class beside `Trace_ELBO` or `TraceGraph_ELBO`, of which it adds:

    .. math:: \nabla_\phi \text{ELBO} = E\Big[\big(\nabla_z \log p(x, z) - \nabla_z \log q_\phi(z)\big)
        \frac{\partial z}{\partial \phi} - c\, \nabla_\phi \log q_\phi(z)\Big|_z\Big]

    All draws z of the guide are taken together: the guide is run again at leaf copies of them, with discrete draws and
    subsamples held, and its joint log density differentiated there. So plates, subsampling, masks, scales, amortised
    and hierarchical guides and vectorised particles come out right. The flows of flowpath give their own score beside
    the draw and are not scored a second time. "Sticking the Landing" (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194).

    Raises:
        TypeError: at class creation, beside an ELBO that does not take its entropy term from the trace.
    """

    estimator: Pathwise
    update_every: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        others = [b.__name__ for b in cls.__mro__ if b in _OTHERS]
        if others or not issubclass(cls, _HONOURED):
            name = (others or [b.__name__ for b in cls.__bases__ if b is not PathMixin] or ["nothing"])[0]
            raise TypeError(
                f"{cls.__name__}: {name} cannot take path gradients, for it does not build its gradient from the log "
                "density of single draws (it enumerates, weighs, is compiled or integrates it); use PathELBO or "
                "PathGraphELBO, or DRegELBO for an importance-weighted bound"
            )

    def __init__(
        self,
        num_particles: int = 1,
        *,
        estimator: Pathwise | None = None,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        update_every: int = 25,
        **options: Any,
    ) -> None:
        check_count(type(self).__name__, "num_particles", num_particles)
        check_count(type(self).__name__, "update_every", update_every)
        estimator = Pathwise("auto") if estimator is None else estimator
        if not isinstance(estimator, Pathwise):
            raise TypeError(
                f"{type(self).__name__} expects estimator=fp.Pathwise(score_weight=...), got {estimator!r}; Pyro's own "
                "Trace_ELBO is the score-function estimator where a guide has no rsample"
            )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            **options,
        )
        self.estimator, self.update_every = estimator, update_every
        self.weight: float | Tensor = 1.0 if self.auto else estimator.score_weight  # type: ignore[assignment]
        self.updates = self._count = 0

    @property
    def auto(self) -> bool:
        """Whether the weight of the score part is estimated along the way."""
        return isinstance(self.estimator.score_weight, str)

    def at(self, weight: float | Tensor) -> PathMixin:
        """The same ELBO with a fixed weight of the score part, a number or a scalar tensor."""
        new = copy.copy(self)
        new.estimator, new.weight = Pathwise(weight), weight
        return new

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, a float, after a backward pass that leaves the gradient estimate in the parameters."""
        self._follow_weight(model, guide, args, kwargs)
        total: Any = 0.0
        with self.watching([]):
            for traces in self._get_traces(model, guide, args, kwargs):
                loss, surrogate = (t / self.num_particles for t in self._particle(*traces))
                if getattr(surrogate, "requires_grad", False):
                    surrogate.backward(retain_graph=self.retain_graph)
                total = total + torch_item(loss)
        warn_if_nan(total, "loss")
        return float(total)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar tensor whose gradient is the estimate: what `elbo(model, guide)(*args)` returns."""
        self._follow_weight(model, guide, args, kwargs)
        with self.watching_modules(model, guide):
            loss, surrogate = self.loss_and_surrogate(model, guide, *args, **kwargs)
        return loss.detach() + (surrogate - surrogate.detach())

    def loss_and_surrogate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and a scalar whose gradient is the estimate of the loss's.

        Nothing in it reads a tensor's value, so `torch.fx.experimental.proxy_tensor.make_fx` traces it at a fixed
        weight, given a model and guide that can be traced and validation switched off.
        """
        loss: Any = 0.0
        surrogate: Any = 0.0
        for traces in self._get_traces(model, guide, args, kwargs):
            one, its_surrogate = self._particle(*traces)
            loss, surrogate = loss + one / self.num_particles, surrogate + its_surrogate / self.num_particles
        return loss, surrogate

    def update_weight(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """One more estimate of the "auto" weight from two half batches of fresh draws; returns the running average.

        `loss_and_grads` and `differentiable_loss` call it every `update_every` steps.
        """
        return self.take_half_batches(*(self._half_batch(model, guide, args, kwargs) for _ in range(2)))

    def take_half_batches(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
        """Move the "auto" weight by flat path and score gradients of two half batches; returns the running average."""
        weight = least_variance_weight(first, second)
        if math.isfinite(weight):
            self.updates += 1
            self.weight = float(self.weight + (float(weight) - self.weight) / min(self.updates, 10))
        return float(self.weight)

    def _follow_weight(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.auto and torch.is_grad_enabled():
            if self._count % self.update_every == 0:
                self.update_weight(model, guide, *args, **kwargs)
            self._count += 1

    def _half_batch(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Flat path and score gradients of the loss over half the particles."""
        half = self.at(0.0)
        half.num_particles = max(self.num_particles // 2, 1)
        path: Any = 0.0
        score: Any = 0.0
        with poutine.trace(param_only=True) as capture:
            for model_trace, guide_trace in half._get_traces(model, guide, args, kwargs):
                path = path + half._particle(model_trace, guide_trace)[1]
                score = score + sum(s["score_term"] for s in guide_trace.nodes.values() if "score_term" in s)
        params = {leaf_of(s["value"]) for _, s in sites_of(capture.trace)}
        params |= {p for m in (model, guide) if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad}
        return _flat_gradient(path, list(params)), _flat_gradient(score, list(params))

    def _get_trace(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
        if not torch.is_grad_enabled():
            return super()._get_trace(model, guide, args, kwargs)  # type: ignore[safe-super]
        recording = Recording(guide)
        model_trace, guide_trace = super()._get_trace(model, recording, args, kwargs)  # type: ignore[safe-super]
        self.refuse_untrained(s for t in (model_trace, guide_trace) for _, s in sites_of(t))
        for name, site in latents(guide_trace):
            _refuse_enumerated(type(self).__name__, name, site)
        if isinstance(self.weight, Tensor) or self.weight != 1.0:
            self._reweigh(guide_trace, recording.path_terms(args, kwargs))
        return model_trace, guide_trace

    def _reweigh(self, guide_trace: Trace, path_terms: dict[str, Tensor]) -> None:
        """Give each draw's entropy term the gradient path + c score."""
        for name, site in latents(guide_trace):
            log_q, score_function, entropy = site["score_parts"]
            if is_identically_zero(entropy) or is_delta(site["fn"]):
                continue
            if not is_identically_zero(score_function):
                raise ValueError(
                    f"{type(self).__name__}: site {name!r} ({type(site['fn']).__name__}) is reparameterised in part "
                    "only, so its gradient has no path view; use fp.Pathwise(score_weight=1.0)"
                )
            path = path_terms.get(name, entropy.new_zeros(()))
            site["score_term"] = entropy.sum() - path
            site["score_parts"] = ScoreParts(log_q, score_function, path + self.weight * site["score_term"])

    def _particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
        """Loss and surrogate of one trace of particles."""
        raise NotImplementedError


class PathELBO(PathMixin, Trace_ELBO):
    r"""`pyro.infer.Trace_ELBO` with path gradients, for `SVI` and as a module: `PathELBO()(model, guide)`.

    The gradient of log q is path + c score (see `fp.Pathwise`): c = 0 vanishes where the guide is the posterior, c = 1
    is Pyro's own. "auto" estimates the c of least variance on draws of its own every `update_every` steps, so the
    gradient stays unbiased; `weight` is the one in use. Losses are those of `Trace_ELBO` on the same noise.

    Args:
        num_particles, vectorize_particles, max_plate_nesting: as `Trace_ELBO`; so are further options.
        estimator: `fp.Pathwise` with a number or "auto", the default.
        update_every: steps between two estimates of "auto".

    Raises:
        TypeError: another estimator, or a guide that is a Messenger. ValueError: from a step: a flow that nothing
        would train, an enumerated site, a flow with dropout, a site reparameterised in part.

    Example:
        >>> import flowpath as fp, pyro, pyro.distributions as dist
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        >>> elbo = fp.svi.PathELBO(num_particles=8, vectorize_particles=True, estimator=fp.Pathwise(0.0))
        >>> svi = pyro.infer.SVI(model, fp.svi.AutoFlow(model), pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step()
        >>> pyro.clear_param_store()
    """

    def _particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
        log_p = sum(s["log_prob_sum"] for s in model_trace.nodes.values() if s["type"] == "sample")
        loss, surrogate, log_ratio = -log_p, -log_p, None
        for site in guide_trace.nodes.values():
            if site["type"] != "sample":
                continue
            loss = loss + site["log_prob_sum"]
            _, score_function, entropy = site["score_parts"]
            if not is_identically_zero(entropy):
                surrogate = surrogate + entropy.sum()
            if not is_identically_zero(score_function):
                log_ratio = _compute_log_r(model_trace, guide_trace) if log_ratio is None else log_ratio
                surrogate = surrogate - (log_ratio.sum_to(site["cond_indep_stack"]) * score_function).sum()
        return loss, surrogate


class PathGraphELBO(PathMixin, TraceGraph_ELBO):
    """`PathELBO` on `pyro.infer.TraceGraph_ELBO`: discrete draws see the costs downstream of them only.

    Arguments and errors as `PathELBO`.

    Example:
        >>> import flowpath as fp
        >>> elbo = fp.svi.PathGraphELBO(num_particles=8, estimator=fp.Pathwise(score_weight=0.0))
        >>> elbo.num_particles, elbo.weight
        (8, 0.0)
    """

    def _particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
        elbo, surrogate = self._loss_and_surrogate_loss_particle(model_trace, guide_trace)
        return -elbo, surrogate


def _flat_gradient(loss: Any, params: list[Tensor]) -> Tensor:
    if not params or not getattr(loss, "requires_grad", False):
        return torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype if params else None)
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def _refuse_enumerated(who: str, name: str, site: dict[str, Any]) -> None:
    if site["infer"].get("_enumerate_dim") is not None or site["infer"].get("enumerate") == "parallel":
        raise ValueError(
            f"{who}: site {name!r} of the guide is to be enumerated, which this ELBO does not do; enumerate it in the "
            "model with pyro.infer.TraceEnum_ELBO, which has no path gradients"
        )
