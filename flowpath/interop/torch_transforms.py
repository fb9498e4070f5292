"""torch's and Pyro's transforms as flowpath's."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as tt

from flowpath.interop.as_torch import TransformForTorch
from flowpath.registry import register
from flowpath.transform import Direction, Transform


def from_torch(transform: tt.Transform) -> Transform:
    """A torch (or Pyro) transform as the last step from noise to data.

    torch's transforms map noise to data, so `fp.from_torch(t).inverse` is t and `.forward` is its inverse. With
    `torch.distributions.biject_to(constraint)` a flow lives on that support: positive, an interval, one side, a
    simplex, ordered vectors. Put it first in the Chain.

    Pyro's learned transforms come in with their parameters, which train. Nothing is shared with `transform`, and
    nothing of a call is kept: what torch and Pyro cache can outlive an update of the parameters.

    Args:
        transform: a bijective torch transform. Its tensors become buffers, its parameters parameters.

    Returns:
        A Transform whose events have the transform's event dims, at least one. Of what `fp.to_torch` made without a
        context, the transform it was made of.

    Raises:
        TypeError: no torch transform, or one that waits for a context. ValueError: one that is not bijective, that
            cannot be inverted at a new point, or whose parameters hang on a fixed context.

    Example:
        >>> import torch, flowpath as fp
        >>> positive = fp.from_torch(torch.distributions.biject_to(torch.distributions.constraints.positive))
        >>> flow = fp.Flow(fp.Chain([positive, fp.TriangularAffine(2)]), fp.StandardNormal(2))
        >>> bool((flow.sample(100) > 0).all()), flow.log_prob(torch.tensor([[1.0, -1.0]]))
        (True, tensor([-inf], grad_fn=<AddBackward0>))
    """
    if isinstance(transform, TransformForTorch) and transform.context is None:
        return transform.transform
    _check(transform)
    return TorchTransform(_without_cache(transform))  # fp.register remembers, and copies, what it is built with


@register("TorchTransform")
class TorchTransform(Transform):
    """What `from_torch` returns. Data outside the support get ladj -inf (density 0), never NaN.

    Args:
        transform: a bijective torch transform from noise to data.
    """

    context = None

    torch_transform: tt.Transform

    def __init__(self, transform: tt.Transform) -> None:
        _check(transform)
        super().__init__()
        # Past Module's own __setattr__: what of it learns is registered below, once.
        self.__dict__["torch_transform"] = _without_cache(transform)
        learned = [t for t in _all(self.torch_transform) if isinstance(t, nn.Module)]
        self.learned = nn.ModuleList(learned) if learned else None
        for name, value in _tensors("t", self.torch_transform):
            self.register_buffer(name.replace(".", "_"), value, persistent=False)
        self._paths = [name for name, _ in _tensors("t", self.torch_transform)]
        self._event_dims = transform.codomain.event_dim, transform.domain.event_dim
        self._image = _image(self.torch_transform)

    @property
    def data_support(self) -> constraints.Constraint | None:  # type: ignore[override]
        """Where the transform's values lie."""
        return _as_event(self._image)

    @property
    def noise_support(self) -> constraints.Constraint | None:  # type: ignore[override]
        """Where its arguments lie."""
        return _as_event(self.torch_transform.domain)

    def shape_after(self, direction: Direction, shape: Sequence[int]) -> torch.Size:
        t = self.torch_transform
        return torch.Size(t.inverse_shape(shape) if direction == "forward" else t.forward_shape(shape))

    def _apply(self, fn: Any, recurse: bool = True) -> TorchTransform:
        super()._apply(fn, recurse)
        for path in self._paths:  # the transform's own tensors follow the module to its device and dtype
            holder, name = _resolve(self.torch_transform, path)
            setattr(holder, name, getattr(self, path.replace(".", "_")))
        self._image = _image(self.torch_transform)
        return self

    def _run(self, t: tt.Transform, value: Tensor) -> tuple[Tensor, Tensor]:
        """Value and ladj of t, which is `torch_transform` or its inverse."""
        if not value.numel():  # torch's sum over the event refuses an empty batch, and so do some of Pyro's layers
            out = value.reshape(t.forward_shape(value.shape))
            return out, out.new_zeros(out.shape[: out.dim() - max(t.codomain.event_dim, 1)])
        out = t(value)
        ladj = t.log_abs_det_jacobian(value, out)
        if self.learned is not None:  # Pyro keeps tensors of the last call, graph and all
            _forget(self.learned)
        if not max(self._event_dims):
            return out, ladj.expand(out.shape).sum(-1)
        return out, ladj.expand(out.shape[: out.dim() - t.codomain.event_dim])

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.data_support is None:
            return self._run(self.torch_transform.inv, x)
        inside = _holds(self._image, x)
        wide = inside.reshape(*inside.shape, *(1,) * max(self._event_dims[0], 1))
        safe = torch.where(wide | torch.isnan(x), x, self._somewhere(x))
        z, ladj = self._run(self.torch_transform.inv, safe)
        outside = ~inside & ~torch.isnan(x).flatten(inside.dim()).any(-1)
        return z, torch.where(outside, torch.full_like(ladj, -torch.inf), ladj)

    def _somewhere(self, x: Tensor) -> Tensor:
        """A point of the support, to stand in for data outside it."""
        shape = self.torch_transform.inverse_shape(x.shape)
        return self.torch_transform(x.new_zeros(shape))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(self.torch_transform, z)


