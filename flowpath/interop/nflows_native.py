"""nflows' layers rebuilt from flowpath's parts, with flowpath's weights as functions of those of nflows.

Both libraries compute the same maps; these things differ in the numbers that drive them:

- nflows divides the width and height logits of a spline by sqrt(hidden_features);
- its slopes and scales are softplus(a) + m, ours softplus(a + c) + m with c such that a = 0 gives 1;
- its last layer emits the numbers feature by feature, ours number by number;
- the degrees of its MADE's hidden units go round (1, 2, ..., 1, 2, ...), ours ascend;
- it scales and then shifts where we centre and then divide.

The weights come beside the transform and stay attached to nflows' parameters: a gradient through a flow that runs on
them (`torch.func.functional_call`) arrives there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowpath.interop.nflows_parts import NflowsTransform
from flowpath.interop.nflows_twins import (
    ContextAlone,
    ForeignConditioner,
    GatedResidualMLP,
    MaskedResidualMLP,
    SigmoidAffine,
    activation_class,
)
from flowpath.nets import MaskedMLP, ResidualMLP
from flowpath.transform import Chain, Element, Inverse, Transform
from flowpath.transforms import (
    LU,
    ActNorm,
    Additive,
    Affine,
    Coupling,
    Elementwise,
    Householder,
    MaskedAutoregressive,
    Permutation,
    RationalQuadratic,
    Whiten,
)

Weights = dict[str, Tensor]
Converted = tuple[Transform, Weights]
_TOLERANCE = 1e-8  # of the comparison that each rebuilt layer must pass, in float64


class NoTwin(Exception):
    """A layer has no counterpart in flowpath."""


def convert(theirs: nn.Module, features: int | None, context: int) -> Converted:
    """A float64 nflows transform in flowpath's parts, layers without a counterpart wrapped, and its weights by name.

    Args:
        theirs: the transform; wrapped layers are those it is made of, not copies.
        features: width of its events, None where unknown.
        context: width of the context, 0 for none.
    """
    if isinstance(theirs, Transform):
        return theirs, {}
    kind = _kind(theirs)
    if kind == "InverseTransform":
        inner, weights = convert(theirs._transform, features, context)  # type: ignore[arg-type]
        return _in_mode(Inverse(inner), theirs), _under("transform", weights)
    if kind in ("CompositeTransform", "CompositeCDFTransform"):
        chain, weights = _chain(list(theirs._transforms), features, context)  # type: ignore[arg-type]
        return _in_mode(chain, theirs), weights
    try:
        with torch.random.fork_rng(devices=[]):
            ours, weights = _RULES[kind](theirs, features, context)
        ours = ours.to(device=_device(theirs)).double().train(theirs.training)
        _load(ours, weights)
        _check_same(ours, theirs, context)
    except (KeyError, NoTwin):
        shape = None if features is None else (features,)
        return NflowsTransform(theirs, data_shape=shape, noise_shape=shape, context=context), {}
    return ours, weights


def _in_mode(ours: Transform, theirs: nn.Module) -> Transform:
    """A container in the mode of the original; its parts have theirs."""
    ours.training = theirs.training
    return ours


def _kind(t: nn.Module) -> str:
    """The class of a transform of nflows, or of a library that carries a copy of it; nothing for a user's own."""
    place = type(t).__module__.split(".")
    return type(t).__name__ if "nflows" in place and "transforms" in place else ""


def _chain(parts: Sequence[nn.Module], features: int | None, context: int) -> Converted:
    found = [convert(t, features, context) for t in parts if _kind(t) != "IdentityTransform"]
    if not found and features is not None:
        return Permutation(range(features)), {}
    if not found:
        raise ValueError("from_nflows: a CompositeTransform that does nothing; pass features=")
    weights = {f"transforms.{i}.{name}": w for i, (_, ws) in enumerate(found) for name, w in ws.items()}
    return Chain([t for t, _ in found]), weights


def _load(ours: nn.Module, weights: Weights) -> None:
    left = ours.load_state_dict({k: w.detach() for k, w in weights.items()}, strict=False)
    if left.unexpected_keys:
        raise NoTwin
    for name, p in ours.named_parameters():
        if name in weights:
            p.requires_grad_(weights[name].requires_grad)


