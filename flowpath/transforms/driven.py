"""An Element driven by a conditioner, features first: what couplings and masked autoregressive layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowpath.layout import features_first, features_last
from flowpath.nets import MLP, GatedMLP, MaskedMLP, ResidualMLP
from flowpath.transform import Conditioner, Element
from flowpath.transforms.elementwise import Affine
from flowpath.transforms.spline import RationalQuadratic

_NETS, _ELEMENTS = (MLP, ResidualMLP, MaskedMLP, GatedMLP), (Affine, RationalQuadratic)


def drive(
    element: Element, conditioner: Conditioner, given: Tensor, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The Element on x `(d, *batch)`, its numbers from `given` `(d_in, *batch)` and the context `(*batch, C)`.

    Returns value and ladj, each `(d, *batch)`. Parts of flowpath's own that work features first are called so, which
    spares small batches a dozen views a layer; any other is called as its protocol says.
    """
    if x.dim() == 2 and type(element) in _ELEMENTS and _is_bare(conditioner):
        h = given if context is None else torch.cat([given, features_first(context)])
        return apply_element(element, x, conditioner.numbers(h), inverse)  # type: ignore[attr-defined]
    run = element.inverse if inverse else element.forward
    y, ladj = run(features_last(x), conditioner(features_last(given), context))
    return features_first(y), features_first(ladj)


def apply_element(element: Element, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The Element on x `(d, N)` with its numbers `(num_params, d, N)`: value and ladj, each `(d, N)`."""
    if type(element) in _ELEMENTS:
        direct: Any = element
        return direct.features_first(x, numbers, inverse)
    run = element.inverse if inverse else element.forward
    y, ladj = run(features_last(x), numbers.transpose(1, 2))
    return features_first(y), features_first(ladj)


def _is_bare(conditioner: Any) -> bool:
    """Whether calling it does nothing beside its own forward."""
    return type(conditioner) in _NETS and not (conditioner._forward_hooks or conditioner._forward_pre_hooks)
