"""Check what you wrote yourself: a transform for every property of flowpath's own, a gradient estimator for bias."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor

from flowpath.testing.estimators import check_estimator
from flowpath.testing.properties import Property, PropertyError, example, finite, is_identity, normal, properties
from flowpath.transform import Transform

__all__ = [
    "Property",
    "PropertyError",
    "check_estimator",
    "check_transform",
    "example",
    "finite",
    "is_identity",
    "properties",
]


def check_transform(
    t: Transform,
    *,
    x: Tensor | None = None,
    context: Tensor | None = None,
    tolerance: float = 1e-8,
    identity: bool = False,
    skip: Collection[str] = (),
) -> None:
    """Check that a transform of your own keeps the contract of `flowpath.Transform`.

    Runs every entry of `flowpath.testing.properties` on a float64 copy in eval mode; neither your module nor any global
    state changes. Give the parameters rough values first: at an identity start most mistakes are invisible.

    Args:
        t: the transform.
        x: data to try, `(N, *event)`, N at least 3; by default 6 seeded normal rows, mapped into `t.data_support`.
        context: contexts to go with them, `(N, C)`; by default normal rows of width `t.context`.
        tolerance: largest error allowed, relative to 1 + |value|, where two ways to the same number are compared.
        identity: also check that the transform, as given, is the identity.
        skip: names of properties to leave out.

    Raises:
        PropertyError: a property fails; the message lists each with its numbers.
        ValueError: a name in `skip` that is no property.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.LU(3)
        >>> _ = torch.nn.init.normal_(t.lower)
        >>> fp.testing.check_transform(t)
    """
    unknown = set(skip) - set(properties)
    if unknown:
        raise ValueError(f"check_transform knows no properties {sorted(unknown)}; it has {sorted(properties)}")
    t = copy.deepcopy(t).double().eval()
    x = example(t, 6) if x is None else x.double()
    if context is None and t.context:
        context = normal(len(x), t.context)
    context = None if context is None else context.double()
    chosen = {name: p for name, p in properties.items() if name not in skip}
    failures = [f"{n}: {e}" for n, p in chosen.items() if (e := _failure(p, t, x, context, tolerance))]
    if identity and (e := _failure(is_identity, t, x, context, tolerance)):
        failures.append(f"is_identity: {e}")
    if failures:
        raise PropertyError(f"{type(t).__name__} fails {len(failures)} properties\n" + "\n".join(failures))


def _failure(p: Property, t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> str:
    try:
        with torch.random.fork_rng(devices=[]):
            p(copy.deepcopy(t), x, context, tolerance)
    except Exception as error:
        return str(error) if isinstance(error, PropertyError) else f"{type(error).__name__}: {error}"
    return ""