@torch.no_grad()
def _check_same(ours: Transform, theirs: nn.Module, context: int) -> None:
    """The rebuilt layer does to a few rows what the original does, or it is not used: versions of nflows differ."""
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros((), dtype=torch.float64, device=_device(theirs))
    x = 1.5 * torch.randn(8, *(ours.data_shape or ()), generator=generator, dtype=torch.float64).to(like)
    c = torch.randn(8, context, generator=generator, dtype=torch.float64).to(like) if context else None
    given = c if ours.context else None
    ours, theirs = copy.deepcopy(ours).eval(), copy.deepcopy(theirs).eval()
    for a, b in zip(ours(x, given), theirs(x, given), strict=True):
        if a.shape != b.shape or not bool(((a - b).abs() <= _TOLERANCE * (1.0 + b.abs())).all()):
            raise NoTwin


def _device(t: nn.Module) -> torch.device:
    return next((v.device for v in (*t.parameters(), *t.buffers())), torch.device("cpu"))


# The Elements: what a layer's numbers mean.


class Numbers(NamedTuple):
    """An Element, and how its numbers follow from what nflows' network emits: factor * emitted[order] - shift."""

    element: Element
    factor: Tensor
    shift: Tensor
    by_feature: bool = True
    swapped: bool = False

    def order(self, features: int) -> Tensor:
        """Where, in a row of the network, number p of feature j is; number by number."""
        count = len(self.factor)
        places = torch.arange(count * features)
        if self.by_feature:
            return places.view(features, count).T.flatten()
        return (places.view(count, features).flip(0) if self.swapped else places.view(count, features)).flatten()


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _spline(theirs: Any, bins: int, net: Any = None) -> Numbers:
    if theirs.tails != "linear":
        raise NoTwin
    try:
        element = RationalQuadratic(
            bins,
            bound=float(theirs.tail_bound),
            min_width=theirs.min_bin_width,
            min_height=theirs.min_bin_height,
            min_slope=theirs.min_derivative,
        )
    except ValueError:
        raise NoTwin from None
    width = getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))
    logits, slopes = 2 * bins, bins - 1
    factor = _numbers([1.0 / math.sqrt(width)] * logits + [1.0] * slopes)
    return Numbers(element, factor, _numbers([0.0] * logits + [_unit(theirs.min_derivative)] * slopes))


def _unit(floor: float) -> float:
    """c with softplus(c) + floor = 1."""
    return math.log(math.expm1(1.0 - floor))


# Couplings.


def _coupling(theirs: Any, context: int, numbers: Numbers) -> Converted:
    kept, moved = theirs.identity_features.tolist(), theirs.transform_features.tolist()
    if not moved:
        raise NoTwin
    conditioner, weights = _coupling_net(theirs.transform_net, len(kept), len(moved), numbers, context)
    width = conditioner.context
    if not kept:
        if not width or theirs.unconditional_transform is not None:
            raise NoTwin
        t: Transform = Elementwise(len(moved), numbers.element, ContextAlone(conditioner), context=width)
        return t, _under("conditioner.conditioner", weights)
    more: Transform | None = None
    rest: Weights = {}
    if theirs.unconditional_transform is not None:
        more, rest = convert(theirs.unconditional_transform, len(kept), 0)
    mask = [j in moved for j in range(theirs.features)]
    t = Coupling(mask, numbers.element, conditioner, context=width, unconditional=more)
    return t, _under("conditioner", weights) | _under("unconditional", rest)


def _coupling_net(net: Any, kept: int, moved: int, numbers: Numbers, context: int) -> tuple[Any, Weights]:
    """Our ResidualMLP for nflows' ResidualNet, or the network itself behind an adapter."""
    order = numbers.order(moved)
    if type(net).__name__ != "ResidualNet" or "nflows" not in type(net).__module__:
        return ForeignConditioner(net, order, numbers.factor, numbers.shift, in_features=kept, context=context), {}
    blocks, width = list(net.blocks), net.context_features or 0
    activations = {activation_class(b.activation) for b in blocks}
    activation = activations.pop() if len(activations) == 1 else None
    if activation is None or kept + width == 0:
        return ForeignConditioner(net, order, numbers.factor, numbers.shift, in_features=kept, context=width), {}
    norm = any(b.use_batch_norm for b in blocks)
    options: dict[str, Any] = {
        "num_params": numbers.element.num_params,
        "context": width,
        "hidden_features": net.hidden_features,
        "blocks": len(blocks),
        "activation": activation,
        "dropout": blocks[0].dropout.p,
    }
    ours: nn.Module = (
        GatedResidualMLP(kept, moved, batch_norm=norm, **options)
        if norm or width
        else ResidualMLP(kept, moved, **options)
    )
    layers: dict[str, nn.Module] = {"initial": net.initial_layer}
    for i, block in enumerate(blocks):
        layers[f"first.{i}"], layers[f"second.{i}"] = block.linear_layers
        if width:
            layers[f"gates.{i}"] = block.context_layer
        if norm:
            layers[f"norms.{2 * i}"], layers[f"norms.{2 * i + 1}"] = block.batch_norm_layers
    return ours, _of_layers(layers) | _final(net.final_layer, order, moved, numbers)


