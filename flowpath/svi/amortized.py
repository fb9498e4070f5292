"""AmortizedFlow: a conditional flow over the local latents of a plate, fed by their data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from flowpath.distribution import FlowDistribution
from flowpath.flow import Flow
from flowpath.svi.late import BuiltLate, Recipe, affine_layer, check_recipe, make_flow
from flowpath.svi.prototype import FlatStart, kind_of
from flowpath.svi.replay import Site, latents
from flowpath.transform import Chain, Transform
from flowpath.transforms.linear import TriangularAffine

_GAUSSIAN_UP_TO = 32  # latents a row up to which location and covariance are functions of the context


class AmortizedFlow(BuiltLate, AutoGuide):
    r"""A guide q(z_i | x_i) for latents that are local to the rows of a plate: one conditional flow for all rows.

    .. math:: q(z \mid x) = \prod_{i \in \text{rows}} q_\phi\big(z_i \mid e(x_i)\big)

    Its size does not depend on the number of rows, and a step's memory not either: where the plate shows a part of its
    rows, only these are encoded. Data come in as the model's arguments, in one of two ways: all rows, of which the
    model's plate takes a subsample (arguments whose first dim is the plate's size are cut to the same rows before the
    encoder sees them); or a minibatch, with the plate's `subsample_size` its length.

    Latents outside the plate belong to another guide: join them by `AutoGuideList`, each part over a
    `poutine.block`ed model. "Auto-Encoding Variational Bayes" (Kingma, Welling 2013, arXiv:1312.6114).

    Args:
        model: a Pyro model whose latents are all inside one plate (and in plates further in).
        encoder: takes the model's arguments and returns a context for each row shown, `(rows, C)`. A module is
            trained with the guide.
        flow: an architecture's name, or a function `(features, context) -> Flow`.
        init_loc_fn, init_scale: as `AutoFlow`; the start is the mean over the rows.
        **options: for the named architecture.

    Raises:
        TypeError, ValueError: arguments of the wrong kind; from the first look: latents outside the plate, no plate,
        an encoder whose rows are not those of the plate.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> x = torch.randn(100, 3)
        >>> def model(x):
        ...     with pyro.plate("rows", len(x), subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([10, 3]).to_event(1), obs=x[i])
        >>> guide = fp.svi.AmortizedFlow(model, torch.nn.Linear(3, 8)).setup(x)
        >>> guide.sample(5, x)["z"].shape
        torch.Size([5, 100, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Tensor],
        flow: Recipe = "realnvp",
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.5,
        **options: Any,
    ) -> None:
        check_recipe("AmortizedFlow", flow, options)
        for name, what in (("a Pyro model", model), ("an encoder", encoder)):
            if not callable(what):
                raise TypeError(f"AmortizedFlow expects {name}, got {type(what).__name__}")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"AmortizedFlow expects init_scale > 0, got {init_scale!r}")
        start = FlatStart(init_loc_fn)
        super().__init__(InitMessenger(start)(model))
        self._start, self._init_scale = start, float(init_scale)
        self.encoder = encoder
        self.latent_dim = self.context_dim = 0
        self._begin(flow, options)

    def setup(self, *args: Any, **kwargs: Any) -> AmortizedFlow:
        """Look at the model once, given its arguments, and make the parameters; returns itself."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of the rows shown; arguments as the model's."""
        self.setup(*args, **kwargs)
        flow, result = self._ready(), {}
        plate, context = self._rows(args, kwargs)
        with plate:
            wide = context.reshape(*context.shape[:1], *(1,) * (-self._frame.dim - 1), context.shape[-1])
            latent = pyro.sample(f"_{self._pyro_name}_latent", flow(wide), infer={"is_auxiliary": True})
            for name, (value, log_density) in self._unpack(latent).items():
                site = self._site(name)
                with ExitStack() as stack:
                    for frame in site["cond_indep_stack"]:
                        if frame.name != self._frame.name:
                            stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                    delta = dist.Delta(value, log_density=log_density, event_dim=site["fn"].event_dim)
                    result[name] = pyro.sample(name, delta)
        return result

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """q of the packed unconstrained latents of every row in the arguments, batch shape `(rows,)`."""
        return self._ready()(self.encoder(*args, **kwargs))

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws `(num_samples, rows, *shape)` of each latent, for every row in the arguments."""
        draws = self.get_posterior(*args, **kwargs).sample((num_samples,))
        return {name: value for name, (value, _) in self._unpack(draws, ones=0).items()}

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """The plate, with the rows that the model will see, and their contexts."""
        frame, total = self._frame, self._frame.full_size or self._frame.size
        if self.master is not None:
            plate = self._create_plates(*args, **kwargs)[frame.name]
        elif frame.size == total or not any(_has_rows(a, total) for a in (*args, *kwargs.values())):
            context = self._encode(args, kwargs, None)
            size = len(context) if frame.size == total else total
            return pyro.plate(frame.name, size, subsample_size=len(context), dim=frame.dim), context
        else:
            plate = pyro.plate(frame.name, total, subsample_size=frame.size, dim=frame.dim)
        args = tuple(_cut(a, total, plate) for a in args)
        kwargs = {k: _cut(v, total, plate) for k, v in kwargs.items()}
        return plate, self._encode(args, kwargs, plate.subsample_size)

    def _encode(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None) -> Tensor:
        context = self.encoder(*args, **kwargs)
        if not isinstance(context, Tensor) or context.dim() != 2 or rows not in (None, len(context)):
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"AmortizedFlow expects the encoder to return a context for each row shown, "
                f"({'rows' if rows is None else rows}, C), got {got}"
            )
        return context

    def _unpack(self, latent: Tensor, ones: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and log densities of each site from packed latents `(*lead, rows, *ones, D)`."""
        ones = -self._frame.dim - 1 if ones is None else ones
        latent = latent.flatten(-2 - ones, -2) if ones else latent
        found, at = {}, 0
        for name, shape in self._row_shapes.items():
            site, count = self._site(name), shape.numel()
            u = latent[..., at : at + count].reshape((*latent.shape[:-1], *shape))
            to = biject_to(site["fn"].support)
            value = to(u)
            ladj = to.inv.log_abs_det_jacobian(value, u)
            extra = ladj.dim() - value.dim() + site["fn"].event_dim
            found[name] = value, ladj.flatten(-extra).sum(-1) if extra else ladj
            at += count
        return found

    def _site(self, name: str) -> Site:
        return self.prototype_trace.nodes[name]  # type: ignore[union-attr]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None or self._start is None:
            raise ValueError(
                "this AmortizedFlow was unpickled before it was set up, so it has no model; make a new one"
            )
        with torch.no_grad(), poutine.block(), self._start.like(args, kwargs):
            super()._setup_prototype(*args, **kwargs)
            prototype: Trace = self.prototype_trace  # type: ignore[assignment]
            self._frame = _common_plate(prototype)
            starts = {n: biject_to(s["fn"].support).inv(s["value"]) for n, s in latents(prototype)}
            self._row_shapes = {n: u.shape[1:] for n, u in starts.items()}
            loc = torch.cat([u.flatten(1).mean(0) for u in starts.values()])
            dtype, device = kind_of(self.model, prototype, args, kwargs)
            _, context = self._rows(args, kwargs)
        sizes = {"latents": len(loc), "context": context.shape[-1]}
        if self.flow is None:
            flow = self._build(sizes, *self._asked(dtype, device))
            affine: Any = flow.transform.transforms[0]  # type: ignore[index]
            affine.set_to(loc, torch.full_like(loc, self._init_scale))
        elif self._sizes != sizes:
            raise ValueError(f"AmortizedFlow holds a flow of sizes {self._sizes}, this model has {sizes}")

    @property
    def _sizes(self) -> dict[str, int]:
        return {"latents": self.latent_dim, "context": self.context_dim}

    def _compose(self, sizes: dict[str, int]) -> Flow:
        self.latent_dim, self.context_dim = features, context = sizes["latents"], sizes["context"]
        inner = make_flow("AmortizedFlow", self._recipe, features, context, self._options)
        layers: list[Transform] = [affine_layer(features, None)]
        if features <= _GAUSSIAN_UP_TO:
            layers.append(TriangularAffine(features, context=context))
        return Flow(Chain([*layers, inner.transform]), inner.base, inner.embedding)


def _common_plate(prototype: Trace) -> Any:
    """The outermost plate, which all latents must be in."""
    outer = {
        name: min(site["cond_indep_stack"], key=lambda f: f.dim, default=None) for name, site in latents(prototype)
    }
    if not outer:
        raise RuntimeError("AmortizedFlow found no latent variables; use an empty guide instead")
    free = [name for name, frame in outer.items() if frame is None]
    if free:
        names = ", ".join(map(repr, free))
        raise ValueError(
            f"AmortizedFlow: latent {names} is in no plate, so it belongs to no row: give it a guide of its own, as "
            "AutoFlow over poutine.block(model, ...), and join the two by pyro.infer.autoguide.AutoGuideList"
        )
    plates = {frame.name: frame for frame in outer.values() if frame is not None}
    if len(plates) > 1:
        raise ValueError(f"AmortizedFlow expects latents in one outermost plate, found {', '.join(sorted(plates))}")
    return next(iter(plates.values()))


def _has_rows(value: Any, total: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == total


def _cut(value: Any, total: int, plate: Any) -> Any:
    """An argument with a row for each of the plate's, at the rows that the plate shows."""
    return value[plate._indices] if _has_rows(value, total) and plate._indices is not None else value
