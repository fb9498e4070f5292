"""`from_nflows`: nflows' transforms and flows in flowpath, wrapped as they are or rebuilt from flowpath's own parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from flowpath.bases import Base, DiagonalNormal, StandardNormal
from flowpath.flow import Flow
from flowpath.foreign_bases import TorchBase
from flowpath.interop.nflows_native import convert
from flowpath.interop.nflows_parts import NflowsBase, NflowsConditionalNormal, NflowsEmbedding, NflowsTransform
from flowpath.transform import Transform

Shape = int | Sequence[int]


def from_nflows(
    obj: nn.Module, *, features: Shape | None = None, context: Shape | None = None, native: bool = False
) -> Any:
    """An nflows Transform or Flow as a flowpath one.

    Both libraries call data to noise `forward`. An object is wrapped: it does the work, on rows, and trains with the
    flow (bases of nflows' own are rebuilt). With `native`, its layers are rebuilt from flowpath's parts with the same
    weights, for flowpath's numerics and speed, and a flow that `fp.save` takes; nothing is shared, and what has no
    counterpart is wrapped. Each rebuilt layer is compared with the original on a few rows before it is trusted.

    Rebuilt are: affine, additive and rational-quadratic couplings with linear tails, whatever their network; masked
    affine and rational-quadratic autoregressive layers; elementwise rational-quadratic splines; LU maps, even numbers
    of Householder reflections, permutations, ActNorm, pointwise affine maps; Composite and InverseTransform.

    Args:
        obj: an nflows Transform or Flow, or one of a library of the same protocol (glasflow, sbi's `.net`).
        features: event shape of the data, where it cannot be told from the object; an int for vectors.
        context: width of the context, where it cannot be told; of a Flow with an embedding net, of what goes into that
            net. A shape, for a net that takes images or series: flowpath then passes them flat, as `(*batch, C)`.
        native: rebuild from flowpath's parts what can be.

    Returns:
        A Transform for a Transform, a Flow for a Flow. Of what `fp.to_nflows` made, the flow it was made of.

    Raises:
        TypeError: neither a Transform nor a Flow. ValueError: shapes that cannot be told, or do not fit.

    Example:
        >>> import torch, flowpath as fp
        >>> from nflows.transforms import LULinear
        >>> t = fp.from_nflows(LULinear(3))
        >>> z, ladj = t(torch.randn(2, 5, 3))
        >>> z.shape, ladj.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5]))
        >>> fp.from_nflows(LULinear(3), native=True)
        LU()
    """
    if not isinstance(obj, nn.Module) or isinstance(obj, Transform | Flow):
        already = "is flowpath's already" if isinstance(obj, nn.Module) else "is neither"
        raise TypeError(f"from_nflows expects an nflows Transform or Flow; {type(obj).__name__} {already}")
    event = None if features is None else _shape("features", features)
    given = None if context is None else _shape("context", context, least=0)
    if hasattr(obj, "_transform") and hasattr(obj, "_distribution"):
        if isinstance(getattr(obj, "flow", None), Flow):
            return obj.flow
        return _flow(obj, event, given, native)
    if not callable(getattr(obj, "inverse", None)):
        raise TypeError(f"from_nflows expects an nflows Transform or Flow, got {type(obj).__name__}, with no inverse")
    width = _context_of(obj) if given is None else math.prod(given)
    return _transform(obj, event or _event_of(obj), width, native)


def _shape(name: str, value: Shape, least: int = 1) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < least for n in sizes):
        raise ValueError(
            f"from_nflows expects {name} to be a whole number of at least {least} or a shape, got {value!r}"
        )
    return sizes


def _transform(theirs: Any, event: tuple[int, ...] | None, context: int, native: bool) -> Transform:
    if native and (event is None or len(event) == 1):
        kept = copy.deepcopy(theirs)
        ours = convert(kept.double(), None if event is None else event[0], context)[0]
        return _like(ours, theirs)
    theirs = copy.deepcopy(theirs) if native else theirs
    noise = event
    if event is not None and (len(event) > 1 or _reshapes(theirs)):
        noise = _probe(theirs, event, context)
    return NflowsTransform(theirs, data_shape=event, noise_shape=noise, context=context)


def _like(ours: Any, theirs: Any) -> Any:
    """In the dtype and on the device of the original."""
    transform = getattr(theirs, "_transform", theirs)  # a base's buffers are float64 whatever it computes in
    held = (t for t in (*theirs.parameters(), *transform.buffers()) if t.is_floating_point())
    like = next(held, torch.zeros(()))
    return ours.to(device=like.device, dtype=like.dtype)


def _flow(theirs: Any, event: tuple[int, ...] | None, given: tuple[int, ...] | None, native: bool) -> Flow:
    reshapes = _reshapes(theirs._transform)
    noise = _noise_shape(theirs._distribution, None if reshapes else event or _event_of(theirs._transform))
    net = getattr(theirs, "_embedding_net", None)
    inner = _context_of(theirs._transform) or _context_of(theirs._distribution)
    embedding = None
    if net is None or isinstance(net, nn.Identity):
        inner = inner if given is None else math.prod(given)
    else:
        shape, inner = _embedded(net, given, inner)
        embedding = NflowsEmbedding(copy.deepcopy(net) if native else net, shape)
    if event is None:
        event = _probe(theirs._transform, noise, inner, inverse=True) if reshapes else noise
    base = _base(copy.deepcopy(theirs._distribution) if native else theirs._distribution, noise, inner)
    transform = _transform(theirs._transform, event, inner, native)
    flow = Flow(transform, _like(base, theirs), embedding)
    flow.training = theirs.training  # the parts have the modes of theirs
    return flow


def _embedded(net: nn.Module, given: tuple[int, ...] | None, inner: int) -> tuple[tuple[int, ...], int]:
    """Shape of the context that an embedding net takes, and the width of what it makes of it."""
    first = next((w for m in net.modules() if isinstance(w := getattr(m, "in_features", None), int)), None)
    shapes = [given] if given is not None else [(w,) for w in (first, inner) if w]
    for shape in shapes:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                out = copy.deepcopy(net).eval()(_ones(net, (2, *shape)))
            except (RuntimeError, ValueError, IndexError):
                continue
        if out.dim() == 2 and inner in (0, out.shape[1]):
            return shape, out.shape[1]
    raise ValueError(
        f"from_nflows cannot tell what context {type(net).__name__}, the embedding net, takes"
        + ("" if given is None else f"; a context of shape {given} it does not take")
        + "; pass context=, its width or its shape"
    )


def _ones(like: nn.Module, shape: Sequence[int]) -> Tensor:
    """A point in most domains, (0, 1) among them, in a module's dtype and on its device."""
    p = next(like.parameters(), torch.zeros(()))
    return torch.full(tuple(shape), 0.5, dtype=p.dtype, device=p.device)