def _spline_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _coupling(theirs, context, _spline(theirs, theirs.num_bins, theirs.transform_net))


def _affine_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _coupling(theirs, context, Numbers(SigmoidAffine(), torch.ones(2), torch.zeros(2), False, True))


def _additive_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _coupling(theirs, context, Numbers(Additive(), torch.ones(1), torch.zeros(1), False))


# Masked autoregressive layers.


def _affine_autoregressive(theirs: Any, features: int | None, context: int) -> Converted:
    floor = float(theirs._epsilon)
    numbers = Numbers(Affine(min_scale=floor), torch.ones(2), _numbers([_unit(floor), 0.0]))
    return _autoregressive(theirs.autoregressive_net, numbers)


def _spline_autoregressive(theirs: Any, features: int | None, context: int) -> Converted:
    return _autoregressive(theirs.autoregressive_net, _spline(theirs, theirs.num_bins, theirs.autoregressive_net))


def _autoregressive(made: Any, numbers: Numbers) -> Converted:
    if type(made).__name__ != "MADE" or "nflows" not in type(made).__module__:
        raise NoTwin
    activation, blocks = activation_class(made.activation), list(made.blocks)
    if activation is None:
        raise NoTwin
    context = made.context_layer.in_features if hasattr(made, "context_layer") else 0
    dropout = blocks[0].dropout.p if blocks else 0.0
    plain = not made.use_residual_blocks and not context and not dropout
    build = _sorted_made if plain and not any(b.batch_norm for b in blocks) else _made
    net, weights = build(made, numbers, context, activation, dropout)
    features = made.initial_layer.in_features
    return MaskedAutoregressive(features, numbers.element, net, context=context), _under("conditioner", weights)


def _sorted_made(made: Any, numbers: Numbers, context: int, activation: Any, dropout: float) -> tuple[Any, Weights]:
    """A plain MADE as our MaskedMLP, its units sorted by degree."""
    hidden = [made.initial_layer, *(block.linear for block in made.blocks)]
    d = made.initial_layer.in_features
    orders = [layer.degrees.argsort(stable=True) for layer in hidden]
    net = MaskedMLP(
        d,
        num_params=numbers.element.num_params,
        hidden_features=[len(order) for order in orders],
        activation=activation,
        degrees=[layer.degrees[order].tolist() for layer, order in zip(hidden, orders, strict=True)],
    )
    weights, columns = {}, torch.arange(d, device=orders[0].device)
    for i, (layer, rows) in enumerate(zip(hidden, orders, strict=True)):
        weights[f"hidden.{i}.weight"] = layer.weight[rows][:, columns]
        weights[f"hidden.{i}.bias"] = layer.bias[rows]
        columns = rows
    final = _final(made.final_layer, numbers.order(d), d, numbers)
    return net, weights | {"final.weight": final["final.weight"][:, columns], "final.bias": final["final.bias"]}


def _made(made: Any, numbers: Numbers, context: int, activation: Any, dropout: float) -> tuple[Any, Weights]:
    """A MADE with residual blocks, a context, dropout or batch norm, unit by unit."""
    d, residual = made.initial_layer.in_features, made.use_residual_blocks
    linears = [layer for b in made.blocks for layer in (b.linear_layers if residual else [b.linear])]
    norms = [n for b in made.blocks for n in _block_norms(b, residual)]
    net = MaskedResidualMLP(
        d,
        num_params=numbers.element.num_params,
        context=context,
        degrees=[layer.degrees.tolist() for layer in (made.initial_layer, *linears)],
        residual=residual,
        activation=activation,
        dropout=dropout,
        batch_norm=bool(norms),
    )
    layers = {"initial": made.initial_layer, **{f"hidden.{i}": layer for i, layer in enumerate(linears)}}
    layers |= {f"norms.{i}": norm for i, norm in enumerate(norms)}
    if context:
        fed = [made, *(made.blocks if residual else [])]
        layers |= {f"contexts.{i}": part.context_layer for i, part in enumerate(fed)}
    return net, _of_layers(layers) | _final(made.final_layer, numbers.order(d), d, numbers)