# Pyro calls these bijective; each of them finds the noise of its own last draw only.
_NO_INVERSE = ("BlockAutoregressive", "NeuralAutoregressive", "Planar", "Polynomial", "Radial", "Sylvester")


def _check(transform: Any) -> None:
    """A bijective transform that can score new points and needs no context, or an error that says why not."""
    title = type(transform).__name__
    if not isinstance(transform, tt.Transform):
        if hasattr(transform, "condition"):
            raise TypeError(
                f"from_torch expects a transform, got {title}, which makes one for each context; build it in flowpath, "
                "with context= (fp.Coupling, fp.MaskedAutoregressive, fp.Elementwise)"
            )
        raise TypeError(f"from_torch expects a torch.distributions Transform, got {title}")
    if not transform.bijective and type(transform) is not tt.StickBreakingTransform:
        raise ValueError(f"from_torch expects a bijective transform, got {title}")
    for part in (t for t in _all(transform) if not _parts(t)):
        title = type(part).__name__
        if title.removeprefix("Conditioned") in _NO_INVERSE or type(part)._inverse is tt.Transform._inverse:
            raise ValueError(
                f"from_torch cannot take {title}: it has no inverse, so it cannot both sample and score new points; "
                "use fp.Coupling or fp.MaskedAutoregressive"
            )
        if _fixed_context(part):
            raise ValueError(
                f"from_torch cannot take {title}: its parameters come from a module beside it, as after "
                "condition(context), and no flow could train or move them; build it in flowpath, with context= "
                "(fp.Coupling, fp.MaskedAutoregressive, fp.Elementwise)"
            )


def _fixed_context(t: tt.Transform) -> bool:
    """Whether t is what Pyro's `condition(context)` returns: it hangs on a module that it does not own."""
    if isinstance(t, nn.Module) and any(type(m).__name__.startswith("Conditioned") for m in t.modules()):
        return True
    beside = (nn.Module, functools.partial, types.MethodType)
    return any(isinstance(v, beside) and getattr(v, "__self__", None) is not t for v in vars(t).values())


def _as_event(constraint: Any) -> Any:
    """The constraint of an event of at least one dim; None where it is the whole space."""
    if type(_per_value(constraint)) is type(constraints.real):
        return None
    return constraints.independent(constraint, 1) if constraint.event_dim == 0 else constraint