def _base(d: Any, shape: tuple[int, ...], context: int) -> Base:
    """nflows' own distributions as bases of ours, others wrapped."""
    kind = type(d).__name__ if "nflows" in type(d).__module__ else ""
    if isinstance(d, Distribution):
        return TorchBase(d)
    if kind == "StandardNormal":
        ones = torch.ones(shape)
        return StandardNormal(*shape) if len(shape) == 1 else TorchBase(Independent(Normal(0 * ones, ones), len(shape)))
    if kind == "DiagonalNormal" and len(shape) == 1:
        base = DiagonalNormal(*shape).to(d.mean_)
        base.numbers = nn.Parameter(torch.cat([d.log_std_, d.mean_]).detach().clone())
        return base
    if kind == "ConditionalDiagonalNormal":
        return NflowsConditionalNormal(d._context_encoder, shape, context)
    return NflowsBase(d, shape, context if _context_of(d) else 0)


def _noise_shape(d: Any, event: tuple[int, ...] | None) -> tuple[int, ...]:
    """Event shape of a base: its own word, or the transform's."""
    if isinstance(d, Distribution):
        return tuple(d.event_shape)
    shape = getattr(d, "_shape", event)
    if shape is None:
        width = next((w for m in d.modules() if (w := _made_width(m))), None)
        shape = None if width is None else (width,)
    if shape is None:
        raise ValueError(
            f"from_nflows cannot tell the event shape of the base {type(d).__name__}; give it an attribute _shape"
        )
    return tuple(shape)


def _probe(t: Any, shape: tuple[int, ...], context: int, *, inverse: bool = False) -> tuple[int, ...]:
    """Event shape on the other side, found by sending one point through a copy."""
    t = copy.deepcopy(t).eval()
    given = _ones(t, (1, context)) if context else None
    with torch.no_grad():
        return tuple((t.inverse if inverse else t)(_ones(t, (1, *shape)), given)[0].shape[1:])


def _reshapes(t: nn.Module) -> bool:
    """Whether events change their shape on the way."""
    return any(type(m).__name__ in ("MultiscaleCompositeTransform", "SqueezeTransform") for m in t.modules())


def _made_width(m: nn.Module) -> int | None:
    """Features of nflows' MADE."""
    first = getattr(m, "initial_layer", None)
    return first.in_features if isinstance(first, nn.Linear) and hasattr(first, "degrees") else None


def _widths(m: nn.Module) -> Iterator[Any]:
    """What a layer of nflows gives away about its features."""
    if isinstance(m, Transform):
        yield None if m.data_shape is None or len(m.data_shape) != 1 else m.data_shape[0]
    yield getattr(m, "features", None)
    yield _made_width(m)
    for name in ("_permutation", "_shift", "_scale", "log_scale", "running_mean"):
        value = getattr(m, name, None)
        yield len(value) if isinstance(value, Tensor) and value.dim() == 1 and len(value) > 1 else None
    value = getattr(m, "unnormalized_widths", getattr(m, "unnormalized_pdf", None))
    yield value.shape[0] if isinstance(value, Tensor) and value.dim() == 2 else None


def _first(found: Iterator[Any], good: Callable[[Any], bool]) -> Any:
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and good(v)), None)


def _event_of(t: nn.Module) -> tuple[int, ...] | None:
    """Event shape of a transform of vectors, from the first layer that tells; None where none does."""
    width = _first((v for m in t.modules() for v in _widths(m)), lambda v: v > 0)
    return None if width is None else (width,)


def _contexts(m: nn.Module) -> Iterator[Any]:
    """What a module of nflows, or of ours, gives away about its context."""
    if isinstance(m, Transform):
        yield m.context
    yield getattr(m, "context_features", None)
    yield getattr(getattr(m, "context_layer", None), "in_features", None)
    if type(m).__name__ == "ConditionalDiagonalNormal":
        encoder: Any = m._context_encoder
        inner = encoder.modules() if isinstance(encoder, nn.Module) else ()
        yield _first((getattr(e, "in_features", None) for e in inner), lambda v: v > 0)
        yield 2 * math.prod(m._shape) if not isinstance(encoder, nn.Module) else None  # type: ignore[arg-type]


def _context_of(m: Any) -> int:
    """Width of the context, from the first module that tells; 0 where none does."""
    if not isinstance(m, nn.Module):
        return 0
    return _first((v for part in m.modules() for v in _contexts(part)), lambda v: v > 0) or 0
