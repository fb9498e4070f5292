"""Architectures: recipes that build a Flow, with the defaults of their papers. Read one and write your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from flowpath.bases import StandardNormal
from flowpath.checks import check_count
from flowpath.flow import Flow
from flowpath.nets import MLP, MaskedMLP
from flowpath.nets.common import Activation
from flowpath.standardize import Standardize
from flowpath.transform import Chain, Element, Inverse, Transform
from flowpath.transforms.autoregressive import MaskedAutoregressive
from flowpath.transforms.coupling import Coupling
from flowpath.transforms.elementwise import Affine, Elementwise
from flowpath.transforms.linear import LU, Permutation, TriangularAffine
from flowpath.transforms.normalization import Whiten
from flowpath.transforms.spline import RationalQuadratic

WhitenMode = Literal["diagonal", "full", "none"]
Widths = Sequence[int]


def _flow(features: int, context: int, whiten: WhitenMode, layers: list[Transform]) -> Flow:
    """Whitening nearest the data, the layers, a standard normal; a context is standardised likewise."""
    if whiten not in ("diagonal", "full", "none"):
        raise ValueError(f'whiten expects "diagonal", "full" or "none", got {whiten!r}')
    first: list[Transform] = [] if whiten == "none" else [Whiten(features, whiten)]
    embedding = Standardize(context) if context and whiten != "none" else None
    return Flow(Chain([*first, *layers]), StandardNormal(features), embedding)


def _coupling(
    mask: Sequence[bool], element: Element, context: int, hidden: Widths, activation: Activation, dropout: float
) -> Transform:
    """A coupling layer with an MLP; a single feature has nothing to couple with and is transformed alone."""
    options = {
        "num_params": element.num_params,
        "hidden_features": hidden,
        "activation": activation,
        "dropout": dropout,
    }
    if len(mask) == 1:
        return Elementwise(1, element, MLP(context, 1, **options) if context else None, context=context)  # type: ignore[arg-type]
    moved = sum(mask)
    net = MLP(len(mask) - moved, moved, context=context, **options)  # type: ignore[arg-type]
    return Coupling(mask, element, net, context=context)


def _masked(
    features: int, element: Element, context: int, hidden: Widths, activation: Activation, dropout: float
) -> MaskedAutoregressive:
    net = MaskedMLP(
        features,
        num_params=element.num_params,
        context=context,
        hidden_features=hidden,
        activation=activation,
        dropout=dropout,
    )
    return MaskedAutoregressive(features, element, net, context=context)


def _between(layers: Sequence[Transform], mixer: Callable[[int], list[Transform]]) -> list[Transform]:
    """The layers with the mixer's transforms between them: mixer(i) comes before layer i, i > 0."""
    return [t for i, layer in enumerate(layers) for t in [*(mixer(i) if i else []), layer]]


def realnvp(
    features: int,
    context: int = 0,
    *,
    transforms: int = 8,
    hidden_features: Widths = (128, 128),
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
    whiten: WhitenMode = "diagonal",
) -> Flow:
    """Affine couplings on alternating halves: fast both ways.

    "Density estimation using Real NVP" (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803): log scales bounded by a
    tanh, masks that alternate.

    Args:
        features: width of x.
        context: width of the context, 0 for none.
        transforms: how many couplings.
        hidden_features: widths of each conditioner's hidden layers.
        activation, dropout: of the conditioners.
        whiten: "diagonal", "full" or "none": the standardising first layer that `fp.fit` sets from the data.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import flowpath as fp
        >>> fp.realnvp(3, transforms=4).sample(2).shape
        torch.Size([2, 3])
    """
    check_count("realnvp", "features", features)
    check_count("realnvp", "transforms", transforms)
    masks = [[(j + i) % 2 == 1 or features == 1 for j in range(features)] for i in range(transforms)]
    element = Affine(log_bound=3.0)
    layers = [_coupling(m, element, context, hidden_features, activation, dropout) for m in masks]
    return _flow(features, context, whiten, layers)


