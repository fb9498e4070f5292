"""What no flow of this shape can undercut: the matrix products of its conditioners, alone.

    python -m experiments.bench.floor

For every Linear of flowpath's flow, W h, W' g and g h' of the case's batch, one thread, float32; their sum is the least
time of a training step, that of the first kind alone the least of a log_prob. Saved as `results/floor.json`;
`table.py` sets the measured steps beside it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.bench.cases import CASES, LOG_PROB, TRAIN, Case
from experiments.bench.measure import Work, side_by_side
from experiments.bench.peers import LIBRARIES

SHOWN = ("small", "coupling D=2", "coupling D=6", "coupling D=43", "autoregressive D=6", "autoregressive D=43")


def products(case: Case) -> dict[tuple[int, int], int]:
    """(outputs, inputs) of the flow's Linear layers, with how many there are of each."""
    found: dict[tuple[int, int], int] = {}
    for m in LIBRARIES["flowpath"][case.kind](case.shape).module.modules():
        if isinstance(m, nn.Linear):
            shape = m.out_features, m.in_features
            found[shape] = found.get(shape, 0) + 1
    return found


def works(outputs: int, inputs: int, rows: int) -> dict[str, Work]:
    """The three products of a layer, forward first."""
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs, 1)
    h, g = torch.randn(inputs, rows), torch.randn(outputs, rows)

    def forward() -> Tensor:
        return torch.addmm(bias, weight, h)

    return {"forward": forward, "to input": lambda: weight.t() @ g, "to weight": lambda: g @ h.t()}


def milliseconds(case: Case) -> dict[str, float]:
    """The least time of a log_prob and of a training step."""
    floor = {LOG_PROB: 0.0, TRAIN: 0.0}
    for (outputs, inputs), count in products(case).items():
        times = side_by_side(works(outputs, inputs, case.batch), rounds=9, block=0.01)
        middle = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        floor[LOG_PROB] += count * middle["forward"]
        floor[TRAIN] += count * sum(middle.values())
    return floor


def main() -> None:
    torch.set_num_threads(1)
    found = {case.name: milliseconds(case) for case in CASES if case.name in SHOWN}
    for name, floor in found.items():
        print(name, {k: round(v, 2) for k, v in floor.items()})
    capability = torch.backends.cpu.get_cpu_capability()
    path = Path(__file__).parent / "results" / "floor.json"
    path.write_text(json.dumps({"capability": capability, "milliseconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
