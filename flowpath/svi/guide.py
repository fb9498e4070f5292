"""AutoFlow: a normalizing flow over all latents of a Pyro model, as an autoguide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform as TorchTransform
from torch.distributions import biject_to

from flowpath.bases import StandardNormal
from flowpath.checks import check_count
from flowpath.distribution import FlowDistribution
from flowpath.flow import Flow
from flowpath.interop import to_torch
from flowpath.svi.density import ModelDensity
from flowpath.svi.late import BuiltLate, affine_layer, check_recipe, make_flow
from flowpath.svi.locating import locate
from flowpath.svi.prototype import FlatStart, check_prototype, kind_of
from flowpath.transform import Chain
from flowpath.transforms.linear import Permutation
from flowpath.transforms.low_rank import LowRankAffine


class AutoFlow(BuiltLate, AutoContinuous):
    r"""A guide that is a flow over the packed, unconstrained latents u of a model.

    .. math:: u = m + L\, g_\phi(\varepsilon), \qquad \varepsilon \sim N(0, I)

    The flow g starts at the identity inside a trainable affine layer, so an untrained guide is the Gaussian
    N(init_loc, init_scale^2 I). Every AutoContinuous way of use works: `SVI`, `Predictive`, `NeuTraReparam`,
    `AutoGuideList`, Pyro's ELBOs and `PathELBO`. All parameters are `nn.Parameter`s, so `state_dict` is the way to save
    them; two guides never share any.

    The model is looked at once, at the first call or by `setup`: its latents must be continuous, as many and of the
    same support at every call.

    Args:
        model: a Pyro model.
        flow: the name of an architecture, which is built without whitening, or a function `(features, context) ->
            Flow`. The default was chosen by measurement: docs/pyro.md has the table.
        init_loc_fn: where the latents start, as for Pyro's autoguides; flat priors start at 0, unconstrained.
        init_scale: the standard deviation of every unconstrained latent at the start.
        rank: None for a full-rank affine layer up to 256 latents and 16 columns above that; or a number of columns.
        **options: for the named architecture: transforms, hidden_features, ...; iaf has 3 layers of (64, 64), tanh.

    Raises:
        TypeError, ValueError: arguments of the wrong kind; from the first look: no latents, discrete ones, a support
        that depends on another latent, sites that come and go, local latents under a subsampled plate.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, tau), obs=y)
        >>> guide = fp.svi.AutoFlow(model).setup(torch.randn(20))
        >>> guide.sample(100)["tau"].shape, guide.median()["mu"].shape
        (torch.Size([100]), torch.Size([]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | Callable[[int, int], Flow] = "iaf",
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        check_recipe("AutoFlow", flow, options)
        if not callable(model):
            raise TypeError(f"AutoFlow expects a Pyro model, got {type(model).__name__}")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"AutoFlow expects init_scale > 0, got {init_scale!r}")
        if rank is not None:
            check_count("AutoFlow", "rank", rank)
        start = FlatStart(init_loc_fn)
        super().__init__(model, init_loc_fn=start)
        self._start: FlatStart | None = start
        self._init_scale, self._rank, self.latent_dim = float(init_scale), rank, 0
        self._begin(flow, options)

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Look at the model once, given its arguments, and make the parameters; returns itself."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def locate(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Set the affine layer to where the posterior is and how wide, with the model's arguments; returns itself.

        Newton's method from several starts finds the Gaussian of best ELBO, as in `fit_posterior`, so that SVI has the
        shape left to learn. Couplings that were trained before keep what they learnt.

        Raises:
            ModelError: the model has no density that can be climbed; ValueError: log p is finite at no start.
        """
        self.setup(*args, **kwargs)
        density = ModelDensity(self.model, args, kwargs)
        gaussian, *_ = locate(density.of_all_data(), density.starts())
        layer: Any = self._ready().transform.transforms[0]  # type: ignore[index]
        scale = gaussian.scale
        if isinstance(layer, LowRankAffine) and scale.dim() == 2:
            scale = scale.square().sum(-1).sqrt()
        layer.set_to(gaussian.loc.to(layer.shift if isinstance(layer, LowRankAffine) else layer.numbers), scale)
        return self

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the packed unconstrained latents."""
        return self._ready()()

    def get_base_dist(self) -> dist.TorchDistribution:
        """The distribution of the noise."""
        base = self._ready().base
        if isinstance(base, StandardNormal):
            return dist.Normal(base.like.new_zeros(self.latent_dim), 1.0).to_event(1)
        return Flow(Permutation(range(self.latent_dim)), base)()

    def get_transform(self, *args: Any, **kwargs: Any) -> TorchTransform:
        """Noise to packed unconstrained latents."""
        return to_torch(self._ready().transform)

    @torch.no_grad()
    def sample(self, num_samples: int = 1) -> dict[str, Tensor]:
        """Draws of every latent in its own space, `(num_samples, *shape)` each."""
        return {name: value for name, (value, _) in self.constrain(self._ready().sample(num_samples)).items()}

    def constrain(self, latent: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Each latent in its own space and the log-det of the map there, from packed unconstrained ones `(*batch, D)`.

        Values are `(*batch, *shape)`, log-dets `(*batch,)`.
        """
        batch, found, at = latent.shape[:-1], {}, 0
        for name, site in self._sites():
            shape = self._unconstrained_shapes[name]
            u = latent[..., at : at + shape.numel()].reshape((*batch, *shape))
            to = biject_to(site["fn"].support)
            value = to(u)
            ladj = to.log_abs_det_jacobian(u, value)
            found[name] = value, ladj.reshape((*batch, -1)).sum(-1)
            at += shape.numel()
        return found

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """Packed unconstrained latents `(*batch, D)` of values `(*batch, *shape)` of every latent."""
        parts = []
        for name, site in self._sites():
            if name not in values:
                raise ValueError(f"AutoFlow expects a value for each latent; {name!r} is missing")
            to = biject_to(site["fn"].support)
            value = torch.as_tensor(values[name]).to(self._ready().base.like)
            batch = value.shape[: value.dim() - site["value"].dim()]
            if value.shape[len(batch) :] != site["value"].shape:
                raise ValueError(
                    f"AutoFlow expects {name!r} as (*batch, {', '.join(map(str, site['value'].shape))}), got "
                    f"{tuple(value.shape)}"
                )
            parts.append(to.inv(value).reshape((*batch, -1)))
        batch = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
        return torch.cat([p.expand(*batch, p.shape[-1]) for p in parts], -1)

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log density of the guide at values of all latents, each `(*batch, *shape)` in its own space: `(*batch,)`.

        Raises:
            ValueError: a latent is missing or of another shape.
        """
        latent = self.unconstrain(values)
        return self._ready().log_prob(latent) - sum(ladj for _, ladj in self.constrain(latent).values())

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, num_samples: int = 10_000, **kwargs: Any) -> Any:
        """Quantiles of each latent, `(len(quantiles), *shape)`, estimated from draws."""
        q = self._ready().base.like.new_tensor(list(quantiles))
        return {name: torch.quantile(value, q, dim=0) for name, value in self.sample(num_samples).items()}

    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent (of each number in it), estimated from draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], num_samples=num_samples).items()}

    # --- the first look ------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None or self._start is None:
            raise ValueError("this AutoFlow was unpickled before it was set up, so it has no model; make a new one")
        with torch.no_grad(), poutine.block(), self._start.like(args, kwargs):
            super()._setup_prototype(*args, **kwargs)
            prototype: Trace = self.prototype_trace  # type: ignore[assignment]
            self._unconstrained_shapes = {n: torch.Size(s) for n, s in self._unconstrained_shapes.items()}
            check_prototype(self.model, prototype, args, kwargs)
            self._create_plates(*args, **kwargs)
            loc = self._init_loc()
            dtype, device = kind_of(self.model, prototype, args, kwargs)
        if self.flow is None:
            flow = self._build({"latents": self.latent_dim}, *self._asked(dtype, device))
            affine: Any = flow.transform.transforms[0]  # type: ignore[index]
            affine.set_to(loc, torch.full_like(loc, self._init_scale))
        elif self.flow.event_shape != (self.latent_dim,):
            raise ValueError(
                f"AutoFlow holds a flow of {self.flow.event_shape[0]} latents, this model has {self.latent_dim}"
            )

    @property
    def _sizes(self) -> dict[str, int]:
        return {"latents": self.latent_dim}

    def _compose(self, sizes: dict[str, int]) -> Flow:
        self.latent_dim = sizes["latents"]
        inner = make_flow("AutoFlow", self._recipe, self.latent_dim, 0, self._options)
        return Flow(Chain([affine_layer(self.latent_dim, self._rank), inner.transform]), inner.base)

    def _sites(self) -> list[tuple[str, Any]]:
        if self.prototype_trace is None:
            raise ValueError("AutoFlow has not seen its model yet; call guide.setup(*args), or the guide itself, first")
        return list(self.prototype_trace.iter_stochastic_nodes())