def _block_norms(block: Any, residual: bool) -> list[nn.Module]:
    if residual:
        return list(block.batch_norm_layers) if block.use_batch_norm else []
    return [] if block.batch_norm is None else [block.batch_norm]


def _of_layers(layers: dict[str, Any]) -> Weights:
    """Parameters and running statistics of layers; masks and degrees of nflows' are rebuilt."""
    skipped = ("mask", "degrees")
    pairs = ((name, k, w) for name, m in layers.items() for k, w in [*m.named_parameters(), *m.named_buffers()])
    return {f"{name}.{k}": w for name, k, w in pairs if k not in skipped}


def _final(layer: Any, order: Tensor, features: int, numbers: Numbers) -> Weights:
    """The last layer with its rows in our order, each number scaled by its factor and lowered by its shift."""
    factor, shift = (v.to(layer.bias).repeat_interleave(features) for v in (numbers.factor, numbers.shift))
    return {
        "final.weight": layer.weight[order] * factor[:, None],
        "final.bias": layer.bias[order] * factor - shift,
    }


# Layers without a network.


def _lu(theirs: Any, features: int | None, context: int) -> Converted:
    lower, upper = theirs._create_lower_upper()
    s = theirs.upper_diag
    raw = s + torch.log(-torch.expm1(-s))  # softplus(raw) = s
    weights = {"lower": lower.tril(-1), "upper": upper.triu(1), "diagonal": raw, "bias": theirs.bias}
    return LU(theirs.features), weights


def _householder(theirs: Any, features: int | None, context: int) -> Converted:
    if theirs.num_transforms % 2:
        raise NoTwin
    return Householder(theirs.features, theirs.num_transforms), {"vectors": theirs.q_vectors}


def _permutation(theirs: Any, features: int | None, context: int) -> Converted:
    if theirs._dim != 1:
        raise NoTwin
    return Permutation(theirs._permutation.tolist()), {}


def _act_norm(theirs: Any, features: int | None, context: int) -> Converted:
    weights = {
        "loc": -theirs.shift * (-theirs.log_scale).exp(),
        "log_scale": -theirs.log_scale,
        "is_set": theirs.initialized,
    }
    return ActNorm(len(theirs.shift)), weights


def _pointwise(theirs: Any, features: int | None, context: int) -> Converted:
    shift, scale = theirs._shift.double(), theirs._scale.double()
    width = features or max(shift.numel(), scale.numel())
    if max(shift.dim(), scale.dim()) > 1 or (features is None and width == 1):
        raise NoTwin
    one = torch.ones(width, dtype=torch.float64, device=scale.device)
    return Whiten(width), {"loc": -shift / scale * one, "scale": one / scale, "is_set": torch.tensor(True)}


def _spline_cdf(theirs: Any, features: int | None, context: int) -> Converted:
    raw = [theirs.unnormalized_widths, theirs.unnormalized_heights, theirs.unnormalized_derivatives]
    if raw[0].dim() != 2:
        raise NoTwin
    numbers = _spline(theirs, raw[0].shape[-1])
    params = torch.cat(raw, -1).T - numbers.shift.to(raw[0])[:, None]
    return Elementwise(raw[0].shape[0], numbers.element), {"params": params}


def _under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": w for name, w in weights.items()}


_RULES: dict[str, Callable[[Any, int | None, int], Converted]] = {
    "ActNorm": _act_norm,
    "AdditiveCouplingTransform": _additive_coupling,
    "AffineCouplingTransform": _affine_coupling,
    "AffineTransform": _pointwise,
    "HouseholderSequence": _householder,
    "LULinear": _lu,
    "MaskedAffineAutoregressiveTransform": _affine_autoregressive,
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": _spline_autoregressive,
    "Permutation": _permutation,
    "PiecewiseRationalQuadraticCDF": _spline_cdf,
    "PiecewiseRationalQuadraticCouplingTransform": _spline_coupling,
    "PointwiseAffineTransform": _pointwise,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
}
