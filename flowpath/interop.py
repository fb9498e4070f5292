"""Adapters to and from other libraries' transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import transforms as tt

from flowpath.registry import register
from flowpath.transform import Direction, Transform


def from_torch(transform: tt.Transform) -> TorchTransform:
    """A torch (or Pyro) transform as the last step from noise to data.

    torch's transforms map noise to data, so `fp.from_torch(t).inverse` is t and `.forward` is its inverse. With
    `torch.distributions.biject_to(constraint)` a flow lives on that support: positive, an interval, one side, a
    simplex, ordered vectors. Put it first in the Chain.

    Args:
        transform: a bijective torch transform. Its tensors become buffers.

    Returns:
        A Transform whose events have the transform's event dims, at least one.

    Raises:
        TypeError: no torch transform. ValueError: one that is not bijective.

    Example:
        >>> import torch, flowpath as fp
        >>> positive = fp.from_torch(torch.distributions.biject_to(torch.distributions.constraints.positive))
        >>> flow = fp.Flow(fp.Chain([positive, fp.TriangularAffine(2)]), fp.StandardNormal(2))
        >>> bool((flow.sample(100) > 0).all()), flow.log_prob(torch.tensor([[1.0, -1.0]]))
        (True, tensor([-inf], grad_fn=<AddBackward0>))
    """
    return TorchTransform(transform)


@register("TorchTransform")
class TorchTransform(Transform):
    """What `from_torch` returns. Data outside the support get ladj -inf (density 0), never NaN.

    Args:
        transform: a bijective torch transform from noise to data.
    """

    context = None

    def __init__(self, transform: tt.Transform) -> None:
        if not isinstance(transform, tt.Transform):
            raise TypeError(f"from_torch expects a torch.distributions Transform, got {type(transform).__name__}")
        if not transform.bijective and type(transform) is not tt.StickBreakingTransform:
            raise ValueError(f"from_torch expects a bijective transform, got {type(transform).__name__}")
        super().__init__()
        self.torch_transform = _without_cache(transform)
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

    def _ladj(self, z: Tensor, x: Tensor) -> Tensor:
        codomain, domain = self._event_dims
        if not x.numel():  # torch's sum over the event refuses an empty batch
            return x.new_zeros(x.shape[: x.dim() - max(codomain, 1)])
        ladj = self.torch_transform.log_abs_det_jacobian(z, x)
        return ladj.sum(-1) if max(codomain, domain) == 0 else ladj

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inside = _holds(self._image, x)
        wide = inside.reshape(*inside.shape, *(1,) * max(self._event_dims[0], 1))
        safe = torch.where(wide | torch.isnan(x), x, self._somewhere(x))
        z = self.torch_transform.inv(safe)
        ladj = -self._ladj(z, safe)
        outside = ~inside & ~torch.isnan(x).flatten(inside.dim()).any(-1)
        return z, torch.where(outside, torch.full_like(ladj, -torch.inf), ladj)

    def _somewhere(self, x: Tensor) -> Tensor:
        """A point of the support, to stand in for data outside it."""
        shape = self.torch_transform.inverse_shape(x.shape)
        return self.torch_transform(x.new_zeros(shape))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.torch_transform(z)
        return x, self._ladj(z, x)


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
    copy = t.with_cache(0) if t._cache_size else t
    new = object.__new__(type(copy))
    new.__dict__.update(
        {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in copy.__dict__.items() if k != "_inv"}
    )
    new._inv = None
    return new


def _parts(t: tt.Transform) -> list[tuple[str, tt.Transform]]:
    if isinstance(t, tt.ComposeTransform):
        return [(f"parts.{i}", p) for i, p in enumerate(t.parts)]
    if isinstance(t, tt.IndependentTransform):
        return [("base_transform", t.base_transform)]
    if isinstance(t, tt._InverseTransform):
        return [("_inv", t._inv)]  # type: ignore[list-item]
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
