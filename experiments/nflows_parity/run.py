"""Claim: on the same weights flowpath and nflows 0.14 are the same flow, to 1e-10 in float64.

Prints, for log densities, samples from the same noise, and gradients in the data, the noise and the weights, the
largest |difference| beside the largest value itself; exits with 1 where a difference is above the tolerance.

    python experiments/nflows_parity/run.py [key=value ...] [--seeds 0,1] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from nflows.distributions.normal import StandardNormal
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from nflows.flows.base import Flow as NflowsFlow
from nflows.nn.nets import ResidualNet
from nflows.transforms.base import CompositeTransform
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.permutations import RandomPermutation
from torch import Tensor, nn
from torch.func import functional_call

import flowpath as fp
from experiments.runner import parse
from flowpath.interop.nflows_native import convert


@dataclass(frozen=True)
class Config:
    """`key=value` on the command line overrides."""

    features: int = 6
    hidden_features: int = 64
    layers: int = 5
    bins: int = 8
    bound: float = 3.0
    rows: int = 1000
    scale: float = 0.3  # of the random numbers added to fresh weights; rough weights (3.0) lose digits in both
    tolerance: float = 1e-10


SMOKE = {"rows": 50, "hidden_features": 16, "layers": 2}


def spline_coupling(c: Config) -> NflowsFlow:
    """Neural spline flow: rational-quadratic couplings on alternating halves, random permutations between."""
    layers: list[nn.Module] = []
    for i in range(c.layers):
        layers.append(RandomPermutation(c.features))
        layers.append(
            PiecewiseRationalQuadraticCouplingTransform(
                mask=[(j + i) % 2 for j in range(c.features)],
                transform_net_create_fn=lambda a, b: ResidualNet(a, b, hidden_features=c.hidden_features),
                num_bins=c.bins,
                tails="linear",
                tail_bound=c.bound,
            )
        )
    return NflowsFlow(CompositeTransform(layers), StandardNormal([c.features]))


def maf(c: Config) -> NflowsFlow:
    """Masked autoregressive flow: affine layers with two feedforward blocks, reversed in between."""
    return MaskedAutoregressiveFlow(
        c.features, c.hidden_features, c.layers, num_blocks_per_layer=2, use_residual_blocks=False
    )


FLOWS: dict[str, Callable[[Config], NflowsFlow]] = {"RQ coupling": spline_coupling, "MAF affine": maf}


class _Call(nn.Module):
    """A method of our flow as a module's forward, which functional_call runs on given weights."""

    def __init__(self, flow: fp.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, name: str, value: Tensor) -> Tensor:
        return getattr(self.flow, name)(value)


def compare(
    theirs: NflowsFlow, x: Tensor, noise: Tensor, v: Tensor
) -> Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]:
    """Each quantity as flowpath and as nflows has it, for data and noise `(N, d)`; v `(N, d)` weighs the samples."""
    features = theirs._distribution._shape[0]
    transform, weights = convert(theirs._transform, features, 0)
    call = _Call(fp.Flow(transform, fp.StandardNormal(features)).double())

    def run(name: str, value: Tensor) -> Tensor:
        return functional_call(call, {f"flow.transform.{k}": w for k, w in weights.items()}, (name, value))

    ours_and_theirs = {
        "log_prob": (run("log_prob", x), theirs.log_prob(x)),
        "samples": (run("to_data", noise), theirs._transform.inverse(noise)[0]),
    }
    for name, leaf, cotangent in (("log_prob", x, torch.ones(len(x))), ("samples", noise, v)):
        both = ours_and_theirs[name]
        yield name, both[:1], both[1:]
        a, b = (torch.autograd.grad(y, [leaf, *theirs.parameters()], cotangent, retain_graph=True) for y in both)
        yield f"gradient of {name} in the {'data' if leaf is x else 'noise'}", a[:1], b[:1]
        yield f"gradient of {name} in the weights", a[1:], b[1:]


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(float(t.detach().abs().max()) for t in tensors)


def roughened(theirs: NflowsFlow, scale: float) -> NflowsFlow:
    """The flow with random numbers added to its weights: as far from the identity as training goes."""
    for p in theirs.parameters():
        p.data.add_(scale * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return theirs


def main(words: list[str]) -> int:
    """Compare both flows; the exit code."""
    c, seeds, _ = parse(words, Config, SMOKE)
    torch.set_default_dtype(torch.float64)
    worst = 0.0
    for seed, (name, build) in product(seeds, FLOWS.items()):
        torch.manual_seed(seed)
        theirs = roughened(build(c), c.scale)
        x = (2.0 * torch.randn(c.rows, c.features)).requires_grad_()  # some of it outside the splines' box
        noise, v = torch.randn(c.rows, c.features).requires_grad_(), torch.randn(c.rows, c.features)
        for quantity, a, b in compare(theirs, x, noise, v):
            gap = _largest(p - q for p, q in zip(a, b, strict=True))
            print(f"{name:12s} {quantity:36s} {gap:.1e} of {_largest(b):.1e}")
            worst = max(worst, gap)
    print(f"largest difference {worst:.1e}, tolerance {c.tolerance:.0e}: {'pass' if worst <= c.tolerance else 'FAIL'}")
    return int(not worst <= c.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
