"""The flow of fit_posterior: a Gaussian found beforehand, and gated affine couplings that start at the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowpath.bases import StandardNormal
from flowpath.flow import Flow
from flowpath.nets import GatedMLP, PickedMLP, RowMLP
from flowpath.svi.handlers import Site
from flowpath.svi.locating import Gaussian
from flowpath.transform import Chain, Transform
from flowpath.transforms.coupling import Coupling
from flowpath.transforms.elementwise import Affine, Elementwise
from flowpath.transforms.linear import TriangularAffine
from flowpath.transforms.normalization import Whiten
from flowpath.transforms.sinh_arcsinh import SinhArcsinh
from flowpath.transforms.spline import RationalQuadratic

_LARGE_SITE = 50  # numbers from which on a site counts as one of many local latents


def posterior_flow(
    gaussian: Gaussian, sites: Sequence[Site], *, transforms: int = 8, hidden_features: int = 48
) -> Flow:
    """The Gaussian as a flow, with room to become the posterior.

    From the data to the noise: the Gaussian's location and scale, fixed; a trainable affine layer (full rank where the
    scale is a matrix, else one number a latent); affine couplings with gated conditioners; and the noise's own width,
    which only `widen` sets. Up to a few hundred latents each pair of couplings splits them at random in two halves.
    Above it the model's hierarchy is kept: global latents are coupled among themselves, and each kind of local latent
    moves with its row's other latents and the globals. A single latent gets a spline between two maps for its tails.

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
    if dim == 1:
        layers: list[Transform] = [Elementwise(1, e) for e in (SinhArcsinh(), RationalQuadratic(8), SinhArcsinh())]
    elif dense:
        layers = [_coupling(mask, hidden_features) for mask in _halves(dim, transforms)]
    else:
        layers = _hierarchy(dim, sites, transforms, hidden_features)
    flow = Flow(Chain([white, trained, *layers, width]), StandardNormal(dim))
    return flow.to(gaussian.loc.device, gaussian.loc.dtype)


def widen(flow: Flow, scale: float) -> None:
    """Make the noise of a `posterior_flow` wider by a factor: heavier tails for the price of a little ELBO."""
    width: Elementwise = flow.transform.transforms[-1]  # type: ignore[index,assignment]
    with torch.no_grad():
        width.params[0].fill_(math.atanh(-math.log(scale)))


def _coupling(mask: Sequence[bool], hidden: int) -> Transform:
    moved = sum(mask)
    net = GatedMLP(len(mask) - moved, moved, num_params=2, hidden_features=hidden)
    return Coupling(mask, Affine(log_bound=3.0), net)


def _halves(dim: int, count: int) -> list[list[bool]]:
    """Random halves, each followed by its complement."""
    masks = []
    for i in range(count):
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(i // 2)).tolist()
        moved = set(order[dim // 2 :] if i % 2 == 0 else order[: dim // 2])
        masks.append([j in moved for j in range(dim)])
    return masks


def _hierarchy(dim: int, sites: Sequence[Site], count: int, hidden: int) -> list[Transform]:
    """Each kind of local latent given its mates and the globals, twice; then the globals among themselves."""
    local = [range(s.start, s.stop) for s in sites if s.free_shape.numel() > _LARGE_SITE]
    shared = [j for s in sites if s.free_shape.numel() <= _LARGE_SITE for j in range(s.start, s.stop)]
    if not local or (not shared and len(local) == 1):
        return [_coupling(mask, hidden) for mask in _halves(dim, count)]
    rows = [_given_mates(dim, kind, local, shared) for kind in [*local[::-1], *local[::-1]]]
    inner = [_among(dim, shared, half, hidden) for half in _halves(len(shared), count)] if len(shared) > 1 else []
    return [*rows, *inner]


def _given_mates(dim: int, kind: range, local: Sequence[range], shared: Sequence[int]) -> Transform:
    """One site of local latents, a row each, given the sites of as many rows and the globals."""
    place = {j: i for i, j in enumerate(j for j in range(dim) if j not in kind)}
    mates = [[place[j] for j in other] for other in local if other != kind and len(other) == len(kind)]
    net = RowMLP(dim - len(kind), mates, [place[j] for j in shared], len(kind), num_params=2)
    return Coupling([j in kind for j in range(dim)], Affine(log_bound=3.0), net)


def _among(dim: int, shared: Sequence[int], half: Sequence[bool], hidden: int) -> Transform:
    """A coupling of the global latents: one half moves given the other, whatever the local ones."""
    moved = {j for j, m in zip(shared, half, strict=True) if m}
    kept = [j for j in range(dim) if j not in moved]
    columns = [i for i, j in enumerate(kept) if j in set(shared)]
    net = PickedMLP(len(kept), columns, len(moved), num_params=2, hidden_features=hidden)
    return Coupling([j in moved for j in range(dim)], Affine(log_bound=3.0), net)
