"""nflows' couplings and masked autoregressive layers, network and all, in flowpath's parts: see `nflows_native`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowpath.interop.nflows_twins import (
    ContextAlone,
    ForeignConditioner,
    GatedResidualMLP,
    MaskedResidualMLP,
    activation_class,
)
from flowpath.nets.masked import MaskedMLP
from flowpath.nets.residual import ResidualMLP
from flowpath.transform import Element, Transform
from flowpath.transforms import Coupling, Elementwise, MaskedAutoregressive, RationalQuadratic

Weights = dict[str, Tensor]
Converted = tuple[Transform, Weights]


class NoTwin(Exception):
    """A layer has no counterpart in flowpath."""


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


def exactly(values: Sequence[float]) -> Tensor:
    """Numbers as a tensor, in float64."""
    return torch.tensor(values, dtype=torch.float64)


def spline_numbers(theirs: Any, bins: int, net: Any = None) -> Numbers:
    """Our spline for one of nflows with linear tails, and what its logits are divided by for the sake of `net`."""
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
    factor = exactly([1.0 / math.sqrt(width)] * logits + [1.0] * slopes)
    return Numbers(element, factor, exactly([0.0] * logits + [unit(theirs.min_derivative)] * slopes))


def unit(floor: float) -> float:
    """c with softplus(c) + floor = 1."""
    return math.log(math.expm1(1.0 - floor))


# Couplings.


def coupling(theirs: Any, context: int, numbers: Numbers, unconditional: Converted | None) -> Converted:
    """A coupling layer; one that keeps no feature is an elementwise map given the context."""
    kept, moved = theirs.identity_features.tolist(), theirs.transform_features.tolist()
    if not moved:
        raise NoTwin
    conditioner, weights = _coupling_net(theirs.transform_net, len(kept), len(moved), numbers, context)
    width = conditioner.context
    if not kept:
        if not width or unconditional is not None:
            raise NoTwin
        t: Transform = Elementwise(len(moved), numbers.element, ContextAlone(conditioner), context=width)
        return t, under("conditioner.conditioner", weights)
    more, rest = unconditional or (None, {})
    mask = [j in moved for j in range(theirs.features)]
    t = Coupling(mask, numbers.element, conditioner, context=width, unconditional=more)
    return t, under("conditioner", weights) | under("unconditional", rest)


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


# Masked autoregressive layers.


def autoregressive(made: Any, numbers: Numbers) -> Converted:
    """A masked autoregressive layer, from nflows' MADE."""
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
    return MaskedAutoregressive(features, numbers.element, net, context=context), under("conditioner", weights)


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


def under(prefix: str, weights: Weights) -> Weights:
    """Weights of a part, by their names in the whole."""
    return {f"{prefix}.{name}": w for name, w in weights.items()}