def nsf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 5,
    hidden_features: Widths = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
    whiten: WhitenMode = "diagonal",
) -> Flow:
    """Rational-quadratic spline couplings with an LU map and a permutation between them: fast both ways.

    "Neural Spline Flows" (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Args:
        features, context, hidden_features, activation, dropout, whiten: as `realnvp`.
        transforms: how many couplings.
        bins: bins of each spline.
        bound: the spline acts on [-bound, bound] and is the identity outside.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import flowpath as fp
        >>> fp.nsf(3, context=2)
        Flow(...)
    """
    check_count("nsf", "features", features)
    check_count("nsf", "transforms", transforms)
    mask = [j >= features // 2 for j in range(features)]
    element = RationalQuadratic(bins, bound=bound)
    layers = [_coupling(mask, element, context, hidden_features, activation, dropout) for _ in range(transforms)]
    return _flow(features, context, whiten, _between(layers, lambda i: _mixing(features, i)))


def _mixing(features: int, i: int) -> list[Transform]:
    """Reverse, or every other time a seeded shuffle, then a learnt LU map."""
    order = Permutation.reverse(features) if i % 2 else Permutation.random(features, seed=i)
    return [order, LU(features)] if features > 1 else []


def maf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 5,
    hidden_features: Widths = (128, 128),
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
    whiten: WhitenMode = "diagonal",
) -> Flow:
    """Affine masked autoregressive layers, the order reversed between them: fast density, sequential sampling.

    "Masked Autoregressive Flow for Density Estimation" (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        features, context, hidden_features, activation, dropout, whiten: as `realnvp`.
        transforms: how many autoregressive layers.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.maf(3).log_prob(torch.zeros(1, 3))
        tensor([-2.7568], grad_fn=<AddBackward0>)
    """
    check_count("maf", "features", features)
    check_count("maf", "transforms", transforms)
    layers = [_masked(features, Affine(), context, hidden_features, activation, dropout) for _ in range(transforms)]
    return _flow(features, context, whiten, _between(layers, lambda i: [Permutation.reverse(features)]))


def iaf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 5,
    hidden_features: Widths = (128, 128),
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
    whiten: WhitenMode = "diagonal",
) -> Flow:
    """Inverse autoregressive layers: fast sampling with its log density, sequential scoring of given points.

    "Improving Variational Inference with Inverse Autoregressive Flow" (Kingma et al. 2016, arXiv:1606.04934).

    Args:
        features, context, hidden_features, activation, dropout, whiten: as `realnvp`.
        transforms: how many autoregressive layers.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import flowpath as fp
        >>> x, log_q = fp.iaf(3).rsample_and_log_prob(10)
        >>> x.shape, log_q.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """
    check_count("iaf", "features", features)
    check_count("iaf", "transforms", transforms)
    layers = [
        Inverse(_masked(features, Affine(), context, hidden_features, activation, dropout)) for _ in range(transforms)
    ]
    return _flow(features, context, whiten, _between(layers, lambda i: [Permutation.reverse(features)]))


def nsf_autoregressive(
    features: int,
    context: int = 0,
    *,
    transforms: int = 5,
    hidden_features: Widths = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
    whiten: WhitenMode = "diagonal",
) -> Flow:
    """Rational-quadratic autoregressive layers with LU maps between: the most flexible density, sequential sampling.

    "Neural Spline Flows" (Durkan et al. 2019, arXiv:1906.04032).

    Args:
        features, context, hidden_features, activation, dropout, whiten: as `realnvp`.
        transforms: how many autoregressive layers.
        bins, bound: as `nsf`.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import flowpath as fp
        >>> fp.nsf_autoregressive(3, transforms=2).sample(4).shape
        torch.Size([4, 3])
    """
    check_count("nsf_autoregressive", "features", features)
    check_count("nsf_autoregressive", "transforms", transforms)
    element = RationalQuadratic(bins, bound=bound)
    layers = [_masked(features, element, context, hidden_features, activation, dropout) for _ in range(transforms)]
    return _flow(features, context, whiten, _between(layers, lambda i: _mixing(features, i)))


def gaussian(
    features: int, context: int = 0, *, hidden_features: Widths = (128, 128), whiten: WhitenMode = "diagonal"
) -> Flow:
    """A full-rank Gaussian, its mean and covariance free or functions of the context: the baseline of every flow.

    Args:
        features: width of x.
        context: width of the context, 0 for none.
        hidden_features: hidden layers of the net from the context.
        whiten: as `realnvp`.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import flowpath as fp
        >>> fp.gaussian(3).sample(2).shape
        torch.Size([2, 3])
    """
    check_count("gaussian", "features", features)
    return _flow(
        features, context, whiten, [TriangularAffine(features, context=context, hidden_features=hidden_features)]
    )


architectures: dict[str, Callable[..., Flow]] = {
    f.__name__: f for f in (realnvp, maf, iaf, nsf, nsf_autoregressive, gaussian)
}
"""Architecture functions by name, as `fp.fit` and the command line accept them."""
