"""On a GPU: the spline against the bytes it must move, and small flows in CUDA graphs. Needs a CUDA device.

    python -m experiments.bench.gpu [--rows 65536]

The bound of the spline is its traffic at the device's measured copy rate: an element of K bins reads 3 K - 1 numbers
and x and writes value and ladj, 4 (3 K + 2) bytes in float32; the backward pass reads those and two gradients and
writes 3 K. Results: `results/gpu.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowpath as fp
from experiments.bench.measure import side_by_side, spread
from experiments.runner import surroundings

HERE = Path(__file__).parent
BINS, FEATURES = 8, 43


def copy_rate() -> float:
    """Bytes a second that a copy moves, reading and writing."""
    a = torch.randn(1 << 27, device="cuda")
    b = torch.empty_like(a)
    seconds = spread(side_by_side({"copy": lambda: b.copy_(a)}, "cuda")["copy"])["median"]
    return 2 * a.numel() * a.element_size() / seconds


def spline(rows: int) -> dict[str, Any]:
    """The compiled spline, forward and with its backward pass, in units of the bytes bound."""
    element = fp.RationalQuadratic(BINS)
    x = torch.randn(FEATURES, rows, device="cuda").requires_grad_()
    numbers = torch.randn(element.num_params, FEATURES, rows, device="cuda").requires_grad_()
    run = torch.compile(lambda x, numbers: element.features_first(x, numbers, False))
    weight = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            run(x, numbers)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x, numbers), (x, numbers), (weight, weight))

    rate, elements = copy_rate(), x.numel()
    least = {"forward": 4 * (3 * BINS + 2) * elements / rate, "both": 4 * (9 * BINS + 6) * elements / rate}
    times = side_by_side({"forward": forward, "both": both}, "cuda")
    return {name: {"seconds": spread(times[name]), "bound": least[name]} for name in least} | {"bytes_per_second": rate}


def graphed(features: int = 2, rows: int = 64) -> dict[str, Any]:
    """A training step of the small flow, plain and replayed as a CUDA graph, in seconds."""
    flow = fp.nsf(features, hidden_features=(32, 32), whiten="none").cuda()
    adam = torch.optim.Adam(flow.parameters(), lr=1e-5, capturable=True)
    x = torch.randn(rows, features, device="cuda")

    def step() -> None:
        adam.zero_grad(set_to_none=False)
        (-flow.log_prob(x).mean()).backward()
        adam.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = side_by_side({"plain": step, "graph": graph.replay}, "cuda")
    return {name: spread(values) for name, values in times.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("experiments.bench.gpu needs a CUDA device; torch sees none here")
    found = {"spline": spline(args.rows), "small": graphed(), "device": torch.cuda.get_device_name()}
    print(json.dumps(found, indent=1))
    (HERE / "results").mkdir(exist_ok=True)
    held = found | {"surroundings": surroundings()}
    (HERE / "results" / "gpu.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
