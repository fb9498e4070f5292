"""What the path gradient costs beside the total gradient: one pass (`fp.Pathwise(0.0)`) and the usual two passes.

    python -m experiments.bench.path_cost [--quick]

CPU time of one gradient of a reverse KL, loss and backward, on one thread. The ways take turns, so that whatever else
the machine does reaches all of them; ratios are of the same turn, and their median is printed with its quartiles.

- total: `rsample_and_log_prob` and a backward, the plain reparameterisation gradient;
- Pathwise(1.0), Pathwise(0.0): the same gradient, and the path gradient, as `fp.ReverseKL` takes them;
- two passes: the samples scored again at a copy of themselves. For an IAF that is its sequential direction: with
  flowpath's inverse, and ("a pass a feature") as a library without one does it.

"rough" adds random numbers to the untrained weights, as training does. Targets: at most 1.5 for couplings, at most 10
for an IAF of 64 features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flowpath as fp
from flowpath.transforms.autoregressive_inverse import invert_by_passes


@dataclass(frozen=True)
class Case:
    """A flow and a batch size; `most` is the target for the ratio of the fast path to the total gradient."""

    name: str
    build: Callable[[], fp.Flow]
    batch_size: int
    most: float
    quick: bool = False


def affine(features: int, hidden: int) -> fp.Flow:
    return fp.realnvp(features, transforms=8, hidden_features=(hidden, hidden), whiten="none")


def spline(features: int, hidden: int) -> fp.Flow:
    return fp.nsf(features, transforms=5, hidden_features=(hidden, hidden), whiten="none")


def iaf(features: int, hidden: int) -> fp.Flow:
    return fp.iaf(features, transforms=3, hidden_features=(hidden, hidden), whiten="none")


CASES = [
    Case("affine couplings, D=10, 8 x (64, 64), batch 256", lambda: affine(10, 64), 256, 1.5, quick=True),
    Case("affine couplings, D=64, 8 x (256, 256), batch 512", lambda: affine(64, 256), 512, 1.5),
    Case("spline couplings, D=10, 5 x (64, 64), batch 256", lambda: spline(10, 64), 256, 1.5, quick=True),
    Case("spline couplings, D=64, 5 x (256, 256), batch 512", lambda: spline(64, 256), 512, 1.5),
    Case("IAF, D=10, 3 x (64, 64), batch 128", lambda: iaf(10, 64), 128, 10.0, quick=True),
    Case("IAF, D=64, 3 x (128, 128), batch 128", lambda: iaf(64, 128), 128, 10.0),
    Case("IAF, D=64, 3 x (128, 128), batch 32", lambda: iaf(64, 128), 32, 10.0),
]


def log_density(x: Tensor) -> Tensor:
    """A standard normal: the target must cost nothing here."""
    return -0.5 * x.square().sum(-1)


def roughened(flow: fp.Flow, scale: float) -> fp.Flow:
    """Random numbers on the weights: `scale` over the root of the inputs."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    return flow


def two_passes(flow: fp.Flow, batch_size: int, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
    """The naive path gradient: score the samples a second time at a copy, keep only the slope in the sample."""
    x = flow.rsample(batch_size)
    copy = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(log_prob(copy).sum(), copy)
    return ((x * slope).sum(-1) - log_density(x)).mean()


def a_pass_a_feature(flow: fp.Flow, x: Tensor) -> Tensor:
    """log q of an IAF by as many full passes a layer as there are features."""
    ladj = torch.zeros_like(x[..., 0])
    for t in flow.transform.transforms:  # type: ignore[union-attr]
        if isinstance(t, fp.Inverse):
            x, per_feature = invert_by_passes(t.transform, x, None)  # type: ignore[arg-type]
            ladj = ladj + per_feature.sum(-1)
        else:
            x, more = t._forward(x, None)
            ladj = ladj + more
    return flow.base.log_prob(x, None) + ladj


def ways(flow: fp.Flow, batch_size: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a loss to take the gradient of; the first is what the others are compared with."""

    def total() -> Tensor:
        x, log_q = flow.rsample_and_log_prob(batch_size)
        return (log_q - log_density(x)).mean()

    found: dict[str, Callable[[], Tensor]] = {
        "total": total,
        "Pathwise(1.0)": fp.ReverseKL(flow, log_density, fp.Pathwise(1.0), num_samples=batch_size),
        "Pathwise(0.0)": fp.ReverseKL(flow, log_density, fp.Pathwise(0.0), num_samples=batch_size),
        "two passes": lambda: two_passes(flow, batch_size, flow.log_prob),
    }
    if flow.transform.forward_cost == "sequential":
        found["two passes, a pass a feature"] = lambda: two_passes(
            flow, batch_size, lambda x: a_pass_a_feature(flow, x)
        )
    return found


def seconds(loss: Callable[[], Tensor], flow: fp.Flow) -> float:
    """CPU time of one gradient."""
    start = time.process_time()
    loss().backward()
    spent = time.process_time() - start
    flow.zero_grad()
    return spent


def measure(case: Case, scale: float, turns: int) -> str:
    """One case as lines of text."""
    torch.manual_seed(0)
    flow = roughened(case.build(), scale)
    losses = ways(flow, case.batch_size)
    slow = "two passes, a pass a feature"
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(turns + 2):
        for name, loss in losses.items():
            if name == slow and turn > 2:
                continue
            spent = seconds(loss, flow)
            if turn >= 2 or name == slow:  # the first turns warm up
                times[name].append(spent)
    total = times["total"]
    lines = [f"{case.name}, rough {scale}: total {1e3 * statistics.median(total):.1f} ms"]
    for name, found in times.items():
        if name != "total":
            ratios = sorted(a / b for a, b in zip(found, total, strict=False))
            low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
            line = f"    {name:30s} x {statistics.median(ratios):6.2f}  [{low:.2f}, {high:.2f}]"
            if name == "Pathwise(0.0)":
                met = statistics.median(ratios) <= case.most
                line += f"  target {case.most:g}: {'met' if met else 'MISSED'}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small flows, three turns")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for case in CASES:
        if case.quick or not quick:
            for scale in (0.3,) if quick else (0.3, 1.0):
                print(measure(case, scale, 3 if quick else 25 if case.most < 5 else 9), flush=True)


if __name__ == "__main__":
    main()
