"""The same flow in five libraries: depth, widths, bins, box and direction equal, a plain ReLU net in each.

`LIBRARIES[library][kind](Shape(...))` is a `Rival`. What cannot be made equal is said where it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import flowpath as fp


@dataclass(frozen=True)
class Shape:
    """Sizes of a flow. `inverse` makes the autoregressive ones IAFs."""

    features: int
    transforms: int = 5
    hidden: tuple[int, ...] = (128, 128)
    bins: int = 8
    bound: float = 5.0
    inverse: bool = False


@dataclass(frozen=True)
class Rival:
    """A library's flow behind the calls that are timed."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    rsample: Callable[[int], Tensor]
    rsample_and_log_prob: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


Build = Callable[[Shape], Rival]


class PlainNet(nn.Module):
    """The conditioner handed to nflows and normflows, whose own nets are residual."""

    def __init__(self, width: int, outputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden_features = hidden[-1]
        sizes = [width, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def even(i: int) -> bool:
    """Whether layer i transforms the features 0, 2, 4, ..."""
    return i % 2 == 0


# flowpath


def _flowpath(layers: list[fp.Transform], features: int) -> Rival:
    return rival_of(fp.Flow(fp.Chain(layers), fp.StandardNormal(features)))


def rival_of(flow: fp.Flow) -> Rival:
    """A flow of flowpath as a rival."""
    return Rival(flow, flow.log_prob, flow.rsample, flow.rsample_and_log_prob)


def flowpath_coupling(s: Shape) -> Rival:
    element, layers = fp.RationalQuadratic(s.bins, bound=s.bound), []
    for i in range(s.transforms):
        mask = [even(j) == even(i) for j in range(s.features)]
        net = fp.MLP(s.features - sum(mask), sum(mask), num_params=element.num_params, hidden_features=s.hidden)
        layers.append(fp.Coupling(mask, element, net))
    return _flowpath(layers, s.features)


def _flowpath_masked(s: Shape, element: Any) -> Rival:
    layers: list[fp.Transform] = []
    for i in range(s.transforms):
        if i:
            layers.append(fp.Permutation.reverse(s.features))
        net = fp.MaskedMLP(s.features, num_params=element.num_params, hidden_features=s.hidden)
        layer: fp.Transform = fp.MaskedAutoregressive(s.features, element, net)
        layers.append(fp.Inverse(layer) if s.inverse else layer)
    return _flowpath(layers, s.features)


def flowpath_autoregressive(s: Shape) -> Rival:
    return _flowpath_masked(s, fp.RationalQuadratic(s.bins, bound=s.bound))


def flowpath_affine(s: Shape) -> Rival:
    return _flowpath_masked(s, fp.Affine())


# nflows


def _nflows(layers: list[nn.Module], s: Shape) -> Rival:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, InverseTransform

    chain = CompositeTransform(layers)
    flow = Flow(InverseTransform(chain) if s.inverse else chain, StandardNormal([s.features]))
    return Rival(flow, flow.log_prob, flow.sample, flow.sample_and_log_prob)


def nflows_coupling(s: Shape) -> Rival:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Layer

    def layer(i: int) -> nn.Module:
        mask = torch.tensor([1.0 if even(j) == even(i) else 0.0 for j in range(s.features)])
        options = {"num_bins": s.bins, "tails": "linear", "tail_bound": s.bound}
        return Layer(mask, lambda a, b: PlainNet(a, b, s.hidden), **options)

    return _nflows([layer(i) for i in range(s.transforms)], s)


def _nflows_masked(s: Shape, kind: Any, **options: Any) -> Rival:
    from nflows.transforms import ReversePermutation

    layers: list[nn.Module] = []
    net = {"hidden_features": s.hidden[0], "num_blocks": len(s.hidden) - 1, "use_residual_blocks": False}
    for i in range(s.transforms):
        layers += [ReversePermutation(s.features)] if i else []
        layers.append(kind(s.features, **net, **options))
    return _nflows(layers, s)


def nflows_autoregressive(s: Shape) -> Rival:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Layer

    return _nflows_masked(s, Layer, num_bins=s.bins, tails="linear", tail_bound=s.bound)


def nflows_affine(s: Shape) -> Rival:
    from nflows.transforms import MaskedAffineAutoregressiveTransform as Layer

    return _nflows_masked(s, Layer)


# zuko (its splines' box is fixed at 5; its couplings take features in another order)


def _zuko(flow: Any, s: Shape) -> Rival:
    from zuko.lazy import Flow, LazyInverse

    if s.inverse:
        flow = Flow([LazyInverse(t) for t in flow.transform.transforms], flow.base)
    return Rival(
        flow,
        lambda x: flow().log_prob(x),
        lambda n: flow().rsample((n,)),
        lambda n: flow().rsample_and_log_prob((n,)),
    )


def zuko_coupling(s: Shape) -> Rival:
    import zuko

    spline = zuko.transforms.MonotonicRQSTransform
    shapes = [(s.bins,), (s.bins,), (s.bins - 1,)]
    options = {"transforms": s.transforms, "hidden_features": s.hidden}
    return _zuko(zuko.flows.coupling.NICE(s.features, univariate=spline, shapes=shapes, **options), s)


def zuko_autoregressive(s: Shape) -> Rival:
    import zuko

    return _zuko(zuko.flows.NSF(s.features, transforms=s.transforms, bins=s.bins, hidden_features=s.hidden), s)


def zuko_affine(s: Shape) -> Rival:
    import zuko

    return _zuko(zuko.flows.MAF(s.features, transforms=s.transforms, hidden_features=s.hidden), s)


# normflows (noise to data is its forward direction, so each layer is turned round)


def _normflows(layers: list[Any], s: Shape, reverse: bool) -> Rival:
    import normflows

    class Turned(normflows.flows.Flow):  # type: ignore[name-defined,misc]
        """A layer in the directions of the others, features reversed before it where asked."""

        def __init__(self, layer: nn.Module, reverse: bool) -> None:
            super().__init__()
            self.layer, self.reverse = layer, reverse

        def to_noise(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, ladj = self.layer.forward(x.flip(1) if self.reverse else x, None)
            return z, ladj.view(-1)

        def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
            x, ladj = self.layer.inverse(z, None)
            return (x.flip(1) if self.reverse else x), ladj.view(-1)

        def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.to_noise(z) if s.inverse else self.to_data(z)

        def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.to_data(x) if s.inverse else self.to_noise(x)

    turned = [Turned(layer, reverse and i > 0) for i, layer in enumerate(layers)]
    base = normflows.distributions.DiagGaussian(s.features, trainable=False)
    flow = normflows.NormalizingFlow(base, turned if s.inverse else turned[::-1])
    return Rival(flow, flow.log_prob, lambda n: flow.sample(n)[0], flow.sample)


def normflows_coupling(s: Shape) -> Rival:
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling as Layer

    def layer(i: int) -> nn.Module:
        mask = torch.tensor([1.0 if even(j) == even(i) else 0.0 for j in range(s.features)])
        options = {"num_bins": s.bins, "tails": "linear", "tail_bound": s.bound}
        return Layer(mask, lambda a, b: PlainNet(a, b, s.hidden), apply_unconditional_transform=False, **options)

    return _normflows([layer(i) for i in range(s.transforms)], s, reverse=False)


def _normflows_masked(s: Shape, kind: Any, **options: Any) -> Rival:
    net = {"hidden_features": s.hidden[0], "num_blocks": len(s.hidden) - 1, "use_residual_blocks": False}
    return _normflows([kind(s.features, **net, **options) for _ in range(s.transforms)], s, reverse=True)


def normflows_autoregressive(s: Shape) -> Rival:
    from normflows.flows.neural_spline.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressive as Layer,
    )

    options = {"num_bins": s.bins, "tails": "linear", "tail_bound": s.bound, "init_identity": False}
    return _normflows_masked(s, Layer, **options)


def normflows_affine(s: Shape) -> Rival:
    from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive as Layer

    return _normflows_masked(s, Layer)


# Pyro (its couplings split in halves, features reversed between; they hold parameters for the other half unused)


def _pyro(layers: list[Any], s: Shape, inverse: bool) -> Rival:
    import pyro.distributions as dist

    base = dist.Normal(torch.zeros(s.features), torch.ones(s.features))
    module = nn.ModuleList(t for t in layers if isinstance(t, nn.Module))
    transforms = layers if inverse else [t.inv for t in layers]

    def flow() -> Any:
        return dist.TransformedDistribution(base, transforms)

    def both(n: int) -> tuple[Tensor, Tensor]:
        q = flow()
        x = q.rsample((n,))
        return x, q.log_prob(x)

    return Rival(module, lambda x: flow().log_prob(x), lambda n: flow().rsample((n,)), both)


def pyro_coupling(s: Shape) -> Rival:
    import pyro.distributions.transforms as T
    from pyro.nn import DenseNN

    half, layers = s.features // 2, []
    rest = s.features - half
    for i in range(s.transforms):
        layers += [T.Permute(torch.arange(s.features).flip(0))] if i else []
        net = DenseNN(half, list(s.hidden), param_dims=[rest * s.bins, rest * s.bins, rest * (s.bins - 1)])
        layers.append(T.SplineCoupling(s.features, half, net, s.bins, s.bound, order="quadratic", identity=True))
    return _pyro(layers, s, inverse=True)


def _pyro_masked(s: Shape, build: Callable[[torch.Tensor], Any]) -> Rival:
    import pyro.distributions.transforms as T

    layers: list[Any] = []
    for i in range(s.transforms):
        layers += [T.Permute(torch.arange(s.features).flip(0))] if i else []
        layers.append(build(torch.arange(s.features)))
    return _pyro(layers, s, s.inverse)


def pyro_autoregressive(s: Shape) -> Rival:
    import pyro.distributions.transforms as T
    from pyro.nn import AutoRegressiveNN

    def build(order: torch.Tensor) -> Any:
        dims = [s.bins, s.bins, s.bins - 1]
        net = AutoRegressiveNN(s.features, list(s.hidden), param_dims=dims, permutation=order)
        return T.SplineAutoregressive(s.features, net, s.bins, s.bound, order="quadratic")

    return _pyro_masked(s, build)


def pyro_affine(s: Shape) -> Rival:
    import pyro.distributions.transforms as T
    from pyro.nn import AutoRegressiveNN

    return _pyro_masked(
        s, lambda order: T.AffineAutoregressive(AutoRegressiveNN(s.features, list(s.hidden), permutation=order))
    )


LIBRARIES: dict[str, dict[str, Build]] = {
    "flowpath": {
        "coupling": flowpath_coupling,
        "autoregressive": flowpath_autoregressive,
        "affine": flowpath_affine,
    },
    "nflows": {"coupling": nflows_coupling, "autoregressive": nflows_autoregressive, "affine": nflows_affine},
    "zuko": {"coupling": zuko_coupling, "autoregressive": zuko_autoregressive, "affine": zuko_affine},
    "normflows": {
        "coupling": normflows_coupling,
        "autoregressive": normflows_autoregressive,
        "affine": normflows_affine,
    },
    "pyro": {"coupling": pyro_coupling, "autoregressive": pyro_autoregressive, "affine": pyro_affine},
}
