"""The inverse of a masked autoregressive transform: passes, Jacobi sweeps, incremental steps, and its gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowpath.nets.common import affine
from flowpath.nets.masked import MaskedMLP
from flowpath.transform import Conditioner, Element
from flowpath.transforms.driven import apply_element

_SMALL_BATCH = 64  # up to this many rows Jacobi sweeps beat the incremental inverse (experiments/bench/ar_inverse.py)
_SMALL_WIDTH = 16  # below this many features they do not
_FEW = 6  # up to this many features whole passes beat the implicit gradient in small batches (the same script)


class Autoregressive(Protocol):
    """What is inverted: z_i = element(x_i; conditioner_i(x_<i, context)), features in order."""

    element: Element
    conditioner: Conditioner


def invert_by_passes(t: Autoregressive, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse in `features` passes of the whole conditioner; differentiable to any order. z is sorted."""
    x, ladj = z, z
    for _ in range(z.shape[-1]):
        x, ladj = t.element.inverse(z, t.conditioner(x, context))
    return x, ladj.sum(-1)


def invert_by_sweeps(t: Autoregressive, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same passes, stopped when no feature moves by more than a few ulp: the Jacobi iteration."""
    x, ladj = t.element.inverse(z, t.conditioner(z, context))
    tolerance = 4 * torch.finfo(z.dtype).eps
    for _ in range(z.shape[-1] - 1):
        last, (x, ladj) = x, t.element.inverse(z, t.conditioner(x, context))
        if bool(((x - last).abs() <= tolerance * x.abs().clamp_min(1.0)).all()):
            break
    return x, ladj.sum(-1)


def invert_by_steps(t: Autoregressive, z: Tensor, context: Tensor | None, *, keep_graph: bool) -> tuple[Tensor, Tensor]:
    """The inverse a feature at a time, each hidden unit evaluated once: units of degree i see the i features before.

    z `(*batch, d)` is sorted, and so are the units of a MaskedMLP: what is known of a layer is always its first rows.
    """
    batch = z.shape[:-1]
    zs = z.movedim(-1, 0).flatten(1) if z.dim() > 1 else z.unsqueeze(-1)
    net: MaskedMLP = t.conditioner  # type: ignore[assignment]
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()):
        x, ladj = _steps(t.element, net, zs, context, _Pieces if keep_graph else _Buffer)
    return x.reshape(z.shape[-1], *batch).movedim(0, -1), ladj.reshape(batch)


def _steps(
    element: Element, net: MaskedMLP, z: Tensor, context: Tensor | None, kind: type[_Buffer]
) -> tuple[Tensor, Tensor]:
    """x `(d, N)` and ladj `(N,)` for z `(d, N)`."""
    *hidden, (weight, bias) = net.layers()
    units = [[n - m for m, n in pairwise([0, *known])] for known in net.known]  # of each degree, layer by layer
    offsets = [_given(net, hidden[0], context), *(b.unsqueeze(-1) for _, b in hidden[1:])]
    layers = [(w.split(n), b.split(n), kind(n, z, net)) for (w, _), b, n in zip(hidden, offsets, units, strict=True)]
    final = weight.view(net.num_params, len(z), -1).unbind(1), bias.view(net.num_params, len(z), 1).unbind(1)
    x, ladjs = kind([1] * len(z), z, net), []
    for i, row in enumerate(z.split(1)):
        below, seen = x, i
        for (weights, biases, layer), known in zip(layers, net.known, strict=True):
            if len(weights[i]):
                layer.add(i, biases[i], weights[i], below.first(seen))
            below, seen = layer, known[i]
        numbers = below.product(final[1][i], final[0][i], seen)
        value, ladj = apply_element(element, row, numbers.unsqueeze(1), inverse=True)
        x.put(i, value)
        ladjs.append(ladj)
    out = x.first(len(z))
    return (z, z.new_zeros(z.shape[1])) if out is None else (out, torch.cat(ladjs).sum(0))


def _given(net: MaskedMLP, layer: tuple[Tensor, Tensor], context: Tensor | None) -> Tensor:
    """What context and bias add to the first hidden layer, `(units, N)` or `(units, 1)`."""
    weight, bias = layer
    if context is None:
        return bias.unsqueeze(-1)
    c = context.movedim(-1, 0).flatten(1) if context.dim() > 1 else context.unsqueeze(-1)
    return affine(c, weight[:, net.features :], bias)


class _Buffer:
    """Rows of a layer `(units, N)` that become known block by block, written into one tensor: without a graph."""

    def __init__(self, sizes: list[int], like: Tensor, net: MaskedMLP) -> None:
        self.act, self.size = net._act, like.shape[1]
        self.all = like.new_empty(sum(sizes), like.shape[1])
        self.blocks = self.all.split(sizes)

    def first(self, count: int) -> Tensor | None:
        """The first rows, all of them known; None for none."""
        return self.all.narrow(0, 0, count) if count else None

    def product(self, offset: Tensor, weight: Tensor, count: int) -> Tensor:
        """offset + W h for the first rows h."""
        h = self.first(count)
        return offset.expand(-1, self.size) if h is None else torch.addmm(offset, weight.narrow(1, 0, count), h)

    def put(self, i: int, value: Tensor) -> None:
        """Block i is known."""
        self.blocks[i].copy_(value)

    def add(self, i: int, offset: Tensor, weight: Tensor, h: Tensor | None) -> None:
        """Block i is the activation of offset + W h."""
        block = self.blocks[i]
        if h is None:
            block.copy_(offset)
        else:
            torch.addmm(offset, weight.narrow(1, 0, len(h)), h, out=block)
        active = self.act(block)
        if active is not block:
            block.copy_(active)


class _Pieces(_Buffer):
    """The same kept as pieces, since autograd must see every value it used unchanged."""

    def __init__(self, sizes: list[int], like: Tensor, net: MaskedMLP) -> None:
        self.act, self.size = net._act, like.shape[1]
        self.pieces: list[Tensor] = []

    def first(self, count: int) -> Tensor | None:
        return torch.cat(self.pieces) if count else None

    def put(self, i: int, value: Tensor) -> None:
        self.pieces.append(value)

    def add(self, i: int, offset: Tensor, weight: Tensor, h: Tensor | None) -> None:
        whole = offset.expand(-1, self.size)
        self.put(i, self.act(whole.clone() if h is None else torch.addmm(whole, weight.narrow(1, 0, len(h)), h)))


def passes_are_quicker(z: Tensor) -> bool:
    """Whether passes and autograd beat the implicit gradient: few features, and above two of them few rows."""
    features = z.shape[-1]
    return features <= 2 or (features <= _FEW and z.shape[:-1].numel() <= _SMALL_BATCH)


def invert(t: Autoregressive, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse by sweeps or steps, whichever is quicker; no gradient."""
    if z.shape[:-1].numel() <= _SMALL_BATCH and z.shape[-1] >= _SMALL_WIDTH:
        return invert_by_sweeps(t, z, context)
    return invert_by_steps(t, z, context, keep_graph=False)


class ImplicitInverse(torch.autograd.Function):
    r"""x = T^{-1}(z) of a masked autoregressive T in sorted features, with its ladj; the gradient is implicit.

    With J = dT/dx at x, lower triangular with diagonal tau', a cotangent (g_x, g_l) of (x, ladj) gives
    g = g_x - d_x [g_l ladj_T], v = J^{-T} g by the Jacobi iteration v <- v + (g - J^T v) / tau', exact after at most
    `features` steps; v is the gradient in z, and parameters and context receive it through T held at x.
    """

    @staticmethod
    def forward(
        ctx: Any, t: Autoregressive, z: Tensor, context: Tensor | None, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, ladj = invert(t, z, context)
        ctx.transform, ctx.has_context = t, context is not None
        ctx.names = [name for name, _ in t.conditioner.named_parameters()]  # type: ignore[attr-defined]
        ctx.save_for_backward(z, x, *([context] if context is not None else []), *params)
        return x, ladj

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, x, *rest = ctx.saved_tensors
        context = rest.pop(0) if ctx.has_context else None
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            out = _plain_vjp(ctx.transform, ctx.names, z, context, rest, grads)
        else:
            out = _implicit_vjp(ctx.transform, ctx.names, x, context, rest, grads)
        dz, dcontext, dparams = out
        return None, dz, dcontext, *dparams


def _plain_inverse(
    t: Autoregressive, names: list[str], z: Tensor, context: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The inverse under given conditioner weights, as one differentiable graph."""
    module = _Plain(t)
    values = {f"t.conditioner.{n}": p for n, p in zip(names, params, strict=True)}
    return functional_call(module, values, (z, context))


class _Plain(nn.Module):
    """A transform's differentiable inverse as a module's forward, which is what functional_call calls."""

    def __init__(self, t: Autoregressive) -> None:
        super().__init__()
        self.t = t

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return invert_by_steps(self.t, z, context, keep_graph=True)


_Gradients = tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]


def _plain_vjp(
    t: Autoregressive,
    names: list[str],
    z: Tensor,
    context: Tensor | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> _Gradients:
    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = values[1] if context is not None else None
        return _plain_inverse(t, names, values[0], given, values[len(values) - len(names) :])

    _, vjp = torch.func.vjp(run, *(v for v in (z, context, *params) if v is not None))[:2]
    dz, *rest = vjp(tuple(grads))
    dcontext = rest.pop(0) if context is not None else None
    return dz, dcontext, tuple(rest)


def _implicit_vjp(
    t: Autoregressive,
    names: list[str],
    x: Tensor,
    context: Tensor | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> _Gradients:
    g_x, g_ladj = grads
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        leaves = [p if p.is_leaf else p.detach().requires_grad_(p.requires_grad) for p in params]
        c = None if context is None else context.detach().requires_grad_(context.requires_grad)
        if all(map(operator.is_, leaves, t.conditioner.parameters())):  # type: ignore[attr-defined]
            numbers = t.conditioner(x, c)
        else:  # the inverse was run with others in place of them
            numbers = functional_call(t.conditioner, dict(zip(names, leaves, strict=True)), (x, c))  # type: ignore[arg-type]
        z, ladj = t.element.forward(x, numbers)
    back = -g_ladj.unsqueeze(-1).expand_as(ladj)
    g = g_x
    if ladj.requires_grad:
        (slope,) = torch.autograd.grad(ladj, x, back, retain_graph=True, allow_unused=True)
        g = g if slope is None else g + slope
    v = solve_transposed(z, x, ladj.detach().exp(), g)
    wanted = [p for p in (c, *leaves) if p is not None and p.requires_grad]
    outputs = [(o, w) for o, w in ((z, -v), (ladj, back)) if o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in outputs], wanted, [w for _, w in outputs], allow_unused=True)
        if wanted
        else ()
    )
    dcontext = next(found) if c is not None and c.requires_grad else None
    return v, dcontext, tuple(next(found) if p.requires_grad else None for p in leaves)


def _traced() -> bool:
    """Whether torch.compile or make_fx looks on: then no value may be read, and all d - 1 sweeps are made."""
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return torch.compiler.is_compiling() or proxy is not None


def solve_transposed(z: Tensor, x: Tensor, diagonal: Tensor, g: Tensor) -> Tensor:
    """v with J^T v = g for the triangular J = dz/dx, by Jacobi sweeps from v = g / diagonal; at most d of them."""
    v = g / diagonal
    if not x.numel():
        return v
    tolerance = 4 * torch.finfo(g.dtype).eps
    for _ in range(x.shape[-1] - 1):
        (product,) = torch.autograd.grad(z, x, v, retain_graph=True)
        step = (g - product) / diagonal
        v = v + step
        if not _traced() and bool((step.abs() <= tolerance * v.abs().amax()).all()):
            break
    return v
