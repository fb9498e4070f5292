"""The inverse of a masked autoregressive layer a feature at a time, each hidden unit evaluated once.

Units of a MaskedMLP are sorted by degree, and units of degree i see the i features before: what is known of a layer is
always its first rows.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from flowpath.nets.common import affine
from flowpath.nets.masked import MaskedMLP
from flowpath.transform import Element
from flowpath.transforms.driven import apply_element

_STRETCH = 8  # features for all of which the products with what was known before are taken at once


def invert_by_steps(t: Any, z: Tensor, context: Tensor | None, *, keep_graph: bool) -> tuple[Tensor, Tensor]:
    """x and ladj of sorted z `(*batch, d)`; differentiable to any order with `keep_graph`, else without a graph."""
    batch = z.shape[:-1]
    zs = z.movedim(-1, 0).flatten(1) if z.dim() > 1 else z.unsqueeze(-1)
    if not len(zs):
        return z, z.new_zeros(batch)
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()):
        x, ladj = (_with_graph if keep_graph else _in_place)(t.element, t.conditioner, zs, context)
    return x.reshape(z.shape[-1], *batch).movedim(0, -1), ladj.reshape(batch)


def _in_place(element: Element, net: MaskedMLP, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """x `(d, N)` and ladj `(N,)` for z `(d, N)`, all layers filled row by row."""
    *hidden, (weight, bias) = net.layers()
    layers = [
        _Layer(w, b, [n - m for m, n in pairwise([0, *known])], z, net)
        for (w, _), b, known in zip(hidden, _offsets(net, hidden, context), net.known, strict=True)
    ]
    last, start = (v.view(net.num_params, len(z), -1).transpose(0, 1).flatten(0, 1) for v in (weight, bias))
    layers.append(_Layer(last, start, [net.num_params] * len(z), z, None))
    x, ladjs = torch.empty_like(z), []
    below = [x, *(layer.rows for layer in layers[:-1])]
    # How much of each of them is known before feature i is looked at, and once its units are.
    before = [range(len(z)), *([0, *known] for known in net.known)]
    seen = [range(len(z)), *net.known]
    for i, row in enumerate(z.split(1)):
        if i % _STRETCH == 0:
            for layer, h, count in zip(layers, below, before, strict=True):
                layer.begin(i, min(i + _STRETCH, len(z)), h, count[i])
        for layer, h, count in zip(layers, below, seen, strict=True):
            numbers = layer.finish(i, h, count[i])
        value, ladj = apply_element(element, row, numbers.unsqueeze(1), inverse=True)
        x[i] = value[0]
        ladjs.append(ladj)
    return x, torch.cat(ladjs).sum(0)


class _Layer:
    """offset + W h, activated, of a layer whose rows `(units, N)` become known block by block, one a degree."""

    def __init__(self, weight: Tensor, offset: Tensor, sizes: list[int], like: Tensor, net: MaskedMLP | None) -> None:
        self.weight, self.offset, self.act = weight, offset, None if net is None else net._act
        self.rows = like.new_empty(len(weight), like.shape[1])
        self.starts = [0, *accumulate(sizes)]
        self.blocks, self.weights = self.rows.split(sizes), weight.split(sizes)
        self.before = 0

    def begin(self, i: int, stop: int, h: Tensor, count: int) -> None:
        """For the blocks from i to stop: the product with the `count` rows of h that are known by now."""
        first, size = self.starts[i], self.starts[stop] - self.starts[i]
        rows, offset = self.rows.narrow(0, first, size), self.offset.narrow(0, first, size)
        self.before = count
        if count and size:
            torch.addmm(offset, self.weight.narrow(0, first, size).narrow(1, 0, count), h.narrow(0, 0, count), out=rows)
        else:
            rows.copy_(offset)

    def finish(self, i: int, h: Tensor, count: int) -> Tensor:
        """Block i, with the rows of h that came since."""
        block, new = self.blocks[i], count - self.before
        if not len(block):
            return block
        if new:
            block.addmm_(self.weights[i].narrow(1, self.before, new), h.narrow(0, self.before, new))
        if self.act is not None and (active := self.act(block)) is not block:
            block.copy_(active)
        return block


def _with_graph(element: Element, net: MaskedMLP, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same kept in pieces, since autograd must see every value it used unchanged."""
    *hidden, (weight, bias) = net.layers()
    offsets, size = _offsets(net, hidden, context), z.shape[1]
    finals = weight.view(net.num_params, len(z), -1).unbind(1), bias.view(net.num_params, len(z), 1).unbind(1)
    xs: list[Tensor] = []
    values: list[list[Tensor]] = [[] for _ in hidden]
    ladjs = []
    for i, row in enumerate(z.split(1)):
        below, seen = xs, i
        for (w, _), offset, known, value in zip(hidden, offsets, net.known, values, strict=True):
            rows = slice(known[i - 1] if i else 0, known[i])
            if rows.stop > rows.start:
                h = offset[rows].expand(-1, size)
                value.append(net._act(torch.addmm(h, w[rows, :seen], torch.cat(below)) if seen else h.clone()))
            below, seen = value, known[i]
        numbers = finals[1][i].expand(-1, size)
        if seen:
            numbers = torch.addmm(numbers, finals[0][i][:, :seen], torch.cat(below))
        x, ladj = apply_element(element, row, numbers.unsqueeze(1), inverse=True)
        xs.append(x)
        ladjs.append(ladj)
    return torch.cat(xs), torch.cat(ladjs).sum(0)


def _offsets(net: MaskedMLP, hidden: list[tuple[Tensor, Tensor]], context: Tensor | None) -> list[Tensor]:
    """What each hidden layer adds to its product, `(units, N)` or `(units, 1)`: the bias, and the context's part."""
    weight, bias = hidden[0]
    first = bias.unsqueeze(-1)
    if context is not None:
        c = context.movedim(-1, 0).flatten(1) if context.dim() > 1 else context.unsqueeze(-1)
        first = affine(c, weight[:, net.features :], bias)
    return [first, *(b.unsqueeze(-1) for _, b in hidden[1:])]
