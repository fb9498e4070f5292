"""The inverse of a masked autoregressive transform: passes, Jacobi sweeps, incremental steps, and its gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowpath.transform import Conditioner, Element
from flowpath.transforms.autoregressive_steps import invert_by_steps

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
        own = all(p.is_leaf and not p._backward_hooks for p in params)  # a hook is called for what comes of this all
        leaves = [p if own else p.detach().requires_grad_(p.requires_grad) for p in params]
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
