"""Masked autoregressive transforms: one pass forward, an exact inverse for the price of about one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowpath.eager import full_precision, is_watched
from flowpath.layout import features_first, features_last
from flowpath.nets.masked import MaskedMLP
from flowpath.registry import register
from flowpath.transform import Conditioner, Direction, Element, Record, Transform
from flowpath.transforms.autoregressive_inverse import (
    ImplicitInverse,
    invert,
    invert_by_passes,
    invert_by_steps,
    passes_are_quicker,
    solve_transposed,
)
from flowpath.transforms.driven import drive
from flowpath.transforms.elementwise import check_conditioner


@register("MaskedAutoregressive")
class MaskedAutoregressive(Transform):
    r"""A masked autoregressive transform: feature i is transformed by an Element that saw the features before it,

    .. math:: z_i = \tau(x_i;\, h_i(x_{<i}, c)), \qquad \text{ladj} = \sum_i \log \tau'(x_i).

    Forward is one parallel pass. The inverse is sequential by nature; with a `MaskedMLP` it is computed exactly,
    feature after feature, evaluating each hidden unit once: the arithmetic of one pass, in `features` small steps. Up
    to 64 rows of 16 features or more it sweeps instead, x <- tau^-1(z; h(x)) (Jacobi), which is exact after at most
    `features` sweeps and stops when nothing moves. Its gradient is implicit: at x the triangular system J^T v = g is
    solved by a few vector-Jacobian products; one or two features, up to six in batches of up to 64 rows, second
    derivatives, torch.func, torch.compile, dropout in training mode and Elements with parameters of their own take a
    plain differentiable path.

    "Masked Autoregressive Flow" (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057); its `Inverse` is the IAF of
    Kingma et al. 2016, arXiv:1606.04934.

    Args:
        features: width of the event.
        element: the Element tau.
        conditioner: a `MaskedMLP(features, ...)`, or any Conditioner that is autoregressive in `order`'s positions
            (its inverse then takes `features` full passes).
        order: the order of the features, first one first; by default 0, 1, 2, ...
        context: width of the context.

    Raises:
        ValueError: an order that is no permutation, or a conditioner whose sizes do not fit.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.MaskedAutoregressive(3, fp.Affine(), fp.MaskedMLP(3, num_params=2))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(t.inverse(t(x)[0])[0], x)
        True
    """

    inverse_cost = "sequential"
    order: Tensor
    place: Tensor

    def __init__(
        self,
        features: int,
        element: Element,
        conditioner: Conditioner,
        *,
        order: Sequence[int] | None = None,
        context: int = 0,
    ) -> None:
        super().__init__(features, context)
        check_conditioner("MaskedAutoregressive", conditioner, element)
        for name, want in (("features", features), ("context", context)):
            if getattr(conditioner, name, want) != want:
                raise ValueError(
                    f"MaskedAutoregressive expects a conditioner with {name}={want}, got {getattr(conditioner, name)}"
                )
        natural = torch.arange(features)
        places = natural if order is None else torch.as_tensor(order, dtype=torch.long)
        if not torch.equal(places.sort().values, natural):
            raise ValueError(
                f"MaskedAutoregressive expects order to permute 0 to {features - 1}, got {places.tolist()}"
            )
        self.element, self.conditioner = element, conditioner
        self._reordered = not torch.equal(places, natural)
        self._element_learns = isinstance(element, nn.Module) and next(element.parameters(), None) is not None
        self.register_buffer("order", places, persistent=False)
        self.register_buffer("place", places.argsort(), persistent=False)

    def _sorted(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 0).index_select(0, self.order).movedim(0, -1) if self._reordered else x

    def _unsorted(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 0).index_select(0, self.place).movedim(0, -1) if self._reordered else x

    def _apply_element(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Forward in sorted features, with the ladj per feature."""
        z, ladj = self._drive(features_first(x), context)
        return features_last(z), features_last(ladj)

    def _drive(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with features first."""
        return drive(self.element, self.conditioner, x, x, context, inverse=False)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, ladj = self._drive(features_first(self._sorted(x)), context)
        return self._unsorted(features_last(z)), ladj.sum(0)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with full_precision(z):  # many small products: low precision would buy nothing
            x, ladj = self._invert(self._sorted(z), context)
        return self._unsorted(x), ladj

    def _invert(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(self.conditioner, MaskedMLP) or z.shape[-1] == 1:
            return invert_by_passes(self, z, context)
        # Neither torch.compile nor torch.func follows an autograd.Function that calls others.
        if self._element_learns or self.conditioner.random or is_watched():
            return invert_by_steps(self, z, context, keep_graph=True)
        if not torch.is_grad_enabled():
            return invert(self, z, context)
        if passes_are_quicker(z):
            return invert_by_passes(self, z, context)
        return ImplicitInverse.apply(self, z, context, *self.conditioner.parameters())

    def record(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Record]:
        if direction == "inverse":
            return super().record(direction, value, context)
        with torch.enable_grad():
            value = value if value.requires_grad else value.detach().requires_grad_()
            x = self._sorted(value)
            z, ladj = self._apply_element(x, context)
            output = self._unsorted(z)
        return output, ladj.sum(-1), Record(direction, output, context, (x, z, ladj))

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        """For an IAF's samples: G' J = G - d ladj with J triangular, by Jacobi sweeps in the graph `record` kept.

        Each sweep is one vector-Jacobian product, a few of them suffice, `features` are exact. A MAF's samples take
        one product through its parallel forward pass.
        """
        if record.extra is None:
            return super().pull_score(record, score)
        x, z, ladj = record.extra
        g = self._sorted(score)
        if ladj.requires_grad:
            one = torch.ones_like(ladj)
            (slope,) = torch.autograd.grad(ladj, x, one, retain_graph=True, materialize_grads=True)
            g = g - slope
        return self._unsorted(solve_transposed(z, x, ladj.detach().exp(), g))
