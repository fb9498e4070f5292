"""What is timed: shapes of flows, and the operations on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.peers import Rival, Shape

LOG_PROB, TRAIN, SAMPLE, RSAMPLE, VARIATIONAL = "log_prob", "train", "sample", "rsample+backward", "rsample+log q+Adam"
LEARNING_RATE = 1e-5  # small: a flow that runs away would change what is timed


@dataclass(frozen=True)
class Case:
    """A kind of flow, its shape, a batch size and the operations to time.

    `smaller` names operations that are timed at another batch size, for the peers' sake.
    """

    name: str
    kind: str
    shape: Shape
    batch: int = 512
    operations: tuple[str, ...] = (LOG_PROB, TRAIN, SAMPLE, VARIATIONAL)
    compiled: tuple[str, ...] = ()
    smaller: tuple[tuple[str, int], ...] = ()
    quick: bool = False

    def size(self, operation: str) -> int:
        return dict(self.smaller).get(operation, self.batch)


_MASKED = (LOG_PROB, TRAIN, SAMPLE, RSAMPLE)
_WIDE = (256, 256)

CASES = [
    Case("small", "coupling", Shape(2, hidden=(32, 32)), 64, compiled=(LOG_PROB, TRAIN, VARIATIONAL), quick=True),
    Case("coupling D=2", "coupling", Shape(2), compiled=(TRAIN,)),
    Case("coupling D=6", "coupling", Shape(6, transforms=10), compiled=(TRAIN,)),
    Case("coupling D=43", "coupling", Shape(43), compiled=(LOG_PROB, TRAIN, VARIATIONAL), quick=True),
    Case("autoregressive D=6", "autoregressive", Shape(6, hidden=_WIDE), 512, _MASKED, (TRAIN, SAMPLE, RSAMPLE)),
    Case(
        "autoregressive D=43",
        "autoregressive",
        Shape(43, hidden=_WIDE),
        512,
        _MASKED,
        (TRAIN, SAMPLE, RSAMPLE),
        smaller=((RSAMPLE, 128),),
    ),
    Case("affine D=6", "affine", Shape(6, hidden=_WIDE), 512, _MASKED, (TRAIN,), quick=True),
    Case("affine D=43", "affine", Shape(43, hidden=_WIDE), 512, _MASKED, (TRAIN,)),
    Case("affine IAF D=6", "affine", Shape(6, hidden=_WIDE, inverse=True), 512, (SAMPLE, VARIATIONAL)),
    Case("affine IAF D=43", "affine", Shape(43, hidden=_WIDE, inverse=True), 512, (SAMPLE, VARIATIONAL)),
    Case("one row, coupling", "coupling", Shape(6), 1, quick=True),
    Case("one row, affine", "affine", Shape(6), 1, _MASKED),
    Case("one row, autoregressive", "autoregressive", Shape(6), 1, _MASKED),
    Case("one feature, autoregressive", "autoregressive", Shape(1), 512, _MASKED),
    Case("one feature, affine", "affine", Shape(1), 512, _MASKED),
]

SMOKE = [Case("smoke", "coupling", Shape(2, transforms=2, hidden=(8, 8)), 8, (LOG_PROB, TRAIN))]


def operation(
    rival: Rival,
    name: str,
    case: Case,
    device: str,
    fused: bool,
    differentiate: Callable[[Tensor], object] | None = None,
) -> Callable[[], object]:
    """One call of an operation. Inputs are cloned: Pyro caches by identity. `fused` is Adam's.

    `differentiate` leaves the gradients of the negative mean log likelihood of rows in the parameters; by default, as
    users do, backward() of the mean of log_prob.
    """
    n = case.size(name)
    x = 1.5 * torch.randn(n, case.shape.features, generator=torch.Generator().manual_seed(0)).to(device)
    parameters = list(rival.module.parameters())
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=fused)

    def log_prob() -> None:
        with torch.no_grad():
            rival.log_prob(x.clone())

    def backward(x: Tensor) -> None:
        (-rival.log_prob(x).mean()).backward()

    def train() -> None:
        adam.zero_grad()
        (differentiate or backward)(x.clone())
        adam.step()

    def sample() -> None:
        with torch.no_grad():
            rival.rsample(n)

    def rsample() -> None:
        for p in parameters:
            p.grad = None
        y, log_q = rival.rsample_and_log_prob(n)
        (log_q + 0.5 * y.square().sum(-1)).mean().backward()

    def variational() -> None:
        rsample()
        adam.step()

    calls = {LOG_PROB: log_prob, TRAIN: train, SAMPLE: sample, RSAMPLE: rsample, VARIATIONAL: variational}
    return calls[name]