def _per_value(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _holds(constraint: Any, x: Tensor) -> Tensor:
    """Whether each event of x `(*batch, *event)` lies in it: `(*batch,)`; torch's own check refuses an empty batch."""
    inner = _per_value(constraint)
    inside = inner.check(x)
    return (
        inside.flatten(inside.dim() - dims).all(-1)
        if (dims := max(constraint.event_dim, 1) - inner.event_dim)
        else inside
    )


def _image(t: tt.Transform) -> Any:
    """Where the values of t lie. A composition that ends in an affine map says "real" of itself, whatever it maps."""
    if isinstance(t, tt.IndependentTransform):
        return constraints.independent(_image(t.base_transform), t.reinterpreted_batch_ndims)
    if isinstance(t, tt.CatTransform):
        return constraints.cat([_image(part) for part in t.transforms], t.dim, t.lengths)
    if not isinstance(t, tt.ComposeTransform):
        return t.codomain
    image: Any = constraints.real
    for part in t.parts:
        image = _scaled(image, part) if isinstance(part, tt.AffineTransform) else _image(part)
    return image


def _each(pick: Any, a: Any, b: Any) -> Any:
    """min or max, element by element where there are elements; numbers keep their digits as numbers."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return pick(a, b)
    return (torch.minimum if pick is min else torch.maximum)(torch.as_tensor(a), torch.as_tensor(b))


def _scaled(constraint: Any, t: tt.AffineTransform) -> Any:
    """The image of a constraint under loc + scale * value."""
    inner = _per_value(constraint)
    ends = [getattr(inner, name, None) for name in ("lower_bound", "upper_bound")]
    if ends == [None, None]:
        return t.codomain
    low, high = (None if end is None else t.loc + t.scale * end for end in ends)
    if low is not None and high is not None:
        image: Any = constraints.interval(_each(min, low, high), _each(max, low, high))
    else:
        falling = torch.as_tensor(t.scale).lt(0).flatten()
        if bool(falling.any() != falling.all()):
            raise ValueError("from_torch expects an affine map of one-sided values to have scales of one sign")
        above = (low is not None) != bool(falling.any())
        image = (constraints.greater_than if above else constraints.less_than)(high if low is None else low)
    dims = max(constraint.event_dim, t.event_dim)
    return constraints.independent(image, dims) if dims else image


def _without_cache(t: tt.Transform) -> tt.Transform:
    """A copy that shares no tensor with the user's, and caches nothing."""
    if isinstance(t, tt.ComposeTransform):
        return tt.ComposeTransform([_without_cache(p) for p in t.parts])
    if isinstance(t, tt.IndependentTransform):
        return tt.IndependentTransform(_without_cache(t.base_transform), t.reinterpreted_batch_ndims)
    if isinstance(t, tt._InverseTransform):
        return _without_cache(t.inv).inv
    if isinstance(t, tt.CatTransform):
        return tt.CatTransform([_without_cache(p) for p in t.transforms], t.dim, t.lengths)
    if isinstance(t, tt.StackTransform):
        return tt.StackTransform([_without_cache(p) for p in t.transforms], t.dim)
    if isinstance(t, nn.Module):
        return _copy_of_module(t)
    new = object.__new__(type(t))
    new.__dict__.update(
        {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in t.__dict__.items() if k != "_inv"}
    )
    new._inv, new._cache_size, new._cached_x_y = None, 0, (None, None)
    return new


def _copy_of_module(t: Any) -> Any:
    """A deep copy without the tensors of the last call, which no deepcopy takes, and without a cache from now on."""
    held: dict[int, Any] = {id(v): None for m in t.modules() for v in _kept(m).values()}
    held |= {id(m.__dict__["_cached_x_y"]): (None, None) for m in t.modules() if "_cached_x_y" in m.__dict__}
    new = copy.deepcopy(t, held)
    for m in new.modules():
        if isinstance(m, tt.Transform):
            m._cache_size, m._inv = 0, None
    return new


def _kept(m: nn.Module) -> dict[str, Tensor]:
    """The tensors of its last call that a Pyro transform holds."""
    return {k: v for k, v in vars(m).items() if k.startswith("_cache") and isinstance(v, Tensor)}


def _forget(m: nn.Module) -> None:
    for part in m.modules():
        for name in _kept(part):
            setattr(part, name, None)


def _all(t: tt.Transform) -> Iterator[tt.Transform]:
    """t and all that it is made of."""
    yield t
    for _, part in _parts(t):
        yield from _all(part)


def _parts(t: tt.Transform) -> list[tuple[str, tt.Transform]]:
    if isinstance(t, tt.ComposeTransform):
        return [(f"parts.{i}", p) for i, p in enumerate(t.parts)]
    if isinstance(t, tt.IndependentTransform):
        return [("base_transform", t.base_transform)]
    if isinstance(t, tt._InverseTransform):
        return [("_inv", t._inv)]  # type: ignore[list-item]
    if isinstance(t, tt.CatTransform | tt.StackTransform):
        return [(f"transforms.{i}", p) for i, p in enumerate(t.transforms)]
    return []


def _tensors(path: str, t: tt.Transform) -> list[tuple[str, Tensor]]:
    found = [(f"{path}.{k}", v) for k, v in t.__dict__.items() if isinstance(v, Tensor)]
    return found + [pair for name, part in _parts(t) for pair in _tensors(f"{path}.{name}", part)]


def _resolve(t: tt.Transform, path: str) -> tuple[Any, str]:
    holder: Any = t
    *steps, name = path.split(".")[1:]
    for step in steps:
        holder = holder[int(step)] if step.isdigit() else getattr(holder, step)
    return holder, name
