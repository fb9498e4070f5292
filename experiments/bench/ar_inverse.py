"""What the sequential direction of autoregressive flows costs beside the parallel one, where Jacobi sweeps pay, and
where whole passes with plain autograd beat the implicit gradient.

    python -m experiments.bench.ar_inverse [--quick]

CPU time, one thread, medians. "rough" weights imitate a trained flow: Jacobi sweeps then need more iterations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import flowpath as fp
from flowpath.transforms import autoregressive_inverse as inverse


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of one call."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def rough_flow(name: str, features: int, scale: float) -> fp.Flow:
    """An untrained flow with random weights added to its zero layers."""
    torch.manual_seed(0)
    flow = getattr(fp, name)(features, transforms=3, whiten="none")
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return flow


def row(name: str, features: int, rows: int, scale: float, repeats: int) -> str:
    """One line: log_prob, sampling stepwise and by sweeps, a training step, rsample with its backward."""
    flow = rough_flow(name, features, scale)
    x = torch.randn(rows, features)

    def sample(limit: int) -> Callable[[], object]:
        def work() -> None:
            inverse._SMALL_BATCH, kept = limit, inverse._SMALL_BATCH
            with torch.no_grad():
                flow.sample(rows)
            inverse._SMALL_BATCH = kept

        return work

    def score() -> None:
        with torch.no_grad():
            flow.log_prob(x)

    def train() -> None:
        (-flow.log_prob(x).mean()).backward()

    def rsample() -> None:
        y, log_q = flow.rsample_and_log_prob(rows)
        (log_q.mean() + y.square().mean()).backward()

    base, steps, sweeps = (milliseconds(w, repeats) for w in (score, sample(0), sample(10**9)))
    down, back = milliseconds(train, repeats), milliseconds(rsample, repeats)
    return (
        f"{name:18s} D={features:3d} rows={rows:5d} scale={scale:.2f}: log_prob {base:8.2f} ms, sampling by steps "
        f"x{steps / base:5.1f}, by sweeps x{sweeps / base:5.1f}; train {down:8.2f} ms, "
        f"rsample + backward x{back / down:4.1f}"
    )


def gradient_row(name: str, features: int, rows: int, repeats: int) -> str:
    """One line: a layer's inverse and its gradient, by passes and implicitly."""
    flow = rough_flow(name, features, 0.05)
    layer = next(m for m in flow.modules() if isinstance(m, fp.MaskedAutoregressive))
    z, params = torch.randn(rows, features), list(layer.conditioner.parameters())  # type: ignore[attr-defined]

    def run(invert: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sum(v.sum() for v in invert()), params)

    passes = run(lambda: inverse.invert_by_passes(layer, z, None))
    implicit = run(lambda: inverse.ImplicitInverse.apply(layer, z, None, *params))
    down, across = milliseconds(passes, repeats), milliseconds(implicit, repeats)
    return (
        f"{name:18s} D={features:3d} rows={rows:5d}: inverse with gradient, passes {down:7.2f} ms, "
        f"implicit {across:7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, one repeat")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for name in ("maf", "nsf_autoregressive"):
        for features in (2, 16) if quick else (2, 8, 16, 43, 64):
            for rows in (8, 512) if quick else (1, 8, 64, 512, 4096):
                for scale in (0.02, 0.05):
                    print(row(name, features, rows, scale, 1 if quick else 3), flush=True)
        for features in (2, 8) if quick else (2, 4, 6, 8, 12):
            for rows in (8,) if quick else (1, 8, 64, 512, 4096):
                print(gradient_row(name, features, rows, 1 if quick else 9), flush=True)


if __name__ == "__main__":
    main()
