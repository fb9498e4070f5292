"""AutoFlow: a normalizing flow over all latents of a Pyro model, as an autoguide."""

from __future__ import annotations

import copy
import itertools
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

from flowpath.architectures import architectures
from flowpath.bases import StandardNormal
from flowpath.checks import check_count
from flowpath.distribution import FlowDistribution
from flowpath.flow import Flow
from flowpath.interop import to_torch
from flowpath.svi.prototype import FlatStart, check_prototype, kind_of
from flowpath.transform import Chain
from flowpath.transforms.linear import Permutation, TriangularAffine
from flowpath.transforms.low_rank import LowRankAffine
from flowpath.transforms.normalization import ActNorm, Whiten

FULL_RANK_UP_TO = 256
RANK_ABOVE = 16
_UNASKED = torch.float16  # the dtype of the anchor until somebody calls .double() or .float()
_serial = itertools.count()


class AutoFlow(AutoContinuous):
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
        **options: for the named architecture: transforms, hidden_features, ...

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

    flow: Flow | None
    _anchor: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | Callable[[int, int], Flow] = "realnvp",
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        _check_recipe(flow, options)
        if not callable(model):
            raise TypeError(f"AutoFlow expects a Pyro model, got {type(model).__name__}")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"AutoFlow expects init_scale > 0, got {init_scale!r}")
        if rank is not None:
            check_count("AutoFlow", "rank", rank)
        start = FlatStart(init_loc_fn)
        super().__init__(model, init_loc_fn=start)
        self._start: FlatStart | None = start
        self._recipe, self._options, self._init_scale, self._rank = flow, options, float(init_scale), rank
        self.register_buffer("_anchor", torch.zeros((), dtype=_UNASKED), persistent=False)
        self.flow = None
        self.latent_dim = 0
        self._name_apart()

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Look at the model once, given its arguments, and make the parameters; returns itself."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
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
            self._build(self.latent_dim, *self._asked(dtype, device))
            self._affine.set_to(loc, torch.full_like(loc, self._init_scale))
        elif self.flow.event_shape != (self.latent_dim,):
            raise ValueError(
                f"AutoFlow holds a flow of {self.flow.event_shape[0]} latents, this model has {self.latent_dim}"
            )

    def _asked(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """What `.to`, `.double` and the like asked for before the first look, else what the model has."""
        anchor = self._anchor
        return (
            dtype if anchor.dtype == _UNASKED else anchor.dtype,
            device if anchor.device.type == "cpu" else anchor.device,
        )

    def _build(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.latent_dim = features
        inner = _make(self._recipe, features, self._options)
        rank = self._rank if self._rank is not None or features <= FULL_RANK_UP_TO else RANK_ABOVE
        affine = TriangularAffine(features) if rank is None else LowRankAffine(features, min(rank, features))
        flow = Flow(Chain([affine, inner.transform]), inner.base)
        self.flow = flow.to(dtype=dtype, device=device)

    @property
    def _affine(self) -> TriangularAffine | LowRankAffine:
        return self._ready().transform.transforms[0]  # type: ignore[index, return-value]

    def _ready(self) -> Flow:
        flow = self.flow
        if flow is None:
            raise ValueError("AutoFlow has not seen its model yet; call guide.setup(*args), or the guide itself, first")
        return flow

    def _sites(self) -> list[tuple[str, Any]]:
        if self.prototype_trace is None:
            raise ValueError("AutoFlow has not seen its model yet; call guide.setup(*args), or the guide itself, first")
        return list(self.prototype_trace.iter_stochastic_nodes())

    # --- saving and copying --------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` needs beside the parameters: how many latents, in which dtype."""
        if self.flow is None:
            return {"latents": 0}
        return {"latents": self.latent_dim, "dtype": str(self.flow.base.like.dtype).removeprefix("torch.")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Build the flow that a saved `state_dict` is of, where the guide has not seen its model yet."""
        features = state["latents"]
        if self.flow is None and features:
            if not isinstance(self._recipe, str):
                raise ValueError(
                    "AutoFlow built of a function cannot know what a state_dict needs; call guide.setup(*args) first"
                )
            dtype, device = self._asked(getattr(torch, state["dtype"]), self._anchor.device)
            self._build(features, dtype, device)
        elif self.flow is not None and features != self.latent_dim:
            raise ValueError(f"AutoFlow of {self.latent_dim} latents got a state_dict of {features}")

    def __getstate__(self) -> dict[str, Any]:
        recipe = self._recipe if isinstance(self._recipe, str) else None
        modules = self._modules | {"flow": copy.deepcopy(self._modules.get("flow"))}  # less what Pyro hangs on tensors
        drop = {"_model": None, "_start": None, "master": None, "_recipe": recipe}
        return self.__dict__ | drop | ({"_modules": modules} if "flow" in self._modules else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_apart()

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__ |= {"_model": self._model, "_start": self._start, "_recipe": self._recipe}
        return new

    def _name_apart(self) -> None:
        """A name of its own in Pyro's store, where guides of one name would share parameters."""
        i = next(_serial)
        self._pyro_name = f"{type(self).__name__}{i or ''}"


def _check_recipe(flow: Any, options: dict[str, Any]) -> None:
    if isinstance(flow, str):
        if flow not in architectures:
            raise ValueError(f"AutoFlow expects an architecture of {', '.join(sorted(architectures))}, got {flow!r}")
        if "whiten" in options:
            raise ValueError("AutoFlow whitens by its own affine layer; drop whiten=")
    elif isinstance(flow, Flow) or not callable(flow):
        raise TypeError(
            f"AutoFlow expects flow= as the name of an architecture or a function (features, context) -> Flow, got "
            f"{type(flow).__name__}"
        )
    elif options:
        raise TypeError(f"AutoFlow takes options ({', '.join(options)}) for a named architecture only")


def _make(recipe: str | Callable[[int, int], Flow], features: int, options: dict[str, Any]) -> Flow:
    """The flow inside the affine layer."""
    if isinstance(recipe, str):
        return architectures[recipe](features, whiten="none", **options)
    flow = recipe(features, 0)
    if not isinstance(flow, Flow) or flow.event_shape != (features,) or flow.context:
        raise ValueError(f"AutoFlow expects its function to return a Flow of {features} features and no context")
    if not flow.has_rsample:
        raise ValueError(f"AutoFlow needs a flow with rsample; its base {type(flow.base).__name__} has none")
    unset = [type(m).__name__ for m in flow.modules() if isinstance(m, (Whiten, ActNorm))]
    if unset:
        raise ValueError(f'AutoFlow never shows its flow data to set {unset[0]} from; build it with whiten="none"')
    return flow
