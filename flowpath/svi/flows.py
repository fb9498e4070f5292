"""The flow of fit_posterior: a Gaussian found beforehand, and gated affine couplings that start at the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from flowpath.bases import StandardNormal
from flowpath.flow import Flow
from flowpath.gated import GatedMLP
from flowpath.svi.handlers import Site
from flowpath.svi.locating import Gaussian
from flowpath.transform import Chain, Transform
from flowpath.transforms.coupling import Coupling
from flowpath.transforms.elementwise import Affine, Elementwise
from flowpath.transforms.linear import TriangularAffine
from flowpath.transforms.normalization import Whiten
from flowpath.transforms.spline import RationalQuadratic

_LARGE_SITE = 50  # numbers from which on a site counts as one of many local latents


def posterior_flow(
    gaussian: Gaussian, sites: Sequence[Site], *, transforms: int = 8, hidden_features: int = 48
) -> Flow:
    """The Gaussian as a flow, with room to become the posterior.

    From the data to the noise: the Gaussian's location and scale, fixed; a trainable affine layer (full rank where the
    scale is a matrix); affine couplings with gated conditioners; and the noise's own width, which only `widen` sets.
    A single latent is bent by a spline. Up to a few hundred latents each pair of couplings splits them at random in
    two halves; above it, global latents are coupled among themselves and move the local ones.

    Args:
        gaussian: where to start.
        sites: of the model, in its order.
        transforms: how many couplings.
        hidden_features: width of their conditioners.

    Returns:
        A flow of the Gaussian's dtype and device.
    """
    dim = len(gaussian.loc)
    dense = gaussian.scale.dim() == 2
    white = Whiten(dim, "full" if dense else "diagonal").set_to(gaussian.loc, gaussian.scale)
    trained: Transform = TriangularAffine(dim) if dense else Elementwise(dim, Affine(log_bound=3.0))
    width = Elementwise(dim, Affine(log_bound=1.0))
    width.requires_grad_(False)
    masks = _halves(dim, transforms) if dense else _by_kind(dim, sites, transforms)
    couplings = [_coupling(mask, hidden_features) for mask in masks]
    flow = Flow(Chain([white, trained, *couplings, width]), StandardNormal(dim))
    return flow.to(gaussian.loc.device, gaussian.loc.dtype)


def widen(flow: Flow, scale: float) -> None:
    """Make the noise of a `posterior_flow` wider by a factor: heavier tails for the price of a little ELBO."""
    width: Elementwise = flow.transform.transforms[-1]  # type: ignore[index,assignment]
    with torch.no_grad():
        width.params[0].fill_(math.atanh(-math.log(scale)))


def _coupling(mask: Sequence[bool], hidden: int) -> Transform:
    element, moved = Affine(log_bound=3.0), sum(mask)
    if moved == len(mask):  # of one feature: nothing conditions it, so an affine map would leave it Gaussian
        return Elementwise(moved, RationalQuadratic(16, bound=5.0))
    net = GatedMLP(len(mask) - moved, moved, num_params=2, hidden_features=hidden)
    return Coupling(mask, element, net)


def _halves(dim: int, count: int) -> list[list[bool]]:
    """Random halves, each followed by its complement; a single feature is transformed alone."""
    if dim == 1:
        return [[True]] * min(count, 1)
    masks = []
    for i in range(count):
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(i // 2)).tolist()
        moved = set(order[dim // 2 :] if i % 2 == 0 else order[: dim // 2])
        masks.append([j in moved for j in range(dim)])
    return masks


def _by_kind(dim: int, sites: Sequence[Site], count: int) -> list[list[bool]]:
    """Locals given globals, nearest the data; then halves of the globals among themselves."""
    small = {j for s in sites if s.free_shape.numel() <= _LARGE_SITE for j in range(s.start, s.stop)}
    if not small or len(small) == dim:
        return _halves(dim, count)
    given = [[j not in small for j in range(dim)]] * 2
    order = sorted(small)
    inner = []
    for half in _halves(len(order), count - 2) if len(order) > 1 else []:
        moved = {j for j, m in zip(order, half, strict=True) if m}
        inner.append([j in moved for j in range(dim)])
    return given + inner


def trainable(flow: Flow) -> list[nn.Parameter]:
    """The parameters that training moves."""
    return [p for p in flow.parameters() if p.requires_grad]
