"""Check a gradient estimator of your own for bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowpath.estimators import Cost, Enumerate, Estimator, Score, expectation
from flowpath.testing.properties import PropertyError


def check_estimator(
    estimator: Estimator,
    q: Callable[[], Distribution],
    f: Cost,
    parameters: Iterable[Tensor],
    *,
    num_samples: int = 64,
    repeats: int = 400,
    reference: Estimator | None = None,
    threshold: float = 5.0,
    seed: int = 0,
) -> None:
    r"""Check that an estimator's gradient of E_q[f] is unbiased, against a reference estimator's.

    Each of `repeats` gradients of either is drawn; for every parameter the difference of the two means is compared with
    its standard error. A bias smaller than that error cannot be seen: raise `repeats` to look closer.

    Args:
        estimator: the one to check.
        q: a function that builds the distribution from the parameters, anew for each gradient.
        f: the cost.
        parameters: with respect to which gradients are taken.
        num_samples: draws of a gradient. repeats: gradients of each estimator.
        reference: by default `Enumerate()` where q can, else `Score("leave_one_out")`; both are unbiased.
        threshold: largest difference allowed, in standard errors.
        seed: torch's random state is seeded by it, and restored afterwards.

    Raises:
        PropertyError: a difference above the threshold, or a gradient that is not finite.

    Example:
        >>> import torch, flowpath as fp
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> q = lambda: torch.distributions.Bernoulli(logits=logits)
        >>> fp.testing.check_estimator(fp.Score("leave_one_out"), q, lambda b: (b - 0.3) ** 2, [logits])
    """
    params = list(parameters)
    if reference is None:
        reference = Enumerate() if q().has_enumerate_support else Score("leave_one_out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mine, theirs = (_gradients(e, q, f, params, num_samples, repeats) for e in (estimator, reference))
    if not torch.isfinite(mine).all():
        raise PropertyError(
            f"{type(estimator).__name__}: {int((~torch.isfinite(mine)).sum())} gradients are not finite"
        )
    error = ((mine.var(0) + theirs.var(0)) / repeats).sqrt()
    difference = (mine.mean(0) - theirs.mean(0)).abs()
    scale = theirs.mean(0).abs().amax().clamp_min(torch.finfo(mine.dtype).tiny)
    z = difference / error.clamp_min(1e-9 * scale)
    worst = int(z.argmax())
    if float(z[worst]) > threshold:
        found, want = float(mine.mean(0)[worst]), float(theirs.mean(0)[worst])
        raise PropertyError(
            f"{type(estimator).__name__} is biased: its mean gradient in number {worst} is {found:.4g}, that of "
            f"{type(reference).__name__} {want:.4g}, {float(z[worst]):.1f} standard errors apart"
        )


def _gradients(
    estimator: Estimator, q: Callable[[], Distribution], f: Cost, params: list[Tensor], num_samples: int, repeats: int
) -> Tensor:
    rows = []
    for _ in range(repeats):
        loss = expectation(f, q(), estimator, num_samples=num_samples).sum()
        grads = torch.autograd.grad(loss, params, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)
